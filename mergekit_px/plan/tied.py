"""Tensors that are one tensor under two names: tied heads, and the other copies that models share."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

from mergekit_px.checkpoint.contents import StoredTensor
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.layers import split_layer

_HEADS = frozenset({"lm_head", "embed_out", "output_projection", "decoder", "generator_lm_head"})
_TOP_HEADS = frozenset({"head", "output", "proj_out", "lm_loss"})
"""Heads by these names only where they are no part of another module."""
_EMBEDDINGS = frozenset(
    {
        *("embed_tokens", "wte", "word_embeddings", "word_embedding", "embed_in", "tok_embeddings", "tokens_embed"),
        *("embeddings", "embedding", "shared"),
    }
)

_COMPARED_WHOLE = 1 << 20
_COMPARED_PIECES, _COMPARED_PIECE = 64, 4096


def is_head(name: str) -> bool:
    """Whether a name is that of a language-model head's weight."""
    parts = name.split(".")
    if len(parts) < 2 or parts[-1] != "weight" or split_layer(name) is not None:
        return False
    return parts[-2] in _HEADS or (len(parts) == 2 and parts[0] in _TOP_HEADS)


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row, or one value, for each token: embeddings, heads and their biases."""
    weight = name.removesuffix(".bias") + ".weight" if name.endswith(".bias") else name
    heads = is_head(weight) or name.endswith(("predictions.bias", "embed_tokens_per_layer.weight"))
    return heads or _is_token_embedding(name)


def _is_token_embedding(name: str) -> bool:
    parts = name.split(".")
    return len(parts) >= 2 and parts[-1] == "weight" and parts[-2] in _EMBEDDINGS and split_layer(name) is None


def tied_source(name: str, source: ResolvedInput) -> str | None:
    """The tensor that stands in for a copy which ``source`` does not store; None if it is simply missing.

    A head counts as tied unless the config says ``tie_word_embeddings: false``, and only if there is exactly one
    token embedding outside the numbered layers.
    """
    return None if name in source.checkpoint.tensors else tied_copy(name, source, source.config)


def original_of(name: str, tensors: Mapping[str, StoredTensor]) -> str | None:
    """The tensor among ``tensors`` of which one by that name would be a copy, going by names alone.

    Heads are copies of the token embedding; an encoder's and a decoder's own embeddings of the shared one; the
    bias of a head's last layer that of the head.
    """
    parts = name.split(".")
    if parts[-2:] == ["embed_tokens", "weight"] and parts[-3:-2] in (["encoder"], ["decoder"]):
        shared = ".".join([*parts[:-3], "shared", "weight"])
        return shared if shared in tensors else None
    if parts[-2:] == ["decoder", "bias"] and split_layer(name) is None:
        bias = ".".join([*parts[:-2], "bias"])
        return bias if bias in tensors else None
    if not is_head(name):
        return None
    embeddings = [
        other
        for other, tensor in tensors.items()
        if other != name
        and len(tensor.shape) == 2
        and _is_token_embedding(other)
        and original_of(other, tensors) is None
    ]
    return embeddings[0] if len(embeddings) == 1 else None


def tied_copy(name: str, source: ResolvedInput, config: Mapping[str, Any] | None) -> str | None:
    """The tensor of which ``name`` is, or would be, a copy in this model; None for a tensor of its own.

    A head is one if the config ties it, the other copies always are by the models' own code; but what is stored twice
    with different values is two tensors. Large tensors are compared by samples, those not on this machine not at all.

    Args:
        config: that of the model, adapters included.
    """
    tensors = source.checkpoint.tensors
    original = original_of(name, tensors)
    if original is None or config is None:
        return None
    stated = stated_tie(config)
    if is_head(name) and stated is False:
        return None
    if name not in tensors:
        return original
    equal = _equal_bytes(source, tensors[name], tensors[original])
    if equal is None:
        return original if stated or not is_head(name) else None
    return original if equal else None


def stated_tie(config: Mapping[str, Any]) -> bool | None:
    """What a config says of ``tie_word_embeddings``; None where it says nothing."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return None


def _equal_bytes(source: ResolvedInput, one: StoredTensor, other: StoredTensor) -> bool | None:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if source.state is None and source.checkpoint.directory is None:
        return None
    with closing(source.open_reader()) as reader:
        whole = one.nbytes <= _COMPARED_WHOLE
        size = one.nbytes if whole else _COMPARED_PIECE
        last = one.nbytes - size
        starts = [0] if whole else [last * piece // (_COMPARED_PIECES - 1) for piece in range(_COMPARED_PIECES)]
        left, right = bytearray(size), bytearray(size)
        for start in starts:
            reader.read_into(one, start, memoryview(left))
            reader.read_into(other, start, memoryview(right))
            if left != right:
                return False
        return True
