"""Several adapters into one, module by module: updates in, merged in some coordinates, factors of one rank out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_px.adapters.adapter import Adapter
from mergekit_px.adapters.binder import BindOptions
from mergekit_px.adapters.lora_modules import LoraModule
from mergekit_px.adapters.merge_options import MergeOptions
from mergekit_px.adapters.merge_spaces import (
    Space,
    calibrated,
    compressed_space,
    core_space,
    dense_space,
    isotropic,
    knots_space,
    robust_merge,
)
from mergekit_px.adapters.mergers import TRIMMING, Cutter, MergeInput, find_merger
from mergekit_px.adapters.save import Format, save_diffusers, save_kohya, save_peft
from mergekit_px.adapters.updates import Update, UpdateSource, open_updates
from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.task_vector import common_description
from mergekit_px.errors import AdapterError, NonFiniteError, TensorMismatchError, UsageError

if TYPE_CHECKING:
    import torch

    from mergekit_px.kernels.low_rank import LowRank
    from mergekit_px.kernels.svd import SVD


_BASE_VERSION = "ss_base_model_version"
"""In the header of files of kohya's trainers."""


@dataclass(frozen=True)
class MergeReport:
    """What became of one module.

    Attributes:
        captured_energy: share of the merged update's squared norm that the written rank holds.
        norm: Frobenius norm of what is written.
        cosines: of what is written with each adapter's update; 0 for an adapter that leaves the module alone.
    """

    name: str
    rank: int
    captured_energy: float
    norm: float
    cosines: tuple[float, ...]


@dataclass(frozen=True)
class MergedAdapter:
    """One adapter made of several, ready to be saved or applied."""

    modules: list[LoraModule]
    reports: list[MergeReport]
    base_models: tuple[str, ...]
    """What the adapters call their bases, each once; with kohya's trainers a version of a family of models."""
    base_model_name: str | None
    """The base, where the adapters agree."""
    task_types: tuple[str, ...]
    """What they were trained for, each once."""
    fan_in_fan_out: bool = False
    described: Mapping[str, str] = field(default_factory=dict)
    """What the headers of the adapters say alike of the model that they are for."""

    @property
    def captured_energy(self) -> float:
        """Share of the squared norm of all merged updates that is kept."""
        whole = sum(report.norm**2 / max(report.captured_energy, 1e-300) for report in self.reports)
        return sum(report.norm**2 for report in self.reports) / whole if whole else 1.0

    def save(self, path: Path, *, to: Format = "peft", overwrite: bool = False) -> None:
        """Write a PEFT folder, or one file. Raises as save_peft, save_kohya and save_diffusers."""
        if to != "peft":
            save = save_kohya if to == "kohya" else save_diffusers
            save(path, self.modules, described=self.described, overwrite=overwrite)
            return
        fields: dict[str, Any] = {"task_type": self.task_types[0]} if len(self.task_types) == 1 else {}
        save_peft(
            path,
            self.modules,
            base_model_name=self.base_model_name,
            fan_in_fan_out=self.fan_in_fan_out,
            fields=fields,
            overwrite=overwrite,
        )


def merge_adapters(
    adapters: Sequence[Adapter],
    options: MergeOptions | None = None,
    *,
    base: Checkpoint | None = None,
    binding: BindOptions | None = None,
) -> MergedAdapter:
    """Merge adapters; the factors of few modules at a time are held beside the result. Modules are independent, and
    each is the work of one core, except where dW itself is formed: those large matrices are the work of all.

    Args:
        base: needed where an update depends on the base (DoRA, OFT, ...), or where an adapter's names are looked up
            in it. Without it, modules are matched by their names in the adapters.
        binding: choices that the adapters' files leave open.

    Raises:
        UsageError: weights for another number of adapters.
        AdapterError: an adapter that cannot be merged, with the reason; adapters that share no module by name, and
            no base says that they are meant.
        TensorMismatchError: a module whose shapes differ between adapters.
        NonFiniteError: a NaN or an infinity in a factor, of an adapter or of the result in its dtype.
    """
    options = options or MergeOptions()
    weights = _weights(options, len(adapters))
    sources = [open_updates(adapter, base, binding or BindOptions()) for adapter in adapters]
    try:
        names = list(dict.fromkeys(name for source in sources for name in source.names))
        if base is None and len(sources) > 1 and not any(_is_shared(name, sources) for name in names):
            raise AdapterError(
                "the adapters share no module",
                where=", ".join(adapter.label for adapter in adapters),
                hint="give the base model with --base, which says whether their names mean the same",
            )
        cuts = _model_cuts(sources, names, options) if _needs_cuts(options) and options.trims_model else None
        merged = _each(lambda name: _merge_module(name, sources, weights, cuts, options), names, options)
    finally:
        for source in sources:
            source.close()
    named = [adapter.base_model_name for adapter in adapters]
    versions = [adapter.checkpoint.metadata.get(_BASE_VERSION) for adapter in adapters]
    bases = dict.fromkeys(name or version for name, version in zip(named, versions, strict=True) if name or version)
    tasks = [adapter.config.values.get("task_type") for adapter in adapters]
    return MergedAdapter(
        [module for module, _ in merged],
        [report for _, report in merged],
        tuple(map(str, bases)),
        next(filter(None, named), None) if len(bases) == 1 else None,
        tuple(dict.fromkeys(task for task in tasks if isinstance(task, str))),
        any(adapter.config.flag("fan_in_fan_out") for adapter in adapters),
        common_description([adapter.checkpoint.metadata for adapter in adapters]),
    )


def common_format(adapters: Sequence[Adapter]) -> Format:
    """The format that adapters are merged into: their own, or a PEFT folder where they differ or name no component."""
    kinds = {adapter.kind for adapter in adapters}
    placed = all(module.component for adapter in adapters for module in adapter.keys.modules.values())
    if placed and kinds == {"KOHYA"}:
        return "kohya"
    return "diffusers" if placed and kinds == {"DIFFUSERS"} else "peft"


def _is_shared(name: str, sources: Sequence[UpdateSource]) -> bool:
    return sum(name in source.names for source in sources) > 1


def _each(
    work: Callable[[str], tuple[LoraModule, MergeReport]], names: Sequence[str], options: MergeOptions
) -> list[tuple[LoraModule, MergeReport]]:
    from mergekit_px.kernels.workers import workers

    if options.forms_updates:
        return [work(name) for name in names]
    with workers() as pool:
        return list(pool.map(work, names))


def _merge_module(
    name: str,
    sources: Sequence[UpdateSource],
    weights: Sequence[float],
    cuts: Sequence[float] | None,
    options: MergeOptions,
) -> tuple[LoraModule, MergeReport]:
    updates = _updates(name, sources)
    present = [index for index, update in enumerate(updates) if update is not None]
    found = [update for update in updates if update is not None]
    terms = [update.matrix for update in found]
    own = [weights[index] for index in present]
    if cuts is not None:
        cuts = [cuts[index] for index in present]
    rank = options.rank or max(update.rank for update in found)
    merged = _combined(name, found, own, cuts, rank, options)
    if options.calibrate:
        merged = _with_norm(merged, sum(term.norm() for term in terms) / len(terms))
    factors, energy = _truncated(merged, rank, options)
    if options.scale != 1.0:
        factors = factors.scaled(options.scale)
    module = found[0].module(factors, found[0].dtype if options.dtype is None else _dtype(options.dtype))
    _require_finite(f"{name}, merged", "write it in a wider type by --dtype", module.a, module.b)
    norm, cosines = factors.norm(), [0.0] * len(sources)
    for index, term in zip(present, terms, strict=True):
        size = norm * math.sqrt(max(term.inner(term), 0.0))
        cosines[index] = factors.inner(term) / size if size > 0 else 0.0
    return module, MergeReport(module.name, module.rank, energy, norm, tuple(cosines))


def _updates(name: str, sources: Sequence[UpdateSource]) -> list[Update | None]:
    updates = [source.load(name) if name in source.names else None for source in sources]
    for update, source in zip(updates, sources, strict=True):
        if update is not None:
            hint = "repair the adapter, or leave it out"
            _require_finite(f"{source.adapter.label}: {name}", hint, update.matrix.left, update.matrix.right)
    shapes = {update.shape: source.adapter.label for update, source in zip(updates, sources, strict=True) if update}
    if len(shapes) > 1:
        (one, first), (other, second) = list(shapes.items())[:2]
        raise TensorMismatchError(f"{name} is {list(one)} in {first} and {list(other)} in {second}")
    return updates


def _require_finite(where: str, hint: str, *factors: torch.Tensor) -> None:
    import torch

    if not all(bool(torch.isfinite(factor).all()) for factor in factors):
        raise NonFiniteError("a factor holds NaN or infinity", where=where, hint=hint)


def _combined(
    name: str,
    found: Sequence[Update],
    weights: Sequence[float],
    cuts: Sequence[float] | None,
    rank: int,
    options: MergeOptions,
) -> torch.Tensor | LowRank:
    from mergekit_px.kernels.low_rank import concatenate

    terms = [update.matrix for update in found]
    if options.method == "robust":
        if len({update.rank for update in found}) > 1:
            raise UsageError("robust adds factors, so it needs equal ranks", where=name, hint="use another method")
        return robust_merge([(term.left, term.right.T) for term in terms], weights)
    if options.calibrate:
        terms = calibrated(terms)
    if options.method in ("linear", "cat", "svd"):
        return concatenate([term.scaled(weight) for term, weight in zip(terms, weights, strict=True)])
    space = _space(terms, rank, options)
    merger = find_merger(options.rule)
    given = MergeInput(
        matrices=space.coordinates,
        weights=weights,
        cuts=cuts if cuts is not None else _tensor_cuts(space, options),
        # with a base or without, whose name for the module may differ, random rules draw the same
        name=found[0].name,
        seed=options.seed,
        density=options.kept_share,
        divide_by=options.divide_by,
    )
    merged = merger(given)
    return space.rebuild(isotropic(merged) if options.isotropic and options.method == "core" else merged)


def _space(terms: Sequence[LowRank], rank: int, options: MergeOptions) -> Space:
    if options.method == "knots":
        return knots_space(terms)
    if options.method == "core":
        return core_space(terms)
    if options.method == "ctm":
        return compressed_space(terms, rank, options.balance)
    return dense_space(terms)


def _truncated(merged: torch.Tensor | LowRank, rank: int, options: MergeOptions) -> tuple[LowRank, float]:
    """The factors that are written, balanced between the two, and the share of the energy they hold."""
    from mergekit_px.kernels.low_rank import LowRank
    from mergekit_px.kernels.svd import truncated_svd

    if isinstance(merged, LowRank):
        if options.method in ("cat", "robust") and options.rank is None:
            return merged, 1.0
        found = merged.svd(None if options.method == "linear" and options.rank is None else rank)
    else:
        found = truncated_svd(merged, rank)
    return _balanced(found), found.captured_energy


def _balanced(found: SVD) -> LowRank:
    from mergekit_px.kernels.low_rank import LowRank

    if not found.rank:
        # an update of zero still needs a factor to be written
        return LowRank(found.u.new_zeros((found.u.shape[0], 1)), found.v.new_zeros((found.v.shape[0], 1)))
    root = found.s.sqrt()
    return LowRank(found.u * root, found.v * root)


def _with_norm(merged: torch.Tensor | LowRank, wanted: float) -> torch.Tensor | LowRank:
    from mergekit_px.kernels.low_rank import LowRank

    norm = merged.norm() if isinstance(merged, LowRank) else float(merged.norm())
    if norm == 0:
        return merged
    return merged.scaled(wanted / norm) if isinstance(merged, LowRank) else merged * (wanted / norm)


def _needs_cuts(options: MergeOptions) -> bool:
    return options.method not in ("linear", "cat", "svd", "robust") and options.rule in TRIMMING


def _tensor_cuts(space: Space, options: MergeOptions) -> list[float]:
    """The cut of each adapter within one module."""
    if not _needs_cuts(options):
        return [0.0] * len(space.coordinates)
    cutters = [Cutter(matrix.numel(), options.kept_share) for matrix in space.coordinates]
    while not all(cutter.done for cutter in cutters):
        for cutter, matrix in zip(cutters, space.coordinates, strict=True):
            cutter.see(matrix)
        for cutter in cutters:
            cutter.step()
    return [cutter.cut for cutter in cutters]


def _model_cuts(sources: Sequence[UpdateSource], names: Sequence[str], options: MergeOptions) -> list[float]:
    """The cut of each adapter over all its modules, as TIES is defined. The coordinates are made anew for each
    sweep, so that no more than one module's are held."""
    elements = [0] * len(sources)
    for index, matrix in _coordinates(sources, names, options):
        elements[index] += matrix.numel()
    cutters = [Cutter(count, options.kept_share) for count in elements]
    while not all(cutter.done for cutter in cutters):
        for index, matrix in _coordinates(sources, names, options):
            cutters[index].see(matrix)
        for cutter in cutters:
            cutter.step()
    return [cutter.cut for cutter in cutters]


def _coordinates(
    sources: Sequence[UpdateSource], names: Sequence[str], options: MergeOptions
) -> Iterator[tuple[int, torch.Tensor]]:
    """The matrices that are trimmed, each with the place of its adapter."""
    for name in names:
        updates = _updates(name, sources)
        found = [update for update in updates if update is not None]
        terms = [update.matrix for update in found]
        rank = options.rank or max(update.rank for update in found)
        space = _space(calibrated(terms) if options.calibrate else terms, rank, options)
        present = [index for index, update in enumerate(updates) if update is not None]
        yield from zip(present, space.coordinates, strict=True)


def _weights(options: MergeOptions, count: int) -> list[float]:
    if not count:
        raise UsageError("there is nothing to merge", hint="give at least one adapter")
    weights = list(options.weights) if options.weights is not None else [1.0 / count] * count
    if len(weights) != count or not all(math.isfinite(weight) for weight in weights):
        raise UsageError(f"{len(weights)} weights were given for {count} adapters", hint="give one finite number each")
    return weights


def _dtype(name: str) -> torch.dtype:
    from mergekit_px.checkpoint.dtypes import parse_dtype

    return parse_dtype(name).torch
