"""Merges of checkpoints by one call, and recipes in any form, for programs and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_px.errors import UsageError
from mergekit_px.located.nearest import hint_for, nearest
from mergekit_px.methods import find_method
from mergekit_px.python_values import given_path, given_paths

if TYPE_CHECKING:
    from mergekit_px.checkpoint.destination import Mode
    from mergekit_px.execute.events import Progress, RunResult
    from mergekit_px.plan.model import Plan
    from mergekit_px.recipe.loaded import LoadedRecipe

Reference = str | PathLike[str]
"""A folder, a ``.safetensors`` file, ``org/name`` or ``org/name@revision``."""


def merge(
    sources: Sequence[Reference] | Mapping[str, Reference],
    method: str = "linear",
    *,
    base: Reference | None = None,
    weights: Sequence[float | Sequence[float]] | Mapping[str, Any] | None = None,
    output: Reference = "merged",
    rules: Sequence[Mapping[str, Any]] = (),
    like: str | None = None,
    missing: str = "error",
    vocabulary: str = "error",
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    shard_size: str | None = None,
    device: str = "auto",
    memory: str | int | None = None,
    threads: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    **params: Any,
) -> RunResult:
    """Merge checkpoints into a new one, as ``pxmerge METHOD`` does.

        px.merge(["a", "b"], "ties", base="base", weights=[0.6, 0.4], density=0.3, output="merged")

    Args:
        sources: the models, in order or by name.
        method: a merge method's name.
        base: the model that the sources were fine-tuned from; ``"mean"`` for the mean of the sources.
        weights: one for each source, in order or by name; a list of numbers is interpolated over the layers.
        output: a folder, or one ``.safetensors`` file.
        rules: as in a recipe: mappings with ``match``, ``layers``, ``method``, ``params``, ``take``, ``drop``.
        like: another implementation's variant, ``mergekit`` or ``peft``.
        missing: what to do with tensors that only some have: ``error``, ``present`` or ``base``.
        vocabulary: embeddings of different length: ``error`` or ``truncate``.
        seed: of methods that draw random numbers.
        progress: called from worker threads, a few times a second at most.
        dtype: storage type of the result, as ``bfloat16``.
        quantize: ``keep`` stores quantised what the base or first source stores so.
        shard_size: largest file of the result, as ``5GB``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        memory: peak memory of the process, as ``4GB`` or in bytes.
        threads: number of workers; the result does not depend on it.
        resume: go on with an interrupted merge in ``output``.
        overwrite: replace a merge of before.
        strict: refuse sources whose configs disagree in what the weights mean.
        allow_pickle: read ``.bin`` and ``.pt`` files too.
        allow_nonfinite: let NaN and infinity in the inputs through.
        params: the method's own parameters.

    Raises:
        UsageError, RecipeError, InputError, PlanError, RunError: see :mod:`mergekit_px.errors`.
    """
    _check_names(method, params)
    recipe = _single_step(sources, method, base, weights, params)
    step = recipe["merge"]
    step |= {"rules": [dict(rule) for rule in rules], "missing": missing, "vocabulary": vocabulary}
    if like is not None:
        step["like"] = like
    return run_recipe(
        {**recipe, "seed": seed, "output": {"quantize": quantize}},
        output=output,
        progress=progress,
        dtype=dtype,
        shard_size=shard_size,
        device=device,
        memory=memory,
        threads=threads,
        resume=resume,
        overwrite=overwrite,
        strict=strict,
        allow_pickle=allow_pickle,
        allow_nonfinite=allow_nonfinite,
    )


def run_recipe(
    recipe: Reference | Mapping[str, Any] | LoadedRecipe,
    *,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> RunResult:
    """Plan a recipe and carry it out, as ``pxmerge run`` does.

    Args:
        recipe: a file, a mapping of the same form, or what :func:`load_recipe` gave.
        progress: called from worker threads, a few times a second at most.
        options: ``output``, ``dtype``, ``shard_size``, ``device``, ``memory``, ``threads``, ``resume``, ``overwrite``,
            ``strict``, ``allow_pickle``, ``allow_nonfinite``, as those of :func:`merge`.

    Raises:
        UsageError, RecipeError, InputError, PlanError, RunError: see :mod:`mergekit_px.errors`.
    """
    from mergekit_px.execute.run import run_plan
    from mergekit_px.execute.store_output import run_to_store

    plan = plan_recipe(recipe, **options)
    return (run_plan if plan.store is None else run_to_store)(plan, progress=progress)


def plan_recipe(recipe: Reference | Mapping[str, Any] | LoadedRecipe, **options: Any) -> Plan:
    """Everything that a merge would do; no weight is read. See :func:`run_recipe`.

    Raises:
        UsageError, RecipeError, InputError, PlanError: see :mod:`mergekit_px.errors`.
    """
    from mergekit_px.checkpoint.layout import parse_size
    from mergekit_px.plan.build import build_plan
    from mergekit_px.plan.options import PlanOptions

    resume, overwrite = options.pop("resume", False), options.pop("overwrite", False)
    if resume and overwrite:
        raise UsageError("resume keeps what is there and overwrite removes it", hint="give one of them")
    mode: Mode = "resume" if resume else "overwrite" if overwrite else "new"
    if options.get("output") is not None:
        options["output"] = Path(given_path(options["output"], "output"))
    if isinstance(options.get("memory"), str):
        options["memory"] = parse_size(options["memory"], "memory")
    if unknown := sorted(options.keys() - set(PlanOptions.__slots__)):
        raise UsageError(f"there is no option '{unknown[0]}'", hint=hint_for(unknown[0], PlanOptions.__slots__))
    return build_plan(as_recipe(recipe), PlanOptions(mode=mode, **options))


def as_recipe(recipe: Reference | Mapping[str, Any] | LoadedRecipe) -> LoadedRecipe:
    """A recipe from a file's name, from a mapping of the same form, or as it was loaded.

    Raises:
        RecipeError: it is invalid.
        UsageError: it is something else.
    """
    from mergekit_px.plan.method_catalog import method_catalog
    from mergekit_px.recipe.load import load_recipe, recipe_from_mapping
    from mergekit_px.recipe.loaded import LoadedRecipe

    if isinstance(recipe, LoadedRecipe):
        return recipe
    if isinstance(recipe, Mapping):
        return recipe_from_mapping(recipe, methods=method_catalog())
    if isinstance(recipe, (str, PathLike)):
        return load_recipe(fspath(recipe), methods=method_catalog())
    raise UsageError(f"a recipe is a file, a mapping or a loaded recipe, not {type(recipe).__name__}")


def _check_names(method: str, params: Mapping[str, Any]) -> None:
    """Raise ``UsageError`` for a slip in the name of an argument, which the method would be given for a parameter."""
    own = find_method(method).params.model_fields
    arguments = [name for name in signature(merge).parameters if name != "params"]
    for name in params.keys() - own.keys():
        if (near := nearest(name, [*own, *arguments])) in arguments:
            raise UsageError(f"merge has no argument '{name}'", hint=f"did you mean '{near}'?")


def _single_step(
    sources: Sequence[Reference] | Mapping[str, Reference],
    method: str,
    base: Reference | None,
    weights: Sequence[Any] | Mapping[str, Any] | None,
    params: Mapping[str, Any],
) -> dict[str, Any]:
    """A recipe of one step."""
    from mergekit_px.recipe.naming import model_names, named_weights

    texts = given_paths(list(sources.values()) if isinstance(sources, Mapping) else sources, "sources")
    if base is not None:
        base = given_path(base)
    names = list(sources) if isinstance(sources, Mapping) else model_names(texts)
    models = dict(zip(names, texts, strict=True))
    step: dict[str, Any] = {"method": method, "sources": names, "params": dict(params)}
    if weights is not None:
        step["sources"] = named_weights(weights, names)
    if base is not None and base == "mean":
        step["base"] = "mean"
    elif base is not None:
        name = model_names([base], taken=names)[0]
        models = {name: base, **models}
        step["base"] = name
    return {"pxmerge": 1, "models": models, "merge": step}
