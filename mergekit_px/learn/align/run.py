"""From two bases and a fine-tune of one to the other with what the fine-tune knows, and its controls.

<output>/task_vector/                the transported task vector, for the target base
<output>/model/                      target base plus task vector
<output>/rotations.safetensors       the matrices, where some were learned
<output>/maps.safetensors            the maps between activations
<output>/signs.safetensors           the signs of gradients
<output>/permutations.safetensors    the permutations, where some were found
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mergekit_px.checkpoint.task_vector import base_fingerprint
from mergekit_px.errors import InputError, UsageError
from mergekit_px.learn.align.direct import (
    MAPS_FILE,
    SIGNS_FILE,
    Crossed,
    activation_maps,
    crossed_activations,
    gradfix,
    gradient_signs,
    theseus,
)
from mergekit_px.learn.align.fixed import Artefact, FixedMap
from mergekit_px.learn.align.forward import ChangedModel
from mergekit_px.learn.align.output import write_result
from mergekit_px.learn.align.pieces import Piece, find_pieces, matrix_sizes
from mergekit_px.learn.align.rebasin import find_rebasin, function_change
from mergekit_px.learn.align.reuse import SOURCE_KEY, TARGET_KEY, load_map
from mergekit_px.learn.align.rotations import LazyTensors
from mergekit_px.learn.align.routes import CONTROLS, Deltas, Trial, norm
from mergekit_px.learn.align.settings import AlignReport, AlignTask
from mergekit_px.learn.align.source import Differences, open_deltas, task_heads
from mergekit_px.learn.data import TASK, Batch, Examples, split_rows, to_device
from mergekit_px.learn.data_files import load_data
from mergekit_px.learn.labels import find_reading
from mergekit_px.learn.life import Run
from mergekit_px.learn.memory import COMPUTED, floating, is_narrow, narrow_bytes, numbers, plan_memory
from mergekit_px.learn.models import LearningModel
from mergekit_px.learn.ofasd.blend import find_sites

_LEARNED = 5
"""Copies of what is free: itself, what was best, its gradient and two moments."""
_TUNED = _LEARNED + 2
"""The same of a fine-tune, what it begins with, and the random task vector."""
_NO_DATA = "there is no labelled data"


def fit(run: Run[AlignTask]) -> AlignReport:
    """Transport a task vector, and train what it has to be compared with.

    Raises:
        UsageError, InputError, PlanError: what is asked cannot be done.
        DivergedError: a loss was not finite; the result of the best step before it is written.
    """
    if run.settings.data:
        _plan_memory(run)
    tasks = _parts(run) if run.settings.data else []
    metadata = _metadata(run)
    with closing(open_deltas(run)) as deltas:
        return _with_data(run, tasks, deltas, metadata) if tasks else _without_data(run, deltas, metadata)


def _plan_memory(run: Run[AlignTask]) -> None:
    settings, base = run.settings, run.checkpoint("base")
    count = COMPUTED * numbers(floating(base))
    learns = settings.route == "orthogonal" and settings.maps is None
    sizes = matrix_sizes(base, settings.sites, square=settings.sided == "one") if learns else []
    tuned = _TUNED * count if settings.controls == "all" else 0
    kept = {
        "weights": narrow_bytes(base),
        "task vector": 0 if learns else count,
        "matrices": _LEARNED * COMPUTED * sum(size**2 for size in sizes),
        "fine-tune controls": tuned,
    }
    ways = {"use --controls cheap": bool(tuned), "store the base in bfloat16": not is_narrow(base)}
    plan_memory(run, floating(base), kept, ways)


def _metadata(run: Run[AlignTask]) -> dict[str, str]:
    """Which bases matrices or permutations are for; the source is left out where nothing tells it."""
    source = None
    if run.settings.source_base is not None:
        source = run.fingerprint("source_base")
    elif run.settings.task_vector:
        source = base_fingerprint(run.checkpoint("task_vector"))
    return {TARGET_KEY: run.fingerprint("base"), **({SOURCE_KEY: source} if source is not None else {})}


def _with_data(
    run: Run[AlignTask], tasks: Sequence[dict[str, Examples]], deltas: Differences, metadata: Mapping[str, str]
) -> AlignReport:
    """Transport, train and score."""
    settings, base, device = run.settings, run.checkpoint("base"), run.device
    model = run.model(narrow=True)
    sites = find_sites(model)
    dtype = model.dtype
    changed = ChangedModel(model, sites, settings.precision, task_heads(run, {one.name: one.target for one in sites}))
    parts: dict[str, list[Examples]] = {}
    for changed.task, task in enumerate(tasks):
        read, reading = run.labelled(model, task, dtype)
        if reading.kind == "values":
            raise InputError(
                "the labels are values, not classes", where=" ".join(settings.data), hint="number the classes from 0"
            )
        for name, examples in read.items():
            parts.setdefault(name, []).append(examples)
    deltas = deltas.on(device, dtype)
    shapes = {site.name: tuple(site.target.shape) for site in sites}
    fitting = deltas.only([name for name, shape in deltas.shapes.items() if shapes.get(name) == shape])
    pieces: list[Piece] = []
    fixed: FixedMap | None = None
    if settings.maps is not None or settings.route == "permutation":
        first = to_device(next(parts["validation"][0].batches(settings.batch)), device, dtype)
        fixed = _found_map(run, metadata, changed, first)
    elif settings.route == "theseus":
        crossed = _crossed(run, model, parts["train"][0])
        maps = activation_maps(crossed)
        fixed = FixedMap(partial(theseus, maps=maps), Artefact(MAPS_FILE, maps, metadata), across_shapes=True)
    elif settings.route == "gradfix":
        names = [name for name in fitting if changed.sites[name].is_parameter]
        train = (to_device(batch, device, dtype) for part in parts["train"] for batch in part.batches(settings.batch))
        signs = gradient_signs(changed, train, names, majority=settings.majority)
        kept = {name: one.to("cpu", torch.int8) for name, one in signs.items()}
        fixed = FixedMap(partial(gradfix, signs=signs), Artefact(SIGNS_FILE, kept, metadata))
    elif settings.route == "orthogonal":
        pieces = find_pieces(model, sites, settings.sites, square=settings.sided == "one")
    if fixed is None or not fixed.across_shapes:
        _require_fitting(fitting)
    if fixed is None and settings.route == "orthogonal" and not any(piece.tensor in fitting for piece in pieces):
        raise UsageError(
            "there is no matrix to rotate",
            hint="take all linear layers (--sites all), or two matrices for each (--sided two)",
        )
    trial = Trial(run, changed, parts, pieces, fixed, metadata)

    def keep(moved: Deltas, artefact: Artefact | None) -> None:
        changes = {
            name: partial(moved.__getitem__, site.name) for site in sites if site.name in moved for name in site.names
        }
        write_result(run.stage, base, LazyTensors(changes), settings.scale, artefact, run.identity)

    outcome = trial.run(deltas, fitting, keep)
    moved = outcome.pop("transported")
    scored = [("zero-shot", {}), ("naive", fitting), ("aligned", moved)]
    known = {name for site in sites if site.name in moved for name in site.names}
    return AlignReport(
        examples={part: sum(map(len, found)) for part, found in parts.items()},
        labels=reading.kind,
        left_out=sorted(name for name in deltas if name not in known),
        **outcome,
        not_scored={name: f"--controls {settings.controls}" for name in CONTROLS if name not in outcome["test"]},
        scales=_scales(trial, fitting, moved),
        tasks=[
            {name: changed.accuracy(changes, trial.batches("test", number), settings.scale) for name, changes in scored}
            for number in (range(len(tasks)) if len(tasks) > 1 else ())
        ],
    )


def _parts(run: Run[AlignTask]) -> list[dict[str, Examples]]:
    """The parts of the data: of all tasks together, or of each that has a head of its own."""
    settings = run.settings
    if not settings.task_heads:
        return [run.parts()]
    found = []
    shares = {name: float(getattr(settings, name)) for name in ("validation", "test")}
    for number, (path, tuned) in enumerate(zip(settings.data, run.checkpoints("source_model"), strict=True)):
        whole = load_data(path, tuned, settings.text, run.note)
        whole = Examples({**whole.arrays, TASK: torch.full((len(whole),), number)}, whole.where)
        rows = split_rows(len(whole), {name: share for name, share in shares.items() if share}, settings.seed, path)
        found.append({name: whole.take(numbers) for name, numbers in rows.items()})
    return found


def _without_data(run: Run[AlignTask], deltas: Differences, metadata: Mapping[str, str]) -> AlignReport:
    """Transport by arithmetic on files alone; nothing can be scored."""
    base = run.checkpoint("base")
    fixed = _found_map(run, metadata)
    shapes = {name: stored.shape for name, stored in base.tensors.items() if stored.dtype.arithmetic}
    fitting = deltas.only([name for name, shape in deltas.shapes.items() if shapes.get(name) == shape])
    if not fixed.across_shapes:
        _require_fitting(fitting)
    moved = fixed.moved(deltas, fitting, shapes)
    write_result(run.stage, base, moved, run.settings.scale, fixed.artefact, run.identity)
    return AlignReport(
        examples={},
        left_out=sorted(deltas.keys() - moved.keys()),
        norm={"before": norm(deltas), "after": norm(moved)},
        **fixed.report,
        test={},
        not_scored=dict.fromkeys((*CONTROLS, *fixed.controls), _NO_DATA),
        scales=[],
        trace=[],
    )


def _found_map(
    run: Run[AlignTask],
    metadata: Mapping[str, str],
    model: ChangedModel | None = None,
    batch: Batch | None = None,
) -> FixedMap:
    """Of a former run, or permutations that are found now; these are tried on the target where it can run."""
    settings = run.settings
    if settings.maps is not None:
        return load_map(settings.maps, metadata)
    run.note("matching the bases")
    found = find_rebasin(run.checkpoint("source_base"), run.checkpoint("base"), settings, metadata, run.note)
    if model is None or batch is None:
        return found.map
    change = function_change(found.permutations, model, batch)
    return replace(found.map, report={"permutations": {**found.map.report["permutations"], "function_change": change}})


def _require_fitting(fitting: Deltas) -> None:
    if not fitting:
        raise InputError("no tensor of the task vector has the name and shape of one of the target's")


def _crossed(run: Run[AlignTask], target: LearningModel, train: Examples) -> Crossed:
    settings, device = run.settings, run.device
    source = run.model("source_base", "model" if settings.source_code is None else "source_code", narrow=True)
    dtype = source.dtype

    def batches() -> list[Batch]:
        return [to_device(batch, device, dtype) for batch in train.batches(settings.batch)]

    find_reading(source.module, dict(train.arrays), train.where, device, dtype)
    return crossed_activations(source, target, batches(), settings.precision)


def _scales(trial: Trial, naive: Mapping[str, Tensor], moved: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """Accuracy on the validation data for a grid of scales."""
    return [
        {
            "scale": scale,
            "naive": trial.model.accuracy(naive, trial.batches("validation"), scale),
            "aligned": trial.model.accuracy(moved, trial.batches("validation"), scale),
        }
        for scale in (trial.settings.scales if trial.settings.controls != "none" else ())
    ]
