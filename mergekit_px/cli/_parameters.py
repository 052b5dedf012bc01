"""A method's parameters as options of its command, read from the JSON Schema of its parameter class.

Numbers are taken as text, because ``0.0,0.5,0.3`` is a number too: one that is interpolated over depth.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from mergekit_px.cli._arguments import Several, is_numbers
from mergekit_px.cli._options import METHOD
from mergekit_px.cli._prose import plain
from mergekit_px.declare.fields import Schema, bounds_of, breach, fields, forms, in_words
from mergekit_px.errors import UsageError
from mergekit_px.methods.declare import Method


@dataclass(frozen=True, slots=True)
class ParameterOption:
    """One parameter of a method on the command line.

    Attributes:
        kind: how it is written: ``flag``, ``choice``, ``numbers`` or ``text``.
        per_source: takes one value, or one for each source.
        is_list: the value itself is a list.
        bounds: that every number keeps, by key of JSON Schema.
        words: a number may also be a word such as ``10%``, whose form the declaration checks.
    """

    name: str
    kind: Literal["flag", "choice", "numbers", "text"]
    help: str
    default: Any
    per_source: bool
    is_list: bool
    choices: tuple[str, ...]
    bounds: Mapping[str, float]
    whole: bool
    words: bool

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def takes_several(self) -> bool:
        return self.per_source or self.is_list

    def as_parameter(self) -> inspect.Parameter:
        """The parameter of the command's function; its default is None, for "not given"."""
        annotation: Any
        if self.kind == "flag":
            names = (f"{self.flag}/--no-{self.flag[2:]}",)
            annotation = Annotated[bool | None, typer.Option(*names, help=self._help(), rich_help_panel=METHOD)]
        elif self.takes_several:
            option = typer.Option(self.flag, help=self._help(), metavar=f"{self._metavar()}...", rich_help_panel=METHOD)
            several = Several(self.flag, "numbers" if self.kind == "numbers" and not self.choices else "text")
            annotation = Annotated[list[str] | None, option, several]
        elif self.kind == "choice":
            annotation = Annotated[
                choice(self.choices) | None, typer.Option(self.flag, help=self._help(), rich_help_panel=METHOD)
            ]
        else:
            option = typer.Option(self.flag, help=self._help(), metavar=self._metavar(), rich_help_panel=METHOD)
            annotation = Annotated[str | None, option]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    def value(self, given: Any, sources: Sequence[str]) -> Any:
        """What the recipe says for what the command line says.

        Raises:
            UsageError: not a number, out of bounds, or not as many values as sources.
        """
        if not self.takes_several:
            return self._parse(given) if isinstance(given, str) else given
        values = [self._parse(word) for word in given]
        if self.is_list:
            return values
        if len(values) == 1:
            return values[0]
        if len(values) != len(sources):
            raise UsageError(
                f"{self.flag} has {len(values)} values for {len(sources)} sources",
                hint="give one value, or one for each source",
            )
        return dict(zip(sources, values, strict=True))

    def _parse(self, word: str) -> Any:
        if word in self.choices:
            return word
        if self.words and not is_numbers(word):
            return word
        if self.kind == "numbers":
            return self._check(parse_numbers(word, self.flag, whole=self.whole))
        if self.choices:
            raise UsageError(f"{self.flag}: '{word}' is not one of {', '.join(self.choices)}")
        return word

    def _check(self, value: Any) -> Any:
        for number in value if isinstance(value, list) else [value]:
            problem = breach(number, self.bounds)
            if problem is not None:
                raise UsageError(f"{self.flag} {problem}, not {number:g}")
        return value

    def _metavar(self) -> str:
        number = ("N" if self.whole else "X",) if self.kind == "numbers" else ()
        return "|".join((*number, *self.choices)) or "TEXT"

    def _help(self) -> str:
        notes = []
        if self.default is not None:
            notes.append(f"default: {_shown_default(self)}")
        notes += [in_words(self.bounds)] if self.bounds else []
        if self.per_source:
            notes.append("one value, or one for each source")
        return f"{self.help}  [{'; '.join(notes)}]" if notes else self.help


def parameter_options(method: Method) -> list[ParameterOption]:
    """The parameters of a method in the order of their declaration."""
    per_source = method.per_source_fields()
    return [_option(name, entry, forms(entry), name in per_source) for name, entry in fields(method.params).items()]


def choice(words: Sequence[str]) -> Any:
    """The type ``Literal`` of words that are known only now."""
    return Literal.__getitem__(tuple(words))


def parse_numbers(word: str, flag: str, *, whole: bool = False) -> float | int | list[float | int]:
    """A number, or the list that ``0.0,0.5,0.3`` means.

    Raises:
        UsageError: something else, naming the flag.
    """
    if not is_numbers(word):
        raise UsageError(f"{flag}: '{word}' is not a number", hint="a list over depth is written 0.0,0.5,0.3")
    numbers = [_number(part, flag, whole) for part in word.split(",")]
    return numbers[0] if len(numbers) == 1 else numbers


def _number(text: str, flag: str, whole: bool) -> float | int:
    if whole:
        try:
            return int(text)
        except ValueError:
            raise UsageError(f"{flag}: '{text}' is not a whole number") from None
    value = float(text)
    return int(value) if value.is_integer() and text.lstrip("+-").isdigit() else value


def _option(name: str, entry: Schema, alternatives: Sequence[Schema], per_source: bool) -> ParameterOption:
    scalars = [form for form in alternatives if form.get("type") != "array"]
    if per_source or not scalars:
        scalars = scalars or [form.get("items", {}) for form in alternatives]
    types = {form.get("type") for form in scalars}
    choices = tuple(str(choice) for form in scalars for choice in _choices(form))
    numeric = types & {"number", "integer"}
    kind: Literal["flag", "choice", "numbers", "text"]
    if numeric:
        kind = "numbers"
    elif types == {"boolean"}:
        kind = "flag"
    else:
        kind = "choice" if choices else "text"
    return ParameterOption(
        name=name,
        kind=kind,
        help=plain(str(entry.get("description", ""))),
        default=entry.get("default"),
        per_source=per_source,
        is_list=not per_source and all(form.get("type") == "array" for form in alternatives),
        choices=choices,
        bounds=bounds_of(scalars),
        whole=numeric == {"integer"},
        words=bool(numeric) and any("pattern" in form for form in scalars),
    )


def _choices(form: Mapping[str, Any]) -> Sequence[Any]:
    return [form["const"]] if "const" in form else form.get("enum", ())


def _shown_default(option: ParameterOption) -> str:
    if option.kind == "flag":
        return option.flag[2:] if option.default else f"no-{option.flag[2:]}"
    if isinstance(option.default, list):
        return ", ".join(str(value) for value in option.default)
    return str(option.default)
