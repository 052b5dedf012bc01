"""Parameter settings of mergekit configs: filters, gradients over the layers, and their order of precedence.

A setting is a value, a list of numbers over the layers of a slice, or a list of ``{filter, value}`` of which the first
whose filter is part of the tensor's name counts. Settings of a source come before those of its slice, and those before
the global ones; where no filter of one matches, the next is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for
from mergekit_px.located.validate import shown
from mergekit_px.located.yaml_text import Node, Place, mapping, sequence

Kind = Literal["number", "boolean"]

Key = tuple[str, ...]
"""Where a value goes in a step or rule: ``("params", "t")``, ``("params", "density", "math")`` or
``("weights", "math")``."""

_TRUE = ("true", "t", "yes", "y", "on", "1")
_FALSE = ("false", "f", "no", "n", "off", "0")


Region = Literal["outside"] | tuple[float, float]
"""The tensors outside the layers, or the layers from one depth to another, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A value, and the text that a tensor's name must contain for it to count (None: any name).

    Attributes:
        region: where it counts alone; None for everywhere.
    """

    filter: str | None
    value: Node
    region: Region | None = None

    @property
    def everywhere(self) -> bool:
        return self.filter is None and self.region is None

    @property
    def first(self) -> Node:
        """What the value is where a gradient is not interpolated: outside of the layers."""
        return self.value.value[0] if isinstance(self.value.value, list) else self.value

    @property
    def last(self) -> Node:
        return self.value.value[-1] if isinstance(self.value.value, list) else self.value


def read_choices(settings: Iterable[Node | None], kind: Kind, name: str) -> list[Choice]:
    """What a parameter is, from its settings in order of precedence; nothing follows a choice without a filter.

    Raises:
        RecipeError: a setting that is none, or of the wrong kind.
    """
    choices: list[Choice] = []
    for setting in settings:
        for choice in _read_setting(setting, kind, name) if setting is not None else ():
            choices.append(choice)
            if choice.everywhere:
                return choices
    return choices


def _read_setting(node: Node, kind: Kind, name: str) -> Iterator[Choice]:
    if isinstance(node.value, dict):
        yield from _read_condition(node, kind, name)
    elif isinstance(node.value, list) and any(isinstance(item.value, dict) for item in node.value):
        for item in node.value:
            if not isinstance(item.value, dict):
                what = f"'{name}' mixes values with filters"
                raise RecipeError(what, where=str(item.place), hint="write {value: ...} for the rest")
            yield from _read_condition(item, kind, name)
    else:
        yield from _over_depth(None, _read_value(node, kind, name), kind)


def _over_depth(text: str | None, value: Node, kind: Kind) -> Iterator[Choice]:
    """What a value is; true and false over the layers as choices, of which the first counts.

    mergekit does not interpolate them: each holds from its own depth to that of the next, the last at the last layer
    alone. Outside the layers the first of the list counts.
    """
    if kind == "number" or not isinstance(value.value, list):
        yield Choice(text, value)
        return
    flags = value.value
    changes = [place for place in range(1, len(flags)) if flags[place].value != flags[place - 1].value]
    if changes:
        yield Choice(text, flags[0], "outside")
    for place in reversed(changes):
        yield Choice(text, flags[place], (place / (len(flags) - 1), 1.0))
    yield Choice(text, flags[0])


def _read_condition(node: Node, kind: Kind, name: str) -> Iterator[Choice]:
    assert isinstance(node.value, dict)
    for key in node.value:
        if key not in ("filter", "value"):
            hint = hint_for(key, ("filter", "value"))
            raise RecipeError(f"unknown key '{key[:80]}' in '{name}'", where=str(node.keys[key]), hint=hint)
    if "value" not in node.value:
        raise RecipeError(f"'value' is missing in '{name}'", where=str(node.place))
    filter_node = node.value.get("filter")
    wanted = filter_node.value if filter_node is not None else None
    if filter_node is not None and wanted is not None and not isinstance(wanted, str):
        raise RecipeError(f"a filter is text, not {shown(wanted)}", where=str(filter_node.place))
    text = None if wanted in (None, "", "*") else str(wanted)
    yield from _over_depth(text, _read_value(node.value["value"], kind, name), kind)


def _read_value(node: Node, kind: Kind, name: str) -> Node:
    if isinstance(node.value, list):
        if not node.value:
            raise RecipeError(f"'{name}' is an empty list", where=str(node.place))
        values = [_read_scalar(item, kind, name) for item in node.value]
        return values[0] if len(values) == 1 else sequence(node.place, values)
    return _read_scalar(node, kind, name)


def _read_scalar(node: Node, kind: Kind, name: str) -> Node:
    value = node.value
    if kind == "boolean":
        if isinstance(value, bool) or (isinstance(value, (int, float)) and value in (0, 1)):
            return Node(bool(value), node.place)
        if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
            return Node(value.lower() in _TRUE, node.place)
        raise RecipeError(f"'{name}' must be true or false, not {shown(node.data())}", where=str(node.place))
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            value = math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RecipeError(f"'{name}' must be a finite number, not {shown(node.data())}", where=str(node.place))
    return Node(value, node.place)


@dataclass(slots=True)
class Settings:
    """Values for a step or slice, and the rules that change them; of rules that match, the later wins.

    A gradient is interpolated over the layers by the value itself; ``outside`` says whether tensors outside the layers
    need a rule that gives them its first value.
    """

    outside: bool = True
    values: dict[Key, Node] = field(default_factory=dict)
    _rules: list[tuple[tuple[str | None, Region | None], dict[Key, Node]]] = field(default_factory=list)

    def put(self, key: Key, choices: list[Choice], default: Node | None = None) -> None:
        """Set a value by choices of which the first match counts."""
        rest = next((choice.value for choice in choices if choice.everywhere), default)
        if rest is not None:
            self.values[key] = rest
        for choice in reversed(choices):
            if not choice.everywhere:
                self._add((choice.filter, choice.region), key, choice.value)
            if self.outside and choice.first.value != choice.last.value:
                self._add((choice.filter, "outside"), key, choice.first)

    def _add(self, selector: tuple[str | None, Region | None], key: Key, value: Node) -> None:
        """Add to the last rule of that selector if no rule after it sets the same key."""
        for known, entries in reversed(self._rules):
            if key in entries:
                break
            if known == selector:
                entries[key] = value
                return
        self._rules.append((selector, {key: value}))

    def part(self, part: str, *, by_source: bool = True) -> Node | None:
        """One part (``params``, ``weights``) of the values as a mapping; None if it is empty."""
        return _nested({k: v for k, v in self.values.items() if by_source or len(k) < 3}, part)

    def rules(self, place: Place) -> Node | None:
        """The rules as a list; None if there are none."""
        if not self._rules:
            return None
        written = []
        for (text, region), entries in self._rules:
            here = next(iter(entries.values())).place
            written.append(
                mapping(
                    here,
                    {
                        "match": Node(f"*{_literal(text)}*", here) if text is not None else None,
                        "layers": Node("none", here) if region == "outside" else None,
                        "depth": sequence(here, [Node(end, here) for end in region])
                        if isinstance(region, tuple)
                        else None,
                        "params": _nested(entries, "params"),
                        "weights": _nested(entries, "weights"),
                    },
                )
            )
        return sequence(place, written)


def _nested(entries: dict[Key, Node], part: str) -> Node | None:
    """The entries of one part as a mapping, with a mapping inside where values are by source."""
    inside: dict[str, Node | None] = {}
    for (owner, name, *source), value in entries.items():
        if owner != part:
            continue
        if not source:
            inside[name] = value
        else:
            others = inside.get(name)
            known = others.value if others is not None and isinstance(others.value, dict) else {}
            inside[name] = mapping(value.place, {**known, source[0]: value})
    first = next(iter(inside.values()), None)
    return mapping(first.place, inside) if first is not None else None


def _literal(text: str) -> str:
    """A glob that matches the text itself."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in text)
