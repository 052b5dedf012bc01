"""What expressions are made of before they are made: the slots of a step, and what its models offer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.nodes import Node
from mergekit_px.recipe.loaded import LoadedRecipe
from mergekit_px.recipe.model import Rule, Value

Namespace = Mapping[str, Node]
"""What a model or a step offers: tensor name -> expression, in file order."""


class Namespaces(Protocol):
    """What the models and earlier steps of a recipe offer."""

    @property
    def loaded(self) -> LoadedRecipe: ...

    @property
    def inputs(self) -> Mapping[str, ResolvedInput]: ...

    @property
    def layer_sources(self) -> Mapping[str, list[list[tuple[str, int]]]]:
        """Step with slices -> for each output layer, its (source, layer) pairs."""
        ...

    @property
    def notes(self) -> list[str]: ...

    @property
    def dropped_names(self) -> dict[str, str]: ...

    @property
    def mixtures(self) -> dict[str, list[Any]]:
        """Step with experts -> what its source's config has to follow, in order."""
        ...

    def namespace(self, name: str, base: str | None = None) -> Namespace: ...


@dataclass(frozen=True, slots=True)
class Slot:
    """One output tensor of a step before its parameters are known."""

    name: str
    sources: tuple[tuple[str, str], ...]
    """(model or step, tensor name) of each source."""
    base: tuple[str, str] | None
    params: Mapping[str, Value]
    weights: tuple[Value, ...]
    rules: tuple[Rule, ...]
    position: float | None
    """Depth within the slice; None where depth is that of the output."""
    part: int
    """Number of the slice; -1 outside of slices."""

    @property
    def models(self) -> list[str]:
        """The models and steps that make the tensor, the base last."""
        return [member for member, _ in self.members]

    @property
    def members(self) -> tuple[tuple[str, str], ...]:
        """Of each model and step, the base last, its name and that of its tensor."""
        return self.sources if self.base is None else (*self.sources, self.base)

    def spelled(self, names: Mapping[str, Mapping[str, str]]) -> Slot:
        """The same with the tensors' names as models have them themselves; model -> name here -> name there."""
        own = {member: (member[0], names.get(member[0], {}).get(member[1], member[1])) for member in self.members}
        base = None if self.base is None else own[self.base]
        return replace(self, sources=tuple(own[member] for member in self.sources), base=base)
