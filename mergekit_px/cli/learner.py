"""``pxmerge LEARNER``: one command for each learner, made from its declaration."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from mergekit_px.cli._arguments import Several
from mergekit_px.cli._errors import Interrupted
from mergekit_px.cli._options import Json, Quiet
from mergekit_px.cli._output import Column, Output, output_for
from mergekit_px.cli._parameters import choice
from mergekit_px.cli._prose import plain
from mergekit_px.cli._units import show_seconds
from mergekit_px.declare.fields import Schema, bounds_of, fields, forms, in_words
from mergekit_px.learn.declare import Learner, Line, Note, Option, Report, RunSettings, Table, make_settings

INTERVAL = 10.0
"""Seconds between two lines of progress."""

_SHORT = {"output": "-o"}


@dataclass(frozen=True, slots=True)
class SettingOption:
    """A field of a settings class as an option of a command."""

    name: str
    schema: Schema
    option: Option
    required: bool
    default: Any

    @property
    def flag(self) -> str:
        return self.option.flag or "--" + self.name.replace("_", "-")

    def as_parameter(self) -> inspect.Parameter:
        """Values come as words, None where nothing was given; the settings class reads them."""
        scalars = [form.get("items") or form.get("prefixItems", [form])[0] for form in forms(self.schema)]
        types = {form.get("type") for form in scalars}
        choices = tuple(
            str(word) for form in scalars for word in form.get("enum", [form["const"]] if "const" in form else ())
        )
        several = any(form.get("type") == "array" for form in forms(self.schema))
        annotation: Any
        names = [*([_SHORT[self.name]] if self.name in _SHORT else []), self.flag]
        settings: dict[str, Any] = {"help": self._help(bounds_of(scalars)), "rich_help_panel": self.option.panel}
        marks: list[Any] = []
        if types == {"boolean"} and not several:
            if self.default:
                names = [f"{self.flag}/{self.option.negative or f'--no-{self.flag[2:]}'}"]
            annotation = bool | None
        else:
            number = "N" if types == {"integer"} else "X" if types & {"integer", "number"} else "TEXT"
            settings["metavar"] = self.option.metavar or ("|".join(choices) or number) + ("..." if several else "")
            if several:
                numeric = types <= {"integer", "number"}
                assigned = "=" in settings["metavar"]
                marks.append(Several(self.flag, "numbers" if numeric else "assignments" if assigned else "text"))
                annotation = list[str] if self.required else list[str] | None
            elif choices and types == {"string"}:
                annotation = choice(choices) if self.required else choice(choices) | None
                if self.option.metavar is None:
                    del settings["metavar"]
            else:
                annotation = str if self.required else str | None
        made = typer.Argument(**settings) if self.option.by_place else typer.Option(*names, **settings)
        default = inspect.Parameter.empty if self.required else None
        kept = Annotated[(annotation, made, *marks)]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kept)

    def _help(self, bounds: Mapping[str, float]) -> str:
        notes = [in_words(bounds)] if bounds else []
        default = self.option.unset if self.default in (None, ()) else self.default
        if isinstance(default, bool):
            default = self.flag[2:] if default else None
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        notes = [*([f"default: {default}"] if default not in (None, "") else []), *notes]
        text = plain(str(self.schema.get("description", "")))
        return f"{text}  [{'; '.join(notes)}]" if notes else text


def setting_options(learner: Learner) -> list[SettingOption]:
    """The options of a learner: its own in the order of their declaration, then those that it shares."""
    settings = learner.settings
    schemas, marks = fields(settings), settings.marked(Option)
    own = [name for name in settings.model_fields if name in settings.__annotations__]
    found = []
    for name in [*own, *(name for name in settings.model_fields if name not in own)]:
        field = settings.model_fields[name]
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        required = field.is_required()
        if name == "output" and learner.form != "state":
            default, required = learner.output, learner.output is None
        found.append(SettingOption(name, schemas[name], marks.get(name, Option()), required, default))
    return found


def learner_command(learner: Learner) -> Callable[..., int]:
    """The function of a learner's command, whose signature holds the settings as options."""
    options = setting_options(learner)
    flags = {option.name: option.flag if not option.option.by_place else option.option.metavar for option in options}

    def command(**given: Any) -> int:
        sink = output_for(json=given.pop("json"), quiet=given.pop("quiet"))
        values = {name: value for name, value in given.items() if value is not None}
        settings = make_settings(learner, values, lambda name: str(flags.get(name, name)))
        run_settings(learner, settings, sink)
        return 0

    parameters = [option.as_parameter() for option in options]
    parameters.sort(key=lambda one: isinstance(one.annotation.__metadata__[0], typer.models.OptionInfo))
    shared = {"json": Json, "quiet": Quiet}
    for name, annotation in shared.items():
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation))
    command.__doc__ = _help(learner.documentation)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _help(documentation: str) -> str:
    """A docstring whose paragraphs of indented lines are printed as they are, which \\b before them asks for."""
    blocks = documentation.split("\n\n")
    return "\n\n".join(f"\b\n{block}" if "\n  " in block else block for block in blocks)


def run_settings(learner: Learner, settings: RunSettings, sink: Output) -> Report:
    """Run a learner, and show what came of it."""
    from mergekit_px.learn.life import live

    began = time.monotonic()
    with resumable():
        learned = live(learner, settings, sink.note, told(sink))
    sink.writes = learned.output is not None
    show(learned.report.shown(), sink)
    if learner.form != "state":
        sink.note(show_seconds(time.monotonic() - began))
    output = None if learned.output is None else str(learned.output)
    sink.document({"output": output, **learned.report.model_dump(mode="json")})
    if output is not None:
        sink.text(output)
    return learned.report


def show(parts: Iterable[Table | Note | Line], sink: Output) -> None:
    """Tables and lines on stdout, notes and warnings on stderr."""
    for part in parts:
        if isinstance(part, Note):
            (sink.warning if part.warning else sink.note)(part.text)
        elif isinstance(part, Line):
            sink.text(part.text)
        else:
            columns = [
                Column(title, "left" if place < part.texts else "right") for place, title in enumerate(part.titles)
            ]
            sink.table(columns, part.rows)


@contextmanager
def resumable() -> Iterator[None]:
    """Inside, Ctrl-C ends in the words that go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted from error


def told(output: Output, clock: Callable[[], float] = time.monotonic) -> Callable[..., None]:
    """A function to report progress with, now and then: the `Tell` of a run."""
    last = clock()

    def tell(what: str, done: int, total: int, loss: float | None = None, /) -> None:
        nonlocal last
        if clock() - last >= INTERVAL:
            last = clock()
            output.note(f"{what}: {done} of {total}" + ("" if loss is None else f", loss {loss:.4g}"))

    return tell
