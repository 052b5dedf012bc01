"""The life of a learner, whatever it learns: inputs are opened and hashed, an output is taken, the learner fits, and
what it wrote is published with its report.

A run is named by its identity: the settings that change the result, and hashes of everything that is read. Only the
same run is resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from mergekit_px._version import __version__
from mergekit_px.checkpoint.destination import check_apart
from mergekit_px.errors import DivergedError, UsageError
from mergekit_px.learn import find_learner
from mergekit_px.learn.declare import Input, Learner, LearnerSettings, Report, RunSettings, make_settings
from mergekit_px.learn.inputs import Inputs, open_inputs
from mergekit_px.learn.output import write_json
from mergekit_px.learn.workplace import workplace

if TYPE_CHECKING:
    import torch

    from mergekit_px.checkpoint.contents import Checkpoint
    from mergekit_px.learn.data import Examples
    from mergekit_px.learn.labels import Reading
    from mergekit_px.learn.models import LearningModel

REPORT_FILE = "report.json"

_IDENTITY_VERSION = 1

S = TypeVar("S", bound=RunSettings)


def report_file(output: Path) -> Path:
    """Where the report of a result is: in its folder, or beside its file."""
    return output.with_suffix(".json") if output.suffix == ".safetensors" else output / REPORT_FILE


class Tell(Protocol):
    """How far something is: what it is, how much is done and how much there is, and the loss where there is one."""

    def __call__(self, what: str, done: int, total: int, loss: float | None = None, /) -> None: ...


def silent(what: str, done: int, total: int, loss: float | None = None, /) -> None:
    """Tells nobody."""


@dataclass
class Run(Generic[S]):
    """What a learner works with.

    Attributes:
        learner: its name.
        settings: those that were given; a learner that fills in defaults puts the filled ones here.
        output: where the result will be.
        stage: where its files are written; they are put in place when the learner returns.
        work: for what an interrupted run goes on from.
        identity: names the run; a state of another is refused.
        note: says a line.
    """

    learner: str
    settings: S
    output: Path
    stage: Path
    work: Path
    identity: str
    device: torch.device
    inputs: Inputs
    note: Callable[[str], None]
    tell: Tell

    def checkpoint(self, name: str) -> Checkpoint:
        """The model that a setting names."""
        return self.inputs.checkpoints[name][0]

    def checkpoints(self, name: str) -> list[Checkpoint]:
        """All models that a setting names."""
        return self.inputs.checkpoints[name]

    def fingerprint(self, name: str) -> str:
        """A short name for the weights of a model."""
        return str(self.inputs.records[name][0].fingerprint)

    def data(self, name: str = "data", model: str = "base") -> Examples:
        """The examples that a setting names, as the model takes them; those of several files together."""
        from mergekit_px.learn.data import joined

        files = getattr(self.settings, name)
        parts = [self._load(file, model) for file in ([files] if isinstance(files, str) else files)]
        return joined(parts) if len(parts) > 1 else parts[0]

    def parts(self, name: str = "data", model: str = "base") -> dict[str, Examples]:
        """``train``, and those of ``validation`` and ``test`` that there are: shares drawn by the seed, or files.

        Raises:
            UsageError: shares that leave nothing to train on.
        """
        from mergekit_px.learn.data import split_rows

        settings: Any = self.settings
        whole = self.data(name, model)
        given = {part: getattr(settings, part) for part in ("validation", "test")}
        shares = {part: share for part, share in given.items() if not isinstance(share, str) and share > 0}
        rows = split_rows(len(whole), shares, settings.seed, whole.where)
        parts = {part: whole.take(numbers) for part, numbers in rows.items()}
        return parts | {part: self._load(file, model) for part, file in given.items() if isinstance(file, str)}

    def model(
        self, name: str = "base", code: str = "model", *, learns: bool = False, narrow: bool = False
    ) -> LearningModel:
        """A model with its forward pass, on the device, in evaluation mode; and its gradients if it learns.

        Args:
            narrow: see `mergekit_px.learn.models.load_model`.
        """
        from mergekit_px.learn.activations import checkpoint_activations
        from mergekit_px.learn.models import load_model

        factory = getattr(self.settings, code)
        model = load_model(self.checkpoint(name), factory, allow_code=self.settings.allow_code, narrow=narrow)
        model.module.to(self.device).eval()
        if narrow:
            model.defer({})
        if getattr(self.settings, "checkpoint_activations", False):
            checkpoint_activations(model.module)
        if not learns:
            model.module.requires_grad_(False)
        return model

    def labelled(
        self, model: LearningModel, parts: Mapping[str, Examples], dtype: torch.dtype | None = None
    ) -> tuple[dict[str, Examples], Reading]:
        """Parts of the data with what the labels are compared with, and how they belong to the model's predictions.

        Raises:
            InputError: data that the model cannot take, or labels that it does not have.
        """
        import torch

        from mergekit_px.learn.labels import read_labels

        wanted = dtype or torch.float32
        read = {name: read_labels(model.module, part, self.device, wanted) for name, part in parts.items()}
        return {name: part for name, (part, _) in read.items()}, next(iter(read.values()))[1]

    def completed(self, report: Report) -> Report:
        """A report with what every report says."""
        from importlib.metadata import version

        return report.model_copy(
            update={
                "learner": self.learner,
                "settings": self.settings.plain(),
                "inputs": self.inputs.finished(),
                "device": str(self.device),
                "versions": {"pxmerge": __version__, "torch": version("torch")},
            }
        )

    def report(self, report: Report) -> Report:
        """Complete a report and write it beside the result."""
        completed = self.completed(report)
        write_json(self.stage / report_file(self.output).name, completed.model_dump(mode="json"))
        return completed

    def _load(self, path: str, model: str) -> Examples:
        from mergekit_px.learn.data_files import load_data

        settings: Any = self.settings
        return load_data(path, self.checkpoint(model), settings.text, self.note)


@dataclass(frozen=True, slots=True)
class Learned:
    """A finished run: where its result is, if anywhere, and the report."""

    output: Path | None
    report: Report


def run_learner(
    learner: str, *, note: Callable[[str], None] | None = None, tell: Tell | None = None, **settings: Any
) -> Learned:
    """Learn something, as ``pxmerge LEARNER`` does.

        px.run_learner("tune", components="pool", base="base", data="few.jsonl", output="tuned")

    Args:
        learner: its name.
        note: gets lines for people.
        tell: gets what is being done, how much of it is done, how much there is, and the loss or None.
        settings: the options of the command, with underscores.

    Raises:
        UsageError, InputError, PlanError, RunError: see :mod:`mergekit_px.errors`.
        KeyboardInterrupt: passed on; ``resume=True`` goes on.
    """
    declared = find_learner(learner)
    return live(declared, make_settings(declared, settings), note or (lambda line: None), tell or silent)


def live(learner: Learner, settings: RunSettings, note: Callable[[str], None], tell: Tell) -> Learned:
    """One run of a learner, from its settings to a published result; errors as `run_learner`."""
    from mergekit_px.execute.allocator import return_freed_memory
    from mergekit_px.execute.lane import pick_device

    return_freed_memory()
    if isinstance(settings, LearnerSettings):
        _ = settings.mode  # before anything is read
    named = settings.place(learner.output)
    device = pick_device(settings.device)
    inputs: Inputs = (learner.inputs or open_inputs)(settings)
    identity = identity_of(learner, settings, inputs, device.type)
    if not isinstance(settings, LearnerSettings):
        nowhere = Path(os.devnull)
        run = Run(learner.name, settings, nowhere, nowhere, nowhere, identity, device, inputs, note, tell)
        return Learned(None if named is None else Path(named), run.completed(learner.fit(run)))
    if named is None:
        raise UsageError(f"{learner.name} needs an output", hint="name it with -o")
    output = Path(named).expanduser()
    check_apart(output, inputs.places())
    is_file = learner.form == "file"
    with workplace(output, settings.mode, identity, is_file=is_file, continues=learner.continues) as place:
        if place.begins_anew:
            note(f"no unfinished run is in {output}, so --resume begins a new one")
        run = Run(learner.name, settings, output, place.stage, place.work, identity, device, inputs, note, tell)
        try:
            report = run.report(learner.fit(run))
        except DivergedError:
            if place.staged():  # what was best until then
                place.publish()
            raise
        place.publish()
    return Learned(output, report)


def identity_of(learner: Learner, settings: RunSettings, inputs: Inputs, device: str) -> str:
    """Names all that the result depends on, so that a run goes on only with the same."""
    plain: Mapping[str, Any] = settings.plain()
    marks = settings.marked(Input)
    own = {name: value for name, value in plain.items() if name not in marks or not isinstance(value, (str, list))}
    code = {name: plain[name] and plain[name].rpartition(":")[2] for name, mark in marks.items() if mark.kind == "code"}
    text = json.dumps([_IDENTITY_VERSION, learner.name, own, code, inputs.prints(), device], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
