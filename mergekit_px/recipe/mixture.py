"""What a recipe says of experts: a mixture that is built of dense models, and experts that are chosen of a mixture."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mergekit_px.located.validate import Part, Wanted

_NAME = Wanted("the name of a model or step", text=True)
_NUMBER = Wanted("a number")
_PROMPTS = Wanted("a list of texts")

FROM_PROMPTS = ("hidden", "embedding")
"""Routers that `pxmerge moe build` makes by reading prompts; a plan takes them from a file."""


class Expert(Part):
    """The MLP of one model, as one expert in every layer."""

    written: ClassVar[Wanted] = Wanted("the name of a model or step, or {model: name}", text=True)

    model: Annotated[str, _NAME]
    """A model or step of the shape of the mixture's source."""
    prompts: Annotated[list[str], _PROMPTS] = Field(default_factory=list)
    """Texts that this expert is for."""
    negative_prompts: Annotated[list[str], _PROMPTS] = Field(default_factory=list)
    """Texts that it is not for."""
    noise: Annotated[float, _NUMBER] = 0.0
    """Standard deviation of normal noise that is added to its weights, so that equal experts part in training."""
    scale: Annotated[float, _NUMBER] = 1.0
    """Factor of its output."""


class Router(Part):
    """What decides which experts a token goes to."""

    written: ClassVar[Wanted] = Wanted("random, uniform, embedding or hidden, or a mapping", text=True)

    kind: Annotated[
        Literal["random", "uniform", "zero", "embedding", "hidden", "file"],
        Wanted("random, uniform, zero, embedding, hidden or file"),
    ] = "random"
    """``random``: normal numbers. ``uniform``: between ``-scale`` and ``scale``. ``zero``: to be trained.
    ``embedding``: the mean embedding of each expert's prompts, in every layer; ``hidden``: the mean hidden state of
    the source at each layer on them; both for ``pxmerge moe build``. ``file``: the rows of ``model``."""
    scale: Annotated[float | None, _NUMBER] = None
    """Of random numbers their standard deviation or bound (0.02 and 1 / sqrt(width) if left out); of rows that are
    made of prompts their length (1 if left out)."""
    pooling: Annotated[Literal["last", "mean"], Wanted("last or mean")] = "last"
    """Of hidden states: the last token's, or the mean over a prompt's tokens."""
    model: Annotated[str | None, Wanted("the name of a model", text=True)] = None
    """A file with the rows of every layer, as ``pxmerge moe build`` writes it."""


class Mixture(Part):
    """Experts in the place of the step's MLPs; everything else of the step stays as it is."""

    family: Annotated[str | None, Wanted("a model type such as mixtral", text=True)] = None
    """The kind of mixture: ``mixtral``, ``qwen2_moe``, ``qwen3_moe`` and others; what fits the source if left out."""
    experts: Annotated[list[Expert], Wanted("a list of models")]
    """The experts, in order."""
    shared: Annotated[Expert | None, Wanted("the name of a model, or a mapping")] = None
    """An expert that all tokens go to, beside those that are chosen."""
    experts_per_token: Annotated[int, Wanted("a whole number from 1 on")] = 2
    """How many experts a token goes to."""
    router: Annotated[Router, Wanted("random, uniform, embedding or hidden, or a mapping")] = Field(
        default_factory=Router
    )
    """What decides which."""

    def members(self) -> list[Expert]:
        """The experts, the shared one last."""
        return [*self.experts, *([self.shared] if self.shared is not None else [])]


Group = tuple[tuple[int, float], ...]
"""The experts that one is made of, each with its share; the shares add up to 1."""


class ExpertChoice(Part):
    """Experts that are chosen of a mixture, in their new order; router, biases and config follow."""

    written: ClassVar[Wanted] = Wanted("a mapping such as {keep: [0, 1]}")

    keep: Annotated[list[Any], Wanted("a list of numbers, or of lists or {number: weight} for means")] = Field(
        default_factory=list
    )
    """The experts of the result in order, in every layer: a number for one that stays as it is, a list of numbers for
    the mean of several, ``{3: 0.7, 5: 0.3}`` for a weighted one."""
    drop: Annotated[list[int], Wanted("a list of numbers")] = Field(default_factory=list)
    """Instead of ``keep``: the experts that are left out."""
    merge: Annotated[list[Any], Wanted("a list of lists of numbers, or of {number: weight}")] = Field(
        default_factory=list
    )
    """Instead of ``keep``: groups that become one expert each, in the place of the first of the group."""
    layers: Annotated[dict[str, list[Any]], Wanted("a mapping from layers to lists like those of keep")] = Field(
        default_factory=dict
    )
    """Other experts in some layers, by number, as many as in the others."""
    of: Annotated[int | None, Wanted("a whole number from 1 on")] = None
    """How many experts each layer has of which they are chosen; with another number nothing is."""
    experts_per_token: Annotated[int | None, Wanted("a whole number from 1 on")] = None
    """How many a token goes to; as before, and at most as many as there are, if left out."""

    def of_layer(self, layer: int | None, count: int) -> list[Group]:
        """What the experts of a layer are made of, of so many as it has."""
        listed = self.layers.get(str(layer)) or self.keep
        if listed:
            return [group_of(entry) for entry in listed]
        merged = {group[0][0]: group for group in map(group_of, self.merge)}
        gone = {number for group in merged.values() for number, _ in group} | set(self.drop)
        return [
            merged.get(number, ((number, 1.0),)) for number in range(count) if number in merged or number not in gone
        ]

    def named(self) -> set[int]:
        """The numbers that ``drop`` and ``merge`` speak of."""
        return {*self.drop, *(number for group in map(group_of, self.merge) for number, _ in group)}


def group_of(entry: Any) -> Group:
    """One expert as written. Raises ``ValueError`` for what is none."""
    if isinstance(entry, dict) and not all(isinstance(key, str) and key.isdecimal() for key in entry):
        raise ValueError("experts are different whole numbers from 0 on")
    pairs = [(int(key), value) for key, value in entry.items()] if isinstance(entry, dict) else None
    if pairs is None:
        pairs = [(number, 1.0) for number in (entry if isinstance(entry, list) else [entry])]
    numbers = [number for number, _ in pairs]
    whole = all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers)
    weights = [weight for _, weight in pairs]
    if not whole or not numbers or len(set(numbers)) < len(numbers):
        raise ValueError("experts are different whole numbers from 0 on")
    if not all(isinstance(weight, int | float) and 0 <= weight < float("inf") for weight in weights) or not sum(
        weights
    ):
        raise ValueError("weights are numbers from 0 on, and not all 0")
    return tuple((number, weight / sum(weights)) for number, weight in pairs)
