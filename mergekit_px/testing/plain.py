"""The plain way to run a method: all in memory, one block after another.

It defines what a merge gives; whatever runs methods in earnest is compared with it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mergekit_px.kernels.random import RandomStream
from mergekit_px.methods import find_method
from mergekit_px.methods.declare import Access, Extent, Method, Operands, check_source_count


def apply_method(
    method: Method | str,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    params: Mapping[str, Any] | None = None,
    *,
    base: torch.Tensor | None = None,
    seed: int = 0,
    name: str = "t",
    block: int | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Merge one tensor; :func:`merge_tensors` with one name."""
    sources = [{name: tensor} for tensor in tensors]
    bases = None if base is None else {name: base}
    return merge_tensors(method, sources, weights, params, base=bases, seed=seed, block=block, dtype=dtype)[name]


def merge_tensors(
    method: Method | str,
    sources: Sequence[Mapping[str, torch.Tensor]],
    weights: Sequence[float] | None = None,
    params: Mapping[str, Any] | None = None,
    *,
    base: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
    block: int | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Merge the tensors that the first source names, by the definition of what a method is.

    Args:
        method: a declared method or its name.
        sources: one mapping of names to tensors for each source. Without a base, those of a method on deltas
            are taken as task vectors, and a task vector is returned.
        weights: one for each source; the method's default if None.
        params: of the method's parameter class.
        base: the base's tensors.
        seed: of random methods, whose streams are named after the tensors.
        block: the most elements that the method sees at once, if it may be cut; None for whole tensors.
        dtype: of the result; None for that of the base, or of the first source if there is none.
    """
    declared = find_method(method) if isinstance(method, str) else method
    check_source_count(declared, len(sources))
    chosen = tuple(weights) if weights is not None else (declared.default_weight,) * len(sources)
    resolved = resolve_params(declared, params or {}, len(sources))
    blocks = {
        name: list(
            cut_blocks(
                declared,
                Operands(
                    tensors=[source[name] for source in sources],
                    weights=chosen,
                    params=resolved,
                    base=None if base is None else base[name],
                    name=name,
                    shape=tuple(sources[0][name].shape),
                ),
                seed,
                block,
            )
        )
        for name in sources[0]
    }
    if declared.scope(resolved) == "model":
        shared = gather_statistics(declared, [one for parts in blocks.values() for one in parts])
        statistics = dict.fromkeys(blocks, shared)
    else:
        statistics = {name: gather_statistics(declared, parts) for name, parts in blocks.items()}
    merged = {}
    for name, parts in blocks.items():
        pieces = [apply_to_block(declared, replace(part, statistics=statistics[name])) for part in parts]
        stored = sources[0][name] if base is None else base[name]
        merged[name] = torch.cat(pieces).reshape(stored.shape).to(dtype or stored.dtype)
    return merged


def resolve_params(method: Method, params: Mapping[str, Any], sources: int) -> Any:
    """The parameters with one value for each source where the method wants that."""
    opened = {
        name: declared.read(Path(params[name]))[1] if isinstance(params.get(name), str) else params.get(name)
        for name, declared in method.artefact_fields().items()
    }
    resolved = method.params.model_validate({**params, **opened})
    spread = {
        name: (value,) * sources
        for name in method.per_source_fields()
        if not isinstance(value := getattr(resolved, name), tuple)
    }
    return resolved.model_copy(update=spread)


def cut_blocks(method: Method, whole: Operands, seed: int, block: int | None) -> Iterator[Operands]:
    """The tensor cut as the method allows, in the accumulation dtype, random streams attached."""
    given = [*whole.tensors, *([] if whole.base is None else [whole.base])]
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in given) else torch.float32
    access = method.access_with(whole.params)
    arranged = [arrange(tensor.to(dtype), access) for tensor in given]
    unit = math.prod(arranged[0].shape[1:])
    length = arranged[0].shape[0]
    step = length if block is None or access == "tensor" else max(1, block // max(unit, 1))
    for start in range(0, length, step) if length else [0]:
        cut = [tensor[start : start + step] for tensor in arranged]
        sources, base = cut[: len(whole.tensors)], cut[-1] if whole.base is not None else None
        if method.space == "deltas" and base is not None:
            sources = [source - base for source in sources]
        random = RandomStream(seed, whole.name, start * unit, sources[0].numel()) if method.random else None
        yield replace(whole, tensors=sources, base=base, random=random)


def arrange(tensor: torch.Tensor, access: Access) -> torch.Tensor:
    if access in ("elementwise", "two_pass"):
        return tensor.reshape(-1)
    if access == "rows":
        return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1] if tensor.dim() else 1)
    return tensor if tensor.dim() else tensor.reshape(1)


def gather_statistics(method: Method, blocks: Sequence[Operands]) -> Any:
    if method.statistics is None:
        return None
    first = blocks[0]
    extent = Extent(
        sources=len(first.tensors),
        elements=sum(block.tensors[0].numel() for block in blocks),
        weights=tuple(first.weights),
        params=first.params,
    )
    generator = method.statistics(extent)
    try:
        sweep = next(generator)
        while True:
            totals = [sweep(block) for block in blocks]
            assert all(total.dtype in (torch.int64, torch.float64) for total in totals), "sweeps are int64 or float64"
            sweep = generator.send(functools.reduce(torch.add, totals).cpu())
    except StopIteration as finished:
        return finished.value


def apply_to_block(method: Method, block: Operands) -> torch.Tensor:
    merged = method(block)
    return merged + block.base if method.space == "deltas" and block.base is not None else merged
