"""From two bases and a fine-tune of one to the other with what the fine-tune knows, and its controls.

<output>/task_vector/                the transported task vector, for the target base
<output>/model/                      target base plus task vector
<output>/rotations.safetensors       the matrices, where some were learned
<output>/maps.safetensors            the maps between activations
<output>/signs.safetensors           the signs of gradients
<output>/permutations.safetensors    the permutations, where some were found
<output>/report.json                 settings, hashes, traces, scores of the result and of its controls on test data
<output>/.align/                     states of an unfinished run
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_px.checkpoint.contents import Checkpoint
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
from mergekit_px.learn.align.inputs import (
    artefact_metadata,
    find_checkpoints,
    fingerprints,
    input_hashes,
    plan_hash,
)
from mergekit_px.learn.align.output import write_result
from mergekit_px.learn.align.pieces import Piece, find_pieces
from mergekit_px.learn.align.rebasin import find_rebasin, function_change
from mergekit_px.learn.align.reuse import load_map
from mergekit_px.learn.align.routes import CONTROLS, Deltas, Trial, norm
from mergekit_px.learn.align.settings import AlignOptions
from mergekit_px.learn.align.source import read_deltas
from mergekit_px.learn.artefact import write_json
from mergekit_px.learn.data import Batch, Examples, split_rows, to_device
from mergekit_px.learn.data_files import load_data
from mergekit_px.learn.folder import working_folder
from mergekit_px.learn.labels import find_reading, read_labels
from mergekit_px.learn.models import LearningModel, load_model
from mergekit_px.learn.ofasd.blend import Site, find_sites

UNFINISHED = ".align"
REPORT_FILE = "report.json"

_NO_DATA = "there is no labelled data"


@dataclass(frozen=True)
class AlignedTaskVector:
    """A finished run: its folder, and the report as plain data."""

    output: Path
    report: Mapping[str, Any]


def align_task_vector(
    options: AlignOptions,
    say: Callable[[str], None] = lambda line: None,
    tell: Callable[[int, float], None] = lambda step, loss: None,
) -> AlignedTaskVector:
    """Transport a task vector, and train what it has to be compared with.

    Args:
        say: gets a line for each stage.
        tell: gets number and loss of each step.

    Raises:
        UsageError, InputError, PlanError: what is asked cannot be done.
        DivergedError: a loss was not finite; the result of the best step before it is written.
        KeyboardInterrupt: passed on; mode ``resume`` goes on from the last look at the validation data.
    """
    from mergekit_px.execute.lane import pick_device

    started = time.monotonic()
    options.settings.check()
    _require_data(options)
    device = pick_device(options.device)
    checkpoints = find_checkpoints(options)
    parts = _parts(options, checkpoints["target base"], say)
    prints = fingerprints(checkpoints)
    plan = plan_hash(options, prints, device)
    metadata = artefact_metadata(checkpoints, prints)
    with working_folder(options.output, UNFINISHED, options.mode, {"plan_hash": plan}) as work:
        if parts:
            report = _with_data(options, checkpoints, parts, metadata, device, work, plan, say, tell)
        else:
            report = _without_data(options, checkpoints, metadata, plan, say)
        report = {
            "settings": asdict(options.settings),
            "examples": {part: len(one) for part, one in parts.items()},
            **report,
            "inputs": input_hashes(options, checkpoints),
            "seconds": round(time.monotonic() - started, 3),
        }
        report = json.loads(json.dumps(report))  # plain data, as it will be read back
        write_json(options.output / REPORT_FILE, report)
        for state in work.glob("*.safetensors"):
            state.unlink()
    return AlignedTaskVector(options.output, report)


def _with_data(
    options: AlignOptions,
    checkpoints: Mapping[str, Checkpoint],
    parts: Mapping[str, Examples],
    metadata: Mapping[str, str],
    device: torch.device,
    work: Path,
    plan: str,
    say: Callable[[str], None],
    tell: Callable[[int, float], None],
) -> dict[str, Any]:
    """Transport, train and score."""
    settings = options.settings
    base = checkpoints["target base"]
    model, sites = _prepared(base, options.model, options, device)
    dtype = sites[0].base.dtype
    read = {name: read_labels(model.module, part, device, dtype) for name, part in parts.items()}
    parts = {name: part for name, (part, _) in read.items()}
    reading = read["train"][1]
    if reading.kind == "values":
        raise InputError("the labels are values, not classes", where=options.data, hint="number the classes from 0")
    deltas = read_deltas(checkpoints, device, dtype)
    shapes = {site.name: tuple(site.base.shape) for site in sites}
    fitting = {name: one for name, one in deltas.items() if shapes.get(name) == tuple(one.shape)}
    pieces: list[Piece] = []
    fixed: FixedMap | None = None
    changed = ChangedModel(model, sites, settings.precision)
    if options.maps is not None or settings.route == "permutation":
        first = to_device(next(parts["validation"].batches(settings.batch)), device, dtype)
        exact = ChangedModel(model, sites)  # rounding would hide what permutations change
        fixed = _found_map(options, checkpoints, metadata, say, exact, first)
    elif settings.route == "theseus":
        crossed = _crossed(options, checkpoints["source base"], model, parts["train"], device)
        maps = activation_maps(crossed)
        fixed = FixedMap(partial(theseus, maps=maps), Artefact(MAPS_FILE, maps, metadata), across_shapes=True)
    elif settings.route == "gradfix":
        names = [name for name in fitting if changed.sites[name].is_parameter]
        train = (to_device(batch, device, dtype) for batch in parts["train"].batches(settings.batch))
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
    trial = Trial(changed, settings, parts, pieces, fixed, metadata, device, work, plan, say, tell)

    def keep(moved: Deltas, artefact: Artefact | None) -> None:
        changes = {name: moved[site.name] for site in sites if site.name in moved for name in site.names}
        write_result(options.output, base, changes, settings.scale, artefact, plan)

    outcome = trial.run(deltas, fitting, keep)
    moved = outcome.pop("transported")
    known = {name for site in sites if site.name in moved for name in site.names}
    return {
        "labels": reading.kind,
        "left_out": sorted(name for name in deltas if name not in known),
        **outcome,
        "not_scored": {name: f"--controls {settings.controls}" for name in CONTROLS if name not in outcome["test"]},
        "scales": _scales(trial, fitting, moved),
    }


def _without_data(
    options: AlignOptions,
    checkpoints: Mapping[str, Checkpoint],
    metadata: Mapping[str, str],
    plan: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Transport by arithmetic on files alone; nothing can be scored."""
    base = checkpoints["target base"]
    deltas = read_deltas(checkpoints, torch.device("cpu"), torch.float32)
    fixed = _found_map(options, checkpoints, metadata, say)
    shapes = {name: stored.shape for name, stored in base.tensors.items() if stored.dtype.arithmetic}
    fitting = {name: one for name, one in deltas.items() if shapes.get(name) == tuple(one.shape)}
    if not fixed.across_shapes:
        _require_fitting(fitting)
    moved = fixed.moved(deltas, fitting, shapes)
    write_result(options.output, base, moved, options.settings.scale, fixed.artefact, plan)
    return {
        "left_out": sorted(deltas.keys() - moved.keys()),
        "norm": {"before": norm(deltas), "after": norm(moved)},
        **fixed.report,
        "test": {},
        "not_scored": dict.fromkeys((*CONTROLS, *fixed.controls), _NO_DATA),
        "scales": [],
    }


def _found_map(
    options: AlignOptions,
    checkpoints: Mapping[str, Checkpoint],
    metadata: Mapping[str, str],
    say: Callable[[str], None],
    model: ChangedModel | None = None,
    batch: Batch | None = None,
) -> FixedMap:
    """Of a former run, or permutations that are found now; these are tried on the target where it can run."""
    if options.maps is not None:
        return load_map(options.maps, metadata)
    say("matching the bases")
    found = find_rebasin(checkpoints["source base"], checkpoints["target base"], options.settings, metadata, say)
    if model is None or batch is None:
        return found.map
    change = function_change(found.permutations, model, batch)
    return replace(found.map, report={"permutations": {**found.map.report["permutations"], "function_change": change}})


def _require_data(options: AlignOptions) -> None:
    needless = options.settings.route == "permutation" or options.maps is not None
    if options.data is None and not needless:
        raise UsageError(
            f"the route {options.settings.route} needs labelled examples",
            hint="give them with --data; --route permutation needs none",
        )
    if options.data is None and options.test_data is not None:
        raise UsageError("test data goes with --data: the controls are trained on it")


def _require_fitting(fitting: Deltas) -> None:
    if not fitting:
        raise InputError("no tensor of the task vector has the name and shape of one of the target's")


def _prepared(
    checkpoint: Checkpoint, code: str | None, options: AlignOptions, device: torch.device
) -> tuple[LearningModel, list[Site]]:
    model = load_model(checkpoint, code, allow_code=options.allow_code)
    model.module.to(device).eval().requires_grad_(False)
    return model, find_sites(model)


def _parts(options: AlignOptions, model: Checkpoint, say: Callable[[str], None]) -> dict[str, Examples]:
    """``train``, ``validation`` and ``test``; nothing without data."""
    if options.data is None:
        return {}
    data, settings = load_data(options.data, model, options.text, say), options.settings
    shares = {"validation": settings.validation}
    if options.test_data is None:
        shares["test"] = settings.test
    parts = {name: data.take(rows) for name, rows in split_rows(len(data), shares, settings.seed, data.where).items()}
    if options.test_data is not None:
        parts["test"] = load_data(options.test_data, model, options.text, say)
    return parts


def _crossed(
    options: AlignOptions, base: Checkpoint, target: LearningModel, train: Examples, device: torch.device
) -> Crossed:
    source, sites = _prepared(base, options.source_code or options.model, options, device)

    def batches() -> list[Batch]:
        return [to_device(batch, device, sites[0].base.dtype) for batch in train.batches(options.settings.batch)]

    find_reading(source.module, dict(train.arrays), train.where, device, sites[0].base.dtype)
    return crossed_activations(source, target, batches(), options.settings.precision)


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
