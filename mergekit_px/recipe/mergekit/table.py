"""mergekit's merge methods and what its parameters are called here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mergekit_px.recipe.mergekit.settings import Kind

Role = Literal["ignored", "end", "subtracted"]
"""What a method does with the base model. ``ignored``: nothing, it may be a source like any other. ``end``: it is the
first of two ends. ``subtracted``: the differences of the sources to it are merged."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a mergekit method.

    Attributes:
        target: its name here; ``weight`` stands for the weights of the sources.
        per_source: whether mergekit reads it for each source.
        required: whether mergekit refuses a config without it.
        default: mergekit's default where it must be written out here.
        words: what true and false are called here.
    """

    target: str
    kind: Kind = "number"
    per_source: bool = False
    required: bool = False
    default: float | None = None
    words: Mapping[bool, str] | None = None


@dataclass(frozen=True, slots=True)
class PeerMethod:
    """A mergekit method that has an equal here, under the same name.

    Attributes:
        sources: how many sources it takes, an ``end`` counted; None for any number.
        like: the variant of the method here that is equal to it, if it is not the default.
    """

    name: str
    base: Role
    parameters: Mapping[str, Parameter]
    sources: int | None = None
    like: str | None = None

    @property
    def is_random(self) -> bool:
        return self.name.startswith("dare")


_WEIGHT = Parameter("weight", per_source=True, required=True)
_DENSITY = Parameter("density", per_source=True, default=1.0)
_LAMBDA = Parameter("scale")
_NORMALIZE = Parameter("normalize", "boolean")
_DIVIDE = Parameter("divide_by", "boolean", words={True: "weights", False: "nothing"})
_RESCALE = Parameter("rescale", "boolean", words={True: "l1", False: "none"})
_PRUNING = {"weight": _WEIGHT, "density": _DENSITY, "lambda": _LAMBDA, "rescale": _RESCALE}

METHODS: Mapping[str, PeerMethod] = {
    method.name: method
    for method in (
        PeerMethod("linear", "ignored", {"weight": _WEIGHT, "normalize": _NORMALIZE}),
        PeerMethod("slerp", "end", {"t": Parameter("t", required=True)}, sources=2),
        PeerMethod("task_arithmetic", "subtracted", {"weight": _WEIGHT, "lambda": _LAMBDA, "normalize": _NORMALIZE}),
        PeerMethod("ties", "subtracted", {**_PRUNING, "normalize": _DIVIDE}, like="mergekit"),
        PeerMethod("dare_linear", "subtracted", {**_PRUNING, "normalize": _NORMALIZE}, like="mergekit"),
        PeerMethod("dare_ties", "subtracted", {**_PRUNING, "normalize": _DIVIDE}, like="mergekit"),
        PeerMethod("passthrough", "ignored", {"scale": Parameter("scale", per_source=True)}, sources=1),
    )
}

NOT_YET = frozenset(
    (
        *("arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "karcher", "model_stock"),
        *("multislerp", "nearswap", "nuslerp", "ram", "ramplus_tl", "sce"),
    )
)
"""mergekit methods without an equal here."""

ALL_PARAMETERS = frozenset(
    (
        *("weight", "normalize", "t", "density", "rescale", "int8_mask", "lambda", "scale", "gamma", "epsilon"),
        *("select_topk", "filter_wise", "max_iter", "tol", "r", "alpha", "eps", "normalize_weights"),
        *("nuslerp_row_wise", "nuslerp_flatten"),
    )
)
"""Parameters of any mergekit method; mergekit passes over those that the method at hand does not have."""
