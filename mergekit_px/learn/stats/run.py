"""From a model and data to a file of statistics, in one go or in several."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_px._version import __version__
from mergekit_px.checkpoint.destination import Mode
from mergekit_px.checkpoint.fingerprint import fingerprint
from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.task_vector import KIND_KEY
from mergekit_px.checkpoint.tensor_file import write_tensors
from mergekit_px.errors import InputError, OutputError
from mergekit_px.execute.lane import pick_device
from mergekit_px.learn.artefact import write_json
from mergekit_px.learn.data import Examples, derived_seed
from mergekit_px.learn.data_files import data_sha256, load_data
from mergekit_px.learn.labels import read_labels
from mergekit_px.learn.models import LearningModel, find_checkpoint, load_model
from mergekit_px.learn.precision import Precision
from mergekit_px.learn.state import load_state, save_state, under
from mergekit_px.learn.stats.fisher import FisherSums, Labels
from mergekit_px.learn.stats.gram import GramSums
from mergekit_px.learn.stats.sums import Tensors, add_up
from mergekit_px.learn.text_data import NO_TEXT, TextOptions
from mergekit_px.methods.fisher import FISHER
from mergekit_px.methods.regmean import GRAM

Kind = Literal["fisher", "gram"]

STATISTICS_KIND = "statistics"
FINGERPRINT_KEY = "pxmerge.model_fingerprint"
SAVE_SECONDS = 30.0
"""States are saved so far apart at least: one is as large as the statistics."""

_WORDS = {"fisher": "Fisher information, examples", "gram": "Gram matrices, examples"}


@dataclass(frozen=True, slots=True)
class StatsOptions:
    """What is measured, and how.

    Attributes:
        kinds: of statistics.
        labels: whose log-likelihood the Fisher information is of: every class by its predicted probability, one class
            drawn from the prediction, or the label of the data (the empirical Fisher information).
        examples: how many are used, drawn by the seed; None for all.
        batch: examples in one forward pass of the Gram matrices. Fisher information goes example by example.
        seed: draws examples and labels.
        precision: of forward passes; sums are float32 and float64.
        text: how rows of text are read.
        factory: ``file.py:function`` that makes the model.
    """

    kinds: tuple[Kind, ...] = ("fisher", "gram")
    labels: Labels = "expected"
    examples: int | None = None
    batch: int = 64
    seed: int = 0
    precision: Precision = "float32"
    text: TextOptions = NO_TEXT
    device: str = "auto"
    mode: Mode = "new"
    factory: str | None = None
    allow_code: bool = False
    allow_pickle: bool = False


def measure(
    reference: str,
    data: str | Path,
    output: Path,
    options: StatsOptions,
    tell: Callable[[str, int, int], None],
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a model and write ``output`` and, beside it, a report with the suffix ``.json``.

    Returns:
        the report.

    Raises:
        UsageError, InputError: options, a model or data that do not fit.
        OutputError: the output is not free, or what an earlier run left there is of other inputs.
        NonFiniteError: a statistic is not finite.
        WriteError: the disk refuses.
        KeyboardInterrupt: passed on; mode ``resume`` goes on from the state that was saved last.
    """
    state = _require_free(output, options.mode)
    device = pick_device(options.device)
    checkpoint = find_checkpoint(reference, allow_pickle=options.allow_pickle)
    model = load_model(checkpoint, options.factory, allow_code=options.allow_code)
    examples = load_data(str(data), checkpoint, options.text, note)
    if options.examples is not None and options.examples < len(examples):
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(derived_seed(options.seed)))
        examples = examples.take(order[: options.examples])
    model.module.to(device).eval()
    examples, reading = read_labels(model.module, examples, device)
    if reading.kind == "values":
        raise InputError("labels are values, and statistics are taken for classes", where=examples.where)
    with closing(open_reader(checkpoint)) as reader:
        model_fingerprint = fingerprint(checkpoint, reader)
    data_hash = data_sha256(str(data))
    said = {key: value for key, value in asdict(options).items() if key != "mode" and not key.startswith("allow")}
    text = json.dumps([model_fingerprint, data_hash, _code_hash(options), said, device.type], sort_keys=True)
    course = _Course(state, hashlib.sha256(text.encode()).hexdigest())
    tensors = _measured(model, examples, options, device, course, tell)
    report = {
        "model": reference,
        "model_fingerprint": model_fingerprint,
        "data": str(data),
        "data_sha256": data_hash,
        "examples": len(examples),
        "labels": reading.kind,
        "device": str(device),
        "versions": {"pxmerge": __version__, "torch": torch.__version__},
        "options": said,
        "fisher_trace": _total(tensors, FISHER.suffix),
        "gram_trace": {
            name.removesuffix(GRAM.suffix): float(tensor.diagonal().double().sum())
            for name, tensor in tensors.items()
            if name.endswith(GRAM.suffix)
        },
        "without": sorted(set(checkpoint.tensors) - set(model.names)),
    }
    write_tensors(output, tensors, {KIND_KEY: STATISTICS_KIND, FINGERPRINT_KEY: model_fingerprint})
    write_json(output.with_suffix(".json"), report)
    state.unlink(missing_ok=True)
    return report


@dataclass
class _Course:
    """How far measuring has come, in the file of its state."""

    state: Path
    plan_hash: str

    def load(self) -> tuple[Tensors, dict[str, int]]:
        """The sums by kind and name, and for each kind the batches that are in them; nothing if no state is there."""
        if not self.state.exists():
            return {}, {}
        tensors, info = load_state(self.state, self.plan_hash)
        return tensors, info["batches"]

    def save(self, sums: Mapping[str, FisherSums | GramSums], batches: Mapping[str, int]) -> None:
        """Replace the state."""
        tensors = {f"{kind}.{name}": one for kind, part in sums.items() for name, one in part.state().items()}
        save_state(self.state, tensors, {"plan_hash": self.plan_hash, "batches": dict(batches)})


def _measured(
    model: LearningModel,
    examples: Examples,
    options: StatsOptions,
    device: torch.device,
    course: _Course,
    tell: Callable[[str, int, int], None],
) -> Tensors:
    """All statistics, by name with the suffix of their kind."""
    saved, batches = course.load()
    sums: dict[str, FisherSums | GramSums] = {}
    last = time.monotonic()
    for kind in options.kinds:
        fresh = _sums(kind, model, options, device)
        if kind in batches:
            fresh.restore(under(saved, f"{kind}."))
        sums[kind] = fresh

        def after(done: int, kind: Kind = kind) -> None:
            nonlocal last
            batches[kind] = done
            if time.monotonic() - last >= SAVE_SECONDS:
                course.save(sums, batches)
                last = time.monotonic()

        def told(done: int, total: int, kind: Kind = kind) -> None:
            tell(_WORDS[kind], done, total)

        add_up(fresh, examples, told, first=batches.get(kind, 0), after=after)
    tensors: Tensors = {}
    for part in sums.values():
        if isinstance(part, FisherSums):
            tensors.update({name + FISHER.suffix: one for name, one in part.means(len(examples)).items()})
        else:
            tensors.update({name + GRAM.suffix: one for name, one in part.means().items()})
    if not tensors:
        raise InputError("the model has no linear layers whose weights are tensors of its checkpoint")
    return tensors


def _sums(kind: Kind, model: LearningModel, options: StatsOptions, device: torch.device) -> FisherSums | GramSums:
    if kind == "fisher":
        return FisherSums(model, labels=options.labels, seed=options.seed, device=device, precision=options.precision)
    return GramSums(model, batch=options.batch, device=device, precision=options.precision)


def _require_free(output: Path, mode: Mode) -> Path:
    """The file of the state beside the output.

    Raises:
        OutputError: a name without .safetensors, a folder, a file that is not to be replaced, an unfinished run that
            is not to be gone on with, or nothing to go on with.
    """
    if output.suffix != ".safetensors":
        raise OutputError("statistics are written as .safetensors", where=str(output), hint="end the name so")
    if output.is_dir():
        raise OutputError("it is a folder", where=str(output), hint="name a file")
    state = output.with_suffix(".unfinished.safetensors")
    if mode == "overwrite":
        state.unlink(missing_ok=True)
    elif mode == "new" and state.exists():
        hint = "go on with --resume, or start over with --overwrite"
        raise OutputError("an unfinished run is there", where=str(output), hint=hint)
    elif output.exists() and not state.exists():
        what = "it exists already" if mode == "new" else "it exists already, and no unfinished run is beside it"
        raise OutputError(what, where=str(output), hint="replace it with --overwrite, or name another")
    return state


def _code_hash(options: StatsOptions) -> str | None:
    """sha256 of the file that makes the model."""
    return None if options.factory is None else file_sha256(Path(options.factory.rpartition(":")[0]).expanduser())


def _total(tensors: Mapping[str, Tensor], suffix: str) -> float:
    return sum(float(tensor.double().sum()) for name, tensor in tensors.items() if name.endswith(suffix))
