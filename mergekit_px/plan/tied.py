"""Output heads that are tied to the embedding and therefore not stored."""

from __future__ import annotations

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


def is_head(name: str) -> bool:
    """Whether a name is that of a language-model head's weight."""
    parts = name.split(".")
    if len(parts) < 2 or parts[-1] != "weight" or split_layer(name) is not None:
        return False
    return parts[-2] in _HEADS or (len(parts) == 2 and parts[0] in _TOP_HEADS)


def _is_token_embedding(name: str) -> bool:
    parts = name.split(".")
    return len(parts) >= 2 and parts[-1] == "weight" and parts[-2] in _EMBEDDINGS and split_layer(name) is None


def tied_source(name: str, source: ResolvedInput) -> str | None:
    """The embedding that stands in for a head which ``source`` does not store; None if it is simply missing.

    A head counts as tied unless the config says ``tie_word_embeddings: false``, and only if there is exactly one
    token embedding outside the numbered layers.
    """
    config = source.config
    if config is None or not is_head(name) or name in source.checkpoint.tensors:
        return None
    if not _ties(config):
        return None
    candidates = [
        tensor.name
        for tensor in source.checkpoint.tensors.values()
        if len(tensor.shape) == 2 and _is_token_embedding(tensor.name)
    ]
    return candidates[0] if len(candidates) == 1 else None


def _ties(config: object) -> bool:
    if not isinstance(config, dict):
        return False
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return True
