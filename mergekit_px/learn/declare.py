"""How a learner is declared: a settings class, a report class and a function, in one file without torch.

    class TuneSettings(LearnerSettings, TextSettings, ModelSettings):
        base: BaseModel
        \"\"\"The model that the update was taken from.\"\"\"
        steps: int = Field(default=300, ge=1)
        \"\"\"Of training.\"\"\"

    @learner(TuneSettings, TuneReport, output="tuned")
    def tune(run: Run[TuneSettings]) -> TuneReport:
        \"\"\"Train the singular values of a merged update on labelled data. ...\"\"\"

The command with its options, the call from Python and the schema of the report are derived from it. Everything around
the mathematics (opening, hashes, the folder, resuming, progress, the report) is done by `mergekit_px.learn.life`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mergekit_px.declare.built_in import LEARNERS
from mergekit_px.declare.fields import problems
from mergekit_px.declare.once import require_new
from mergekit_px.errors import UsageError
from mergekit_px.located.nearest import nearest

if TYPE_CHECKING:
    from mergekit_px.checkpoint.destination import Mode
    from mergekit_px.learn.text_data import TextOptions
    from mergekit_px.pictures.curves import Curves
    from mergekit_px.pictures.heat_map import HeatMap

__all__ = [
    "DATA_HELP",
    "Aside",
    "Base",
    "Code",
    "Controls",
    "Data",
    "Input",
    "LabelledSettings",
    "LearnerSettings",
    "Line",
    "ModelSettings",
    "Note",
    "Option",
    "Part",
    "Precision",
    "Rate",
    "Report",
    "RunSettings",
    "Seed",
    "Share",
    "Sources",
    "Table",
    "TextSettings",
    "TrainingSettings",
    "learner",
]
"""What a declaration is made of."""


@dataclass(frozen=True, slots=True)
class Option:
    """How a field is written on a command line, where its name and type do not tell.

    Attributes:
        flag: instead of the field's name with dashes.
        negative: the flag that says no, of a field that is true by default.
        metavar: what stands for the value in help texts.
        by_place: the value is given without a flag.
        unset: what None stands for.
        panel: the heading under which help texts list it.
    """

    flag: str | None = None
    negative: str | None = None
    metavar: str | None = None
    by_place: bool = False
    unset: str | None = None
    panel: str = "Learning"


@dataclass(frozen=True, slots=True)
class Input:
    """Marks a field that names what is read: it is opened and hashed, and what it holds is part of the run's identity.

    Attributes:
        kind: ``model``: a checkpoint; ``source``: that, or differences or an adapter of the model in the field ``of``;
            ``data``: examples (words that are numbers are shares); ``code``: ``file.py:function``; ``file``: any file,
            or a folder of safetensors files; ``tasks``: a folder, all files in it.
    """

    kind: Literal["model", "source", "data", "code", "file", "tasks"]
    of: str = "base"


class Aside:
    """Marks a field that changes how a result is reached and not what it is."""


def _share(value: Any) -> Any:
    """A number, where a word is one. Raises ``ValueError`` for a number that is no share."""
    try:
        share = float(value)
    except (TypeError, ValueError):
        return value
    if not 0 <= share < 1:
        raise ValueError("must be a share, at least 0 and below 1")
    return share


def _several(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, str) else value


Base = Annotated[str, Input("model"), Option(metavar="MODEL")]
Sources = Annotated[tuple[str, ...], Input("source"), Option(metavar="MODEL...")]
OneOrSeveral = Annotated[tuple[str, ...], BeforeValidator(_several)]
Data = Annotated[str, Input("data"), Option(metavar="FILE")]
Code = Annotated[str | None, Input("code"), Option(metavar="FILE.PY:FUNCTION")]
Part = Annotated[float | str, BeforeValidator(_share), Input("data"), Option(metavar="SHARE|FILE")]
"""A share of the data, or a file."""
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0)]
Controls = Literal["none", "cheap", "all"]
"""What a result is compared with: nothing, what trains nothing, or all."""
Precision = Literal["float32", "bfloat16"]
Form = Literal["folder", "file", "state"]
"""Of an output: a folder, one .safetensors file with a report beside it, or a state that the learner keeps itself."""

DATA_HELP = "Texts (.jsonl, .csv, .parquet), a folder of images by class, or arrays (.npz, .safetensors)"
"""What ``--data`` takes, to which a learner adds what it needs of them."""


class Settings(BaseModel):
    """Base of all classes of settings. Field docstrings become help texts, bounds become option ranges."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, defer_build=True)


class RunSettings(Settings):
    """What every run can be told."""

    device: Annotated[str, Aside(), Option(metavar="NAME", panel="Run")] = "auto"
    """auto, cpu, cuda or cuda:1."""
    allow_code: Annotated[bool, Aside(), Option(panel="Run")] = False
    """Run the Python functions that options name."""
    allow_pickle: Annotated[bool, Aside(), Option(panel="Run")] = False
    """Read .bin and .pt files too (weights only; no code in them is run)."""

    @model_validator(mode="before")
    @classmethod
    def _paths_as_words(cls, given: Any) -> Any:
        return {name: _as_words(value) for name, value in given.items()} if isinstance(given, Mapping) else given

    def place(self, default: str | None) -> str | None:
        """Where the result goes: what was asked for, else the learner's default."""
        return default

    def check(self) -> None:
        """Raise ``UsageError`` for settings that contradict one another."""

    @classmethod
    def marked(cls, kind: type[Any]) -> dict[str, Any]:
        """The fields that carry a mark of that kind, and the mark."""
        marks = ((name, mark) for name, field in cls.model_fields.items() for mark in field.metadata)
        return {name: mark for name, mark in marks if isinstance(mark, kind)}

    def plain(self) -> dict[str, Any]:
        """All that the result depends on, as plain data."""
        return self.model_dump(mode="json", exclude=set(self.marked(Aside)))


class LearnerSettings(RunSettings):
    """What every learner with an output of its own can be told."""

    output: Annotated[str | None, Aside(), Option(metavar="PATH", panel="Output")] = None
    """Where the result goes."""
    overwrite: Annotated[bool, Aside(), Option(panel="Output")] = False
    """Replace a result of before."""
    resume: Annotated[bool, Aside(), Option(panel="Run")] = False
    """Go on with an interrupted run of the output."""

    def place(self, default: str | None) -> str | None:
        return self.output or default

    @property
    def mode(self) -> Mode:
        """What becomes of what is in the output. Raises ``UsageError`` for a contradiction."""
        if self.resume and self.overwrite:
            raise UsageError("--resume keeps what is there and --overwrite removes it", hint="give one of them")
        return "resume" if self.resume else "overwrite" if self.overwrite else "new"


def _as_words(value: Any) -> Any:
    if isinstance(value, PathLike):
        return fspath(value)
    return [_as_words(part) for part in value] if isinstance(value, (list, tuple)) else value


class TextSettings(Settings):
    """How rows of text are read."""

    columns: Annotated[tuple[str, ...], Option(metavar="ROLE=COLUMN...", unset="so named")] = ()
    """Which column is text, text_pair, label, prompt, completion or messages."""
    max_length: Annotated[int | None, Field(ge=2)] = None
    """Cut texts to so many tokens."""
    tokenizer: Annotated[str | None, Option(metavar="DIR", unset="beside the model")] = None
    """Where the tokenizer is."""

    @property
    def text(self) -> TextOptions:
        """Raises ``UsageError`` for a word without a role or a column."""
        from mergekit_px.learn.text_data import TextOptions

        pairs = []
        for word in self.columns:
            role, _, column = word.partition("=")
            if not role or not column:
                raise UsageError(f"'{word}' names no column", where="--columns", hint="write text=COLUMN")
            pairs.append((role, column))
        return TextOptions(tuple(pairs), self.max_length, self.tokenizer)


class LabelledSettings(TextSettings):
    """Labelled data in parts: to learn from, to choose by, and for the report."""

    data: Data = Field(description=f"{DATA_HELP}, with labels.")
    validation: Part = 0.2
    """What chooses: a share of the data, or a file."""
    test: Part = 0.2
    """What is reported and never chosen on: a share of the data, or a file; 0 for none."""
    seed: Seed = 0
    """Draws the parts of the data and their order."""


class MemorySettings(Settings):
    """What may be kept in memory."""

    memory: Annotated[str | None, Aside(), Option(metavar="SIZE", panel="Run")] = None
    """Start only if all but activations fits in it, as 40GB."""


class ModelSettings(MemorySettings):
    """The model that learns."""

    model: Code = None
    """Makes the model, if config.json names no class; needs --allow-code."""
    precision: Precision = "float32"
    """Of forward and backward passes; nothing else is rounded."""


class TrainingSettings(ModelSettings):
    """How much goes through the model at a time where something is trained by gradients."""

    accumulate: Annotated[int, Field(ge=1)] = 1
    """Batches whose gradients make one step: that of a batch so many times as large, in the memory of one."""
    checkpoint_activations: bool = False
    """Keep only what each layer takes and compute the rest again in the backward pass."""


@dataclass(frozen=True, slots=True)
class Table:
    """Numbers for people. The first ``texts`` columns are words."""

    titles: Sequence[str]
    rows: Sequence[Sequence[object]]
    texts: int = 1


@dataclass(frozen=True, slots=True)
class Note:
    """A line for people; ``warning``: that something may not be meant."""

    text: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A line of data on stdout."""

    text: str


class InputRecord(BaseModel):
    """What was read: as it was named, and what it held."""

    reference: str
    fingerprint: str | None = None
    sha256: str | None = None
    files: dict[str, str] = {}


class Report(BaseModel):
    """What every report says; a learner adds what it found."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, defer_build=True)

    learner: str = ""
    """Which wrote it."""
    settings: dict[str, Any] = {}
    """Everything that the result depends on, inputs by their names."""
    inputs: dict[str, list[InputRecord]] = {}
    """What was read, by the setting that names it."""
    device: str = ""
    versions: dict[str, str] = {}

    def shown(self) -> Iterable[Table | Note | Line]:
        """What people are told; programs get the document."""
        return ()

    def pictures(self, folder: Path) -> Iterable[HeatMap | Curves | Table | None]:
        """What the page of a result shows beside that; None for what there is nothing of.

        Args:
            folder: where the files of the result are.
        """
        return ()


@dataclass(frozen=True, slots=True)
class Learner:
    """A declared learner.

    Attributes:
        name: of its command; of several words for a command of a group.
        classes: of its settings and its report; names of classes in ``settings.py`` beside the declaration, which is
            then read when the learner is asked for and not for a list of commands.
        output: the default of ``output``; None where one must be given.
        form: of the output.
        continues: whether a finished output of the same settings may be gone on with.
        inputs: opens what is read, where fields alone do not name it.
    """

    name: str
    fit: Callable[[Any], Report]
    classes: tuple[type[RunSettings] | str, type[Report] | str]
    output: str | None
    form: Form
    continues: bool
    inputs: Callable[[Any], Any] | None
    origin: str

    @property
    def settings(self) -> type[RunSettings]:
        found: type[RunSettings] = self._class(0)
        return found

    @property
    def report(self) -> type[Report]:
        found: type[Report] = self._class(1)
        return found

    def _class(self, place: int) -> Any:
        found = self.classes[place]
        return getattr(import_module(f"{self.origin}.settings"), found) if isinstance(found, str) else found

    @property
    def documentation(self) -> str:
        return inspect.getdoc(self.fit) or ""

    @property
    def summary(self) -> str:
        return self.documentation.split("\n\n")[0].replace("\n", " ")


REGISTRY: dict[str, Learner] = {}
"""Every learner that was declared, by name."""


def learner(
    settings: type[RunSettings] | str,
    report: type[Report] | str,
    *,
    output: str | None = None,
    form: Form = "folder",
    name: str | None = None,
    continues: bool = False,
    inputs: Callable[[Any], Any] | None = None,
) -> Callable[[Callable[[Any], Report]], Learner]:
    """Declare a learner: a function of a `Run` that returns its report. See `Learner` for the arguments.

    Raises:
        ValueError: there is such a learner already.
    """

    def declare(fit: Callable[[Any], Report]) -> Learner:
        called = name or fit.__name__.replace("_", "-")
        require_new("learner", called, fit.__module__, REGISTRY, LEARNERS)
        REGISTRY[called] = Learner(called, fit, (settings, report), output, form, continues, inputs, fit.__module__)
        return REGISTRY[called]

    return declare


def make_settings(
    declared: Learner, given: Mapping[str, Any], spelled: Callable[[str], str] = lambda name: name
) -> RunSettings:
    """The settings of a learner from what was given.

    Args:
        spelled: how a field is called where it was given.

    Raises:
        UsageError: a setting that there is not, that is missing, or that is invalid.
    """
    fields = declared.settings.model_fields
    for name in given:
        if name not in fields:
            near = nearest(name, fields)
            hint = f"did you mean {spelled(near)}?" if near else f"known are {', '.join(map(spelled, fields))}"
            raise UsageError(f"{declared.name} has no setting '{name}'", hint=hint)
    try:
        settings = declared.settings.model_validate(dict(given))
    except ValidationError as error:
        name, problem = problems(declared.settings, error)[0]
        if name not in given:
            raise UsageError(f"{declared.name} needs {spelled(name)}" if name else problem) from None
        value = given[name]
        said = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        raise UsageError(f"{spelled(name)} {problem}, not {said}") from None
    settings.check()
    return settings
