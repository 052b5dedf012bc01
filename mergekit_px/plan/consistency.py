"""Whether what is written agrees with the config and the tokenizer that go with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_px.plan.config import LAYER_COUNTS
from mergekit_px.plan.layers import stack_sizes
from mergekit_px.plan.model import WorkItem
from mergekit_px.plan.tied import is_vocabulary

_MORE_LAYERS = "num_nextn_predict_layers"
"""Layers behind the last that only predict further tokens, and may be stored or not."""
_SHARED = ("num_hidden_groups", "num_mem_blocks")
"""Where layers share weights, so that fewer are stored."""


def contradictions(
    config: Mapping[str, Any], items: Sequence[WorkItem], tokens: Mapping[int, str] | None
) -> Iterator[str]:
    """Sentences on what the config or the tokenizer says and the weights deny.

    Args:
        tokens: of the result, where they are known.
    """
    parts = [config, *(part for key, part in config.items() if key.endswith("_config") and isinstance(part, Mapping))]
    sizes = set(stack_sizes(item.name for item in items).values())
    shapes = [item.shape for item in items if is_vocabulary(item.name) and len(item.shape) == 2]
    rows = {shape[0] for shape in shapes}
    for part in parts:
        yield from _layers(part, sizes)
        if rows:
            yield from _vocabulary(part, rows)
            yield from _width(part, {shape[1] for shape in shapes})
    if rows and tokens and max(tokens) >= max(rows):
        yield f"the tokenizer gives out ids up to {max(tokens)}, and the embedding has {max(rows)} rows"


def _layers(part: Mapping[str, Any], sizes: set[int]) -> Iterator[str]:
    for key in LAYER_COUNTS:
        count = part.get(key)
        if type(count) is not int or not sizes or any(shared in part for shared in _SHARED):
            continue
        more = part.get(_MORE_LAYERS)
        if not sizes & {count, count + (more if isinstance(more, int) else 0)}:
            listed = " and ".join(map(str, sorted(sizes)))
            yield f"the config says {key}: {count}, and the weights have {listed} layers"
        kinds = part.get("layer_types")
        if isinstance(kinds, list) and len(kinds) != count:
            yield f"the config lists {len(kinds)} layer_types for {count} layers"
        return


def _vocabulary(part: Mapping[str, Any], rows: set[int]) -> Iterator[str]:
    size = part.get("vocab_size")
    if type(size) is int and size not in rows:
        yield f"the config says vocab_size: {size}, and the embedding has {' or '.join(map(str, sorted(rows)))} rows"
    for key, value in part.items():
        ids = value if isinstance(value, list) else [value]
        beyond = [each for each in ids if type(each) is int and each >= max(rows)]
        if key.endswith("_token_id") and beyond:
            yield f"the config says {key}: {beyond[0]}, and the embedding has {max(rows)} rows"


def _width(part: Mapping[str, Any], widths: set[int]) -> Iterator[str]:
    size = part.get("hidden_size")
    # Embeddings of another width than the layers have an entry of their own.
    others = {value for key, value in part.items() if type(value) is int and ("embed" in key or "dim" in key)}
    if "vocab_size" in part and type(size) is int and not widths & {size, *others}:
        yield f"the config says hidden_size: {size}, and the embedding is {' or '.join(map(str, sorted(widths)))} wide"
