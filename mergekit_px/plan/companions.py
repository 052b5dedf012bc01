"""Statistics that go with the sources of a step: which inputs they are, and where each tensor's are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mergekit_px.errors import PlanError, RecipeError, TensorMismatchError
from mergekit_px.methods import find_method
from mergekit_px.methods.declare import Companions, Method
from mergekit_px.plan.nodes import Node
from mergekit_px.plan.slots import Slot
from mergekit_px.recipe.model import Step

Companion = tuple[str, str]
"""A model or step, and the name in it of the tensor whose statistics it holds."""


def model_names(step: Step) -> list[str]:
    """The sources of a step that are models: the first half where its method takes companions, else all."""
    names = step.source_names()
    return names[: (len(names) + 1) // 2] if find_method(step.method).companions is not None else names


def split_companions(step: Step, method: Method, slot: Slot, where: str) -> tuple[Slot, tuple[Companion, ...]]:
    """The slot with its models alone, and their companions in the same order; none where the step takes none.

    Args:
        method: that of the slot, by a rule perhaps another than the step's.

    Raises:
        RecipeError: an odd number of sources, weighted companions, or a method with companions in a step without.
    """
    companions = find_method(step.method).companions
    if companions is None:
        if method.companions is not None:
            what = f"{method.name} takes {method.companions.what} with its sources, and step method {step.method} none"
            raise RecipeError(what, where=where, hint=f"make {method.name} the step's method, and rules the exceptions")
        return slot, ()
    count, odd = divmod(len(slot.sources), 2)
    if odd or not count:
        raise RecipeError(
            f"{step.method} takes models and then as many files of {companions.what}, {len(slot.sources)} sources"
            " are given",
            where=where,
            hint="make the files with `pxmerge stats`, and name them after the models in the same order",
        )
    if any(weight is not None for weight in slot.weights[count:]):
        raise RecipeError(f"{companions.what} takes no weight", where=where, hint="weight the model that it is of")
    models = replace(slot, sources=slot.sources[:count], weights=slot.weights[:count])
    return models, (slot.sources[count:] if method.companions is not None else ())


def companion_nodes(
    companions: Companions,
    found: Sequence[Companion],
    namespaces: Mapping[str, Mapping[str, Node]],
    shape: tuple[int, ...],
    where: str,
) -> list[Node]:
    """The statistics of one tensor, one from each companion; empty where none of them has any.

    Raises:
        PlanError: an input without any statistics of the kind.
        TensorMismatchError: some have them and others do not, or of another shape than the tensor's.
    """
    nodes = []
    for source, name in found:
        namespace = namespaces[source]
        if not any(tensor.endswith(companions.suffix) for tensor in namespace):
            raise PlanError(
                f"'{source}' holds no {companions.what}",
                where=where,
                hint="name the models first and then, in the same order, the files that `pxmerge stats` made of them",
            )
        nodes.append(namespace.get(name + companions.suffix))
    if all(node is None for node in nodes):
        return []
    expected = companions.shape(shape)
    for (source, name), node in zip(found, nodes, strict=True):
        if node is None:
            raise TensorMismatchError(f"'{source}' lacks the {companions.what} of '{name}'", where=where)
        if node.shape != expected or not node.dtype.arithmetic:
            what = f"'{name + companions.suffix}' is {list(node.shape)} in '{source}' and {list(expected)} is expected"
            raise TensorMismatchError(what, where=where, hint="the statistics are of another model")
    return [node for node in nodes if node is not None]
