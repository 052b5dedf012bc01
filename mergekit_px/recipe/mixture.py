"""What a recipe says of experts: a mixture that is built of dense models, and experts that are chosen of a mixture."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

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
