"""What a recipe must know of the merge methods to be checked, as plain data: recipes import no method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class MethodFacts:
    """A merge method seen from a recipe.

    Attributes:
        parameters: JSON Schema of one value of each parameter, with ``description`` and ``default``.
        per_source: parameters that may have one value for each source.
        interpolated: parameters that a list of numbers interpolates over depth.
        presets: variants for ``like``.
        sources: least and most number of sources, the base not counted; None for no limit.
        uses_weights: whether sources have weights.
    """

    name: str
    summary: str = ""
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    per_source: frozenset[str] = frozenset()
    interpolated: frozenset[str] = frozenset()
    presets: tuple[str, ...] = ()
    sources: tuple[int, int | None] = (1, None)
    uses_weights: bool = True


class MethodCatalog(Protocol):
    """The methods that a recipe may name."""

    @property
    def methods(self) -> Mapping[str, MethodFacts]:
        """All methods by name (with underscores)."""
        ...

    def validate(self, method: str, params: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Check single values of parameters by themselves: a (parameter, what is wrong) pair for each bad one.

        Parameters that are not given are not looked at.
        """
        ...
