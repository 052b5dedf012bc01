"""Merges of tensors that a program holds already, by the same plan and the same arithmetic as merges of files."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_px.checkpoint.reader import MemoryReader, checkpoint_from_state_dict
from mergekit_px.errors import UsageError

if TYPE_CHECKING:
    import torch

StateDict = Mapping[str, "torch.Tensor"]


def merge_state_dicts(
    sources: Mapping[str, StateDict] | Sequence[StateDict],
    method: str = "linear",
    *,
    base: StateDict | None = None,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    rules: Sequence[Mapping[str, Any]] = (),
    like: str | None = None,
    missing: str = "error",
    dtype: str | torch.dtype | None = None,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    allow_nonfinite: bool = False,
    **params: Any,
) -> dict[str, torch.Tensor]:
    """Merge state dicts in memory.

    Args:
        sources: the models' tensors, by name or in order (then named ``source0``, ``source1``, ...).
        method: a merge method's name.
        base: the base model, for methods on task vectors; left out, the mean of the sources serves.
        weights: one for each source, in order or by name.
        rules: as in a recipe: mappings with ``match``, ``layers``, ``method``, ``params``, ``take``, ``drop``.
        like: another implementation's variant, ``mergekit`` or ``peft``.
        missing: what to do with tensors that only some have: ``error``, ``present`` or ``base``.
        dtype: storage dtype of the result; that of the base or first source if left out.
        device: where to compute.
        threads: number of workers; one per core if left out. The result does not depend on it.
        seed: of methods that draw random numbers.
        allow_nonfinite: let NaN and infinity through.
        params: the method's own parameters, as in a recipe: scalars, lists over depth, or one value for each source.

    Returns:
        new CPU tensors by name, in the order of the base or first source. The inputs are not changed.

    Raises:
        UsageError, RecipeError: a method, parameter or weight that is invalid.
        PlanError: tensors that do not fit one another.
        NonFiniteError: a NaN or infinity in a source or the result.
    """
    from mergekit_px.execute.run import execute
    from mergekit_px.plan.build import build_plan
    from mergekit_px.plan.inputs import ResolvedInput
    from mergekit_px.plan.method_catalog import method_catalog
    from mergekit_px.plan.options import PlanOptions
    from mergekit_px.recipe.load import recipe_from_mapping
    from mergekit_px.recipe.naming import named_weights

    states = list(sources.values()) if isinstance(sources, Mapping) else list(sources)
    for state in (*states, *([] if base is None else [base])):
        if not isinstance(state, Mapping):
            raise UsageError(
                f"a state dict maps names to tensors, and this is {type(state).__name__}",
                hint="merge() merges files; a module gives its tensors by state_dict()",
            )
    named = dict(sources) if isinstance(sources, Mapping) else {f"source{i}": one for i, one in enumerate(sources)}
    models: dict[str, StateDict] = dict(named)
    step: dict[str, Any] = {
        "method": method,
        "sources": named_weights(weights, list(named)) if weights is not None else list(named),
        "params": params,
        "rules": [dict(rule) for rule in rules],
        "missing": missing,
    }
    if like is not None:
        step["like"] = like
    if base is not None:
        if "base" in models:
            raise UsageError("a source may not be called 'base' when a base is given")
        models["base"] = base
        step["base"] = "base"
    recipe = {"pxmerge": 1, "models": {name: name for name in models}, "merge": step, "seed": seed}
    loaded = recipe_from_mapping(recipe, methods=method_catalog())
    inputs = {
        name: ResolvedInput(name, name, checkpoint_from_state_dict(name, state), state=state)
        for name, state in models.items()
    }
    options = PlanOptions(
        dtype=str(dtype).removeprefix("torch.") if dtype is not None else None,
        device=device,
        threads=threads,
        allow_nonfinite=allow_nonfinite,
        hash_inputs=False,
    )
    plan = build_plan(loaded, options, inputs)
    result = _Tensors(plan)
    readers = {name: MemoryReader(state) for name, state in models.items() if name in plan.inputs}
    execute(plan, readers, result, lambda name, count: None)
    order = [name for state in ([base] if base is not None else []) + list(named.values()) for name in state]
    return {name: result.tensors[name] for name in dict.fromkeys(order) if name in result.tensors}


class _Tensors:
    """A sink that fills tensors."""

    def __init__(self, plan: Any) -> None:
        import torch

        self.tensors: dict[str, torch.Tensor] = {}
        self._bytes: dict[str, Any] = {}
        self._lock = threading.Lock()
        for item in plan.items:
            shape = item.shape
            if item.dtype.bits < 8:
                shape = (*shape[:-1], shape[-1] * item.dtype.bits // 8)
            tensor = torch.empty(shape, dtype=item.dtype.torch)
            self.tensors[item.name] = tensor
            self._bytes[item.name] = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else None

    def done(self, name: str, start: int, stop: int) -> bool:
        return False

    def write(self, name: str, start: int, buffer: memoryview) -> None:
        import numpy

        if len(buffer):
            numpy.copyto(self._bytes[name][start : start + len(buffer)], numpy.frombuffer(buffer, dtype=numpy.uint8))


__all__ = ["StateDict", "merge_state_dicts"]
