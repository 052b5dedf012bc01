"""How many heads a model has and how it knows positions: numbers of its ``config.json``, or of the user."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.errors import TensorMismatchError, UsageError

Positions = Literal["auto", "additive", "rotary"]

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "encoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "n_head_kv", "num_kv_heads", "kv_n_heads")


@dataclass(frozen=True)
class HeadCounts:
    """What names and shapes do not tell of attention.

    Attributes:
        heads: query heads; None where nobody says.
        kv_heads: key and value heads; None: as the shapes tell, and where they do not, as many.
        positions: ``additive``: positions are in the residual stream, so that channels of a head may change places;
            ``rotary``: they are turned into pairs of channels of queries and keys, which stay where they are;
            ``alibi``: heads differ by their number; None: nothing tells.
    """

    heads: int | None
    kv_heads: int | None
    positions: Literal["additive", "rotary", "alibi"] | None


def head_counts(checkpoint: Checkpoint, heads: int | None, kv_heads: int | None, positions: Positions) -> HeadCounts:
    """What the user says, and else what config and names of a checkpoint tell.

    Raises:
        UsageError: the config holds several counts (a model of several parts).
    """
    config = checkpoint.config or {}
    where = f"{checkpoint.label}/config.json"
    found = heads if heads is not None else _one(config, _HEADS, where, "--heads")
    shared = kv_heads if kv_heads is not None else _one(config, _KV_HEADS, where, "--kv-heads")
    if shared is None and config.get("multi_query") is True and config.get("new_decoder_architecture") is not True:
        shared = 1
    return HeadCounts(found, shared, _positions(config, checkpoint.tensors) if positions == "auto" else positions)


def require_equal_heads(source: Checkpoint, target: Checkpoint, counts: HeadCounts, other: HeadCounts) -> None:
    """Raise ``TensorMismatchError`` where the configs of two models tell different numbers of heads."""
    for kind, ours, theirs in (
        ("heads", counts.heads, other.heads),
        ("key and value heads", counts.kv_heads, other.kv_heads),
    ):
        if ours is not None and theirs is not None and ours != theirs:
            raise TensorMismatchError(
                f"{source.label} has {theirs} {kind} and {target.label} has {ours}: heads cannot be matched one to one",
                hint="permute only the rest (--permute mlp residual), or take --route theseus",
            )


def _one(config: Mapping[str, Any], keys: Iterable[str], where: str, flag: str) -> int | None:
    """The number under one of the keys, at the top, else in the parts of the config."""
    for level in ([config], [part for part in config.values() if isinstance(part, Mapping)]):
        numbers = {part[key] for part in level for key in keys if type(part.get(key)) is int}
        if len(numbers) > 1:
            raise UsageError(f"it tells several numbers of heads ({sorted(numbers)})", where=where, hint=f"give {flag}")
        if numbers:
            number: int = numbers.pop()
            return number
    return None


def _positions(config: Mapping[str, Any], names: Iterable[str]) -> Literal["additive", "rotary", "alibi"] | None:
    """What is told about positions; the kind that leaves the least freedom where several are."""
    told = {"additive", "absolute"} & {str(value) for _, value in _entries(config)}
    for key, value in _entries(config):
        if ("alibi" in key and value) or value == "alibi":
            return "alibi"
    for key, value in _entries(config):
        if (("rope" in key or "rotary" in key) and value is not None) or value == "rotary":
            return "rotary"
    components = [component.lower() for name in names for component in name.split(".")]
    if any(component.startswith(("rope", "rotary")) for component in components):
        return "rotary"
    learned = ("position_embedding", "pos_embed", "embed_positions", "pos_conv", "wpe", "position")
    if told or any(component.startswith(learned) for component in components):
        return "additive"
    return None


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield str(key).lower(), value
        if isinstance(value, Mapping):
            yield from _entries(value)
