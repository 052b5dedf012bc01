"""From two bases, a fine-tune of one and a few examples to the other with what the fine-tune knows, and its controls.

<output>/task_vector/            the transported task vector, for the target base
<output>/model/                  target base plus task vector
<output>/rotations.safetensors   the matrices, where some were learned
<output>/report.json             settings, hashes, traces, scores of the result and of its controls on test data
<output>/.align/                 states of an unfinished run
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.fingerprint import fingerprint
from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.errors import InputError, UsageError
from mergekit_px.learn.align.direct import Crossed, crossed_activations
from mergekit_px.learn.align.forward import ChangedModel
from mergekit_px.learn.align.output import write_result
from mergekit_px.learn.align.pieces import Piece, find_pieces
from mergekit_px.learn.align.routes import Trial
from mergekit_px.learn.align.settings import AlignSettings
from mergekit_px.learn.align.source import read_deltas
from mergekit_px.learn.data import Batch, Examples, load_examples, split_rows, to_device
from mergekit_px.learn.models import LearningModel, find_checkpoint, load_model
from mergekit_px.learn.ofasd.blend import Site, find_sites
from mergekit_px.learn.ofasd.folder import Mode, working_folder, write_json
from mergekit_px.learn.ofasd.proxy import check_data

UNFINISHED = ".align"
REPORT_FILE = "report.json"

_HASH_VERSION = 1
_SCALES = tuple(step / 4 for step in range(9))


@dataclass(frozen=True)
class AlignOptions:
    """What is transported from where to where.

    Attributes:
        target_base: the model that receives; path or Hub reference.
        data: labelled examples of the task, npz or safetensors.
        source_base: the model that the task vector was taken from; may be left out with ``task_vector``, unless
            activations are compared.
        source_model: the fine-tune of the source base; or else:
        task_vector: a file of differences.
        test_data: examples for the scores of the report; None for a share of ``data``.
        model: ``file.py:function`` of the target; None for the class that its config names.
        source_code: the same of the source, where it differs.
    """

    target_base: str
    data: str
    source_base: str | None = None
    source_model: str | None = None
    task_vector: str | None = None
    output: Path = Path("aligned")
    test_data: str | None = None
    model: str | None = None
    source_code: str | None = None
    settings: AlignSettings = field(default_factory=AlignSettings)
    device: str = "auto"
    mode: Mode = "new"
    allow_code: bool = False
    allow_pickle: bool = False


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
        RunError: a loss was not finite; the result of the best step before it is written.
        KeyboardInterrupt: passed on; mode ``resume`` goes on from the last look at the validation data.
    """
    from mergekit_px.execute.lane import pick_device

    started = time.monotonic()
    settings = options.settings
    settings.check()
    device = pick_device(options.device)
    checkpoints = _checkpoints(options)
    parts = _parts(options)
    plan_hash = _plan_hash(options, checkpoints, device)
    with working_folder(options.output, UNFINISHED, options.mode, plan_hash) as work:
        model, sites = _prepared(checkpoints["target base"], options.model, options, device)
        dtype = sites[0].base.dtype
        for part in parts.values():
            check_data(model.module, part, labelled=True, device=device, dtype=dtype)
        deltas = read_deltas(checkpoints, device, dtype)
        shapes = {site.name: tuple(site.base.shape) for site in sites}
        pieces: list[Piece] = []
        crossed: Crossed | None = None
        if settings.route == "theseus":
            crossed = _crossed(options, checkpoints["source base"], model, parts["train"], device)
        elif settings.route == "orthogonal":
            pieces = find_pieces(model, sites, settings.sites, square=settings.sided == "one")
        fitting = {name: one for name, one in deltas.items() if shapes.get(name) == tuple(one.shape)}
        if crossed is None and not fitting:
            raise InputError("no tensor of the task vector has the name and shape of one of the target's")
        if settings.route == "orthogonal" and not any(piece.tensor in fitting for piece in pieces):
            raise UsageError(
                "there is no matrix to rotate",
                hint="take all linear layers (--sites all), or two matrices for each (--sided two)",
            )
        trial = Trial(
            ChangedModel(model, sites), settings, parts, pieces, crossed, shapes, device, work, plan_hash, say, tell
        )
        outcome = trial.run(
            deltas,
            fitting,
            keep=lambda moved, rotations: write_result(options, model, sites, moved, rotations, plan_hash),
        )
        report: dict[str, Any] = {
            "settings": asdict(settings),
            "examples": {part: len(one) for part, one in parts.items()},
            "left_out": sorted(name for name in deltas if name not in outcome["transported"]),
            **{name: value for name, value in outcome.items() if name != "transported"},
            "scales": _scales(trial, fitting, outcome["transported"]),
            "inputs": _inputs(options, checkpoints),
            "seconds": round(time.monotonic() - started, 3),
        }
        report = json.loads(json.dumps(report))  # plain data, as it will be read back
        write_json(options.output / REPORT_FILE, report)
        for state in work.glob("*.safetensors"):
            state.unlink()
    return AlignedTaskVector(options.output, report)


def _checkpoints(options: AlignOptions) -> dict[str, Checkpoint]:
    """The inputs by their part in the matter. Raises ``UsageError`` where they do not make a task vector."""
    if (options.source_model is None) == (options.task_vector is None):
        raise UsageError("either a source model or a task vector is transported", hint="give one of them")
    needs_base = options.source_model is not None or options.settings.route == "theseus"
    if needs_base and options.source_base is None:
        raise UsageError("the source base is needed: the model that the fine-tune began with")
    named = {
        "target base": options.target_base,
        "source base": options.source_base,
        "source model": options.source_model,
        "task vector": options.task_vector,
    }
    return {
        part: find_checkpoint(reference, allow_pickle=options.allow_pickle)
        for part, reference in named.items()
        if reference is not None
    }


def _prepared(
    checkpoint: Checkpoint, code: str | None, options: AlignOptions, device: torch.device
) -> tuple[LearningModel, list[Site]]:
    model = load_model(checkpoint, code, allow_code=options.allow_code)
    model.module.to(device).eval().requires_grad_(False)
    return model, find_sites(model)


def _parts(options: AlignOptions) -> dict[str, Examples]:
    """``train``, ``validation`` and ``test``."""
    data, settings = load_examples(options.data), options.settings
    shares = {"validation": settings.validation}
    if options.test_data is None:
        shares["test"] = settings.test
    parts = {name: data.take(rows) for name, rows in split_rows(len(data), shares, settings.seed, data.where).items()}
    if options.test_data is not None:
        parts["test"] = load_examples(options.test_data)
    return parts


def _crossed(
    options: AlignOptions, base: Checkpoint, target: LearningModel, train: Examples, device: torch.device
) -> Crossed:
    source, sites = _prepared(base, options.source_code or options.model, options, device)

    def batches() -> list[Batch]:
        return [to_device(batch, device, sites[0].base.dtype) for batch in train.batches(options.settings.batch)]

    check_data(source.module, train, labelled=True, device=device, dtype=sites[0].base.dtype)
    return crossed_activations(source, target, batches())


def _scales(trial: Trial, naive: Mapping[str, Tensor], moved: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """Accuracy on the validation data for a grid of scales."""
    return [
        {
            "scale": scale,
            "naive": trial.model.accuracy(naive, trial.batches("validation"), scale),
            "aligned": trial.model.accuracy(moved, trial.batches("validation"), scale),
        }
        for scale in _SCALES
    ]


def _plan_hash(options: AlignOptions, checkpoints: Mapping[str, Checkpoint], device: torch.device) -> str:
    """Names all that the result depends on, so that a run goes on only with the same."""
    prints = {}
    for part, checkpoint in checkpoints.items():
        with closing(open_reader(checkpoint)) as reader:
            prints[part] = fingerprint(checkpoint, reader)
    document = {
        "version": _HASH_VERSION,
        "settings": asdict(options.settings),
        "models": prints,
        "files": _file_hashes(options),
        "device": device.type,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _file_hashes(options: AlignOptions) -> dict[str, str]:
    """sha256 of the data and of the code that makes the models."""
    code = [one.rpartition(":")[0] for one in (options.model, options.source_code) if one is not None]
    named = [options.data, *code, *([options.test_data] if options.test_data is not None else [])]
    paths = {path: Path(path).expanduser() for path in named}
    return {path: file_sha256(file) for path, file in sorted(paths.items()) if file.is_file()}


def _inputs(options: AlignOptions, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """sha256 of every file that was read, by input."""
    found: dict[str, Any] = {"files": _file_hashes(options)}
    for part, checkpoint in checkpoints.items():
        hashes = {}
        if checkpoint.directory is not None:
            hashes = {file: file_sha256(checkpoint.directory / file) for file in checkpoint.files}
        found[part] = {"reference": checkpoint.label, "files": hashes}
    return found
