"""From a file of components and data to a tuned model, an artefact and a report."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergekit_px._version import __version__
from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.destination import Mode
from mergekit_px.checkpoint.fingerprint import fingerprint
from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.task_vector import BASE_KEY, COMPONENTS_KIND, KIND_KEY
from mergekit_px.checkpoint.tensor_file import write_tensors
from mergekit_px.errors import DivergedError, InputError, OutputError
from mergekit_px.execute.lane import pick_device
from mergekit_px.learn.artefact import write_json
from mergekit_px.learn.data import Examples, split_rows
from mergekit_px.learn.data_files import data_sha256, load_data
from mergekit_px.learn.labels import read_labels
from mergekit_px.learn.models import LearningModel, find_checkpoint, load_model
from mergekit_px.learn.output import write_model
from mergekit_px.learn.text_data import NO_TEXT, TextOptions
from mergekit_px.learn.tune.components import Components, read_components
from mergekit_px.learn.tune.substitution import TunedValues
from mergekit_px.learn.tune.training import Progress, Schedule, Tell, Training, evaluate

ARTEFACT = "components.safetensors"
REPORT = "report.json"
MODEL = "model"
_STATE = "state.safetensors"


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """What is trained, on what, and how.

    Attributes:
        top: singular values of each matrix that are trained; None for all.
        core: train a full matrix between the vectors instead of a diagonal.
        match: globs on the matrices that are trained.
        validation, test: shares of the data that are held out, or files.
        text: how rows of text are read.
        factory: ``file.py:function`` that makes the model.
    """

    top: int | None = None
    core: bool = False
    match: tuple[str, ...] = ("*",)
    validation: float | str = 0.2
    test: float | str = 0.2
    schedule: Schedule = field(default_factory=Schedule)
    text: TextOptions = NO_TEXT
    device: str = "auto"
    mode: Mode = "new"
    factory: str | None = None
    allow_code: bool = False
    allow_pickle: bool = False
    allow_base_mismatch: bool = False


def run_tune(
    components_path: str,
    base: str,
    data: str,
    output: Path,
    options: TuneOptions,
    tell: Tell = lambda step, steps, loss: None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Tune, and write ``components.safetensors``, ``report.json`` and the folder ``model`` into ``output``.

    Returns:
        the report: scores of the base, of the components as they came and of the tuned ones, on validation and test.

    Raises:
        UsageError, InputError, PlanError: options, files or a model that do not fit.
        OutputError: the folder is not empty, or there is nothing to resume.
        DivergedError: the loss was not finite; what was best until then has been written.
    """
    components = read_components(components_path)
    checkpoint = find_checkpoint(base, allow_pickle=options.allow_pickle)
    reader = open_reader(checkpoint)
    try:
        base_print = fingerprint(checkpoint, reader)
    finally:
        reader.close()
    if components.base_fingerprint not in (None, base_print) and not options.allow_base_mismatch:
        raise InputError(
            f"the components are of an update of another base than {base}",
            where=components.where,
            hint="give the base that it was taken from, or --allow-base-mismatch",
        )
    device = pick_device(options.device)
    parts = _parts(data, options, checkpoint, note)
    model = load_model(checkpoint, options.factory, allow_code=options.allow_code)
    model.module.to(device).eval().requires_grad_(False)
    read = {part: read_labels(model.module, held, device) for part, held in parts.items()}
    parts = {part: held for part, (held, _) in read.items()}
    reading = read["train"][1]
    identity, inputs = _identity(components, base_print, data, options, device)
    batch, precision = 4 * options.schedule.batch, options.schedule.precision

    def scored(module: nn.Module) -> dict[str, dict[str, float]]:
        return {
            part: evaluate(module, held, batch, device, precision, own_loss=reading.own_loss)
            for part, held in parts.items()
            if part != "train"
        }

    scores = {"base": scored(model.module)}
    values = TunedValues(model, components, top=options.top, core=options.core, match=options.match)
    with torch.no_grad():
        scores["components"] = scored(values.substituted())
    _prepare(output, options.mode)
    state = output / _STATE
    training = Training(
        values,
        parts["train"],
        parts["validation"],
        options.schedule,
        device=device,
        state=state,
        identity=identity,
        own_loss=reading.own_loss,
    )
    progress = training.run(tell)
    artefact = values.artefact()
    values.write()
    scores["tuned"] = scored(model.module)
    report = {
        "components": components_path,
        "base": base,
        "data": data,
        "inputs": inputs,
        "labels": reading.kind,
        "trained_values": values.values.numel(),
        "examples": {part: len(one) for part, one in parts.items()},
        "options": _plain(options),
        "device": str(device),
        "versions": {"pxmerge": __version__, "torch": torch.__version__},
        "steps": progress.step,
        "selected_step": progress.best_step,
        "stopped": progress.stopped,
        "trace": [{"step": step, "loss": loss, "validation": score} for step, loss, score in progress.trace],
        "scores": scores,
    }
    _publish(output, model, artefact, base_print, report, identity)
    _conclude(progress, state, output, note)
    return report


def _conclude(progress: Progress, state: Path, output: Path, note: Callable[[str], None]) -> None:
    state.unlink(missing_ok=True)
    if progress.stopped is not None:
        raise DivergedError(
            f"{progress.stopped}; what was best on validation until then (step {progress.best_step}) is kept",
            where=str(output),
            hint="start over with a lower --rate and --overwrite",
        )
    if progress.best_step == 0:
        note("no step made the validation score better: the components are kept as they came")


def _parts(data: str, options: TuneOptions, model: Checkpoint, note: Callable[[str], None]) -> dict[str, Examples]:
    whole = load_data(data, model, options.text, note)
    given = {"validation": options.validation, "test": options.test}
    shares = {part: share for part, share in given.items() if not isinstance(share, str) and share > 0}
    rows = split_rows(len(whole), shares, options.schedule.seed, data)
    parts = {part: whole.take(numbers) for part, numbers in rows.items()}
    parts |= {part: load_data(path, model, options.text, note) for part, path in given.items() if isinstance(path, str)}
    if "validation" not in parts:
        raise InputError("values are chosen on validation data, and none is left", where=data, hint="--validation 0.2")
    return parts


def _plain(options: TuneOptions) -> dict[str, Any]:
    """The options that change the result."""
    left_out = {"mode", "allow_code", "allow_pickle", "allow_base_mismatch", "device"}
    return {key: value for key, value in asdict(options).items() if key not in left_out}


def _identity(
    components: Components, base_print: str, data: str, options: TuneOptions, device: torch.device
) -> tuple[str, dict[str, str]]:
    """A hash of everything that the result follows from, and the hashes of the inputs."""
    files = [data, *(one for one in (options.validation, options.test) if isinstance(one, str))]
    inputs = {"base_fingerprint": base_print}
    place = Path(components.where).expanduser()
    for file in [*sorted(place.glob("*.safetensors")), *([place] if place.is_file() else [])]:
        inputs[str(file)] = file_sha256(file)
    inputs |= {file: data_sha256(file) for file in files}
    text = json.dumps([inputs, _plain(options), device.type], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest(), inputs


def _prepare(output: Path, mode: str) -> None:
    unfinished = (output / _STATE).exists()
    if output.is_file():
        raise OutputError("the output is a file, not a folder", where=str(output))
    is_free = not output.is_dir() or all(one.name.startswith(_STATE) for one in output.iterdir())
    if mode == "resume":
        if not unfinished and not is_free:
            raise OutputError(
                "there is no unfinished run to resume, and the folder is not empty",
                where=str(output),
                hint="it may be complete already; --overwrite starts over",
            )
        return
    if unfinished or not is_free:
        if mode == "new":
            raise OutputError(
                "the folder holds an unfinished run" if unfinished else "the output folder is not empty",
                where=str(output),
                hint="go on with --resume or start again with --overwrite"
                if unfinished
                else "choose another with -o, or replace it with --overwrite",
            )
        for name in (ARTEFACT, REPORT, _STATE):
            (output / name).unlink(missing_ok=True)
        shutil.rmtree(output / MODEL, ignore_errors=True)


def _publish(
    output: Path,
    model: LearningModel,
    artefact: dict[str, torch.Tensor],
    base_print: str,
    report: dict[str, Any],
    identity: str,
) -> None:
    write_tensors(output / ARTEFACT, artefact, {KIND_KEY: COMPONENTS_KIND, BASE_KEY: base_print})
    write_model(model, output / MODEL, identity)
    write_json(output / REPORT, report)
