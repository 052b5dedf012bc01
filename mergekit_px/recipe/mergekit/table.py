"""mergekit's merge methods and what its parameters are called here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mergekit_px.recipe.mergekit.settings import Kind

Role = Literal["ignored", "end", "subtracted", "optional"]
"""What a method does with the base model. ``ignored``: nothing, it is a source like any other. ``end``: it is the
first of two ends. ``subtracted``: the differences of the sources to it are merged; ``optional``: if there is one."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a mergekit method.

    Attributes:
        target: its name here; ``weight`` stands for the weights of the sources.
        per_source: whether mergekit reads it for each source.
        required: whether mergekit refuses a config without it.
        default: mergekit's default where it must be written out here.
        words: what true and false are called here; a value that is not in it is not supported.
    """

    target: str
    kind: Kind = "number"
    per_source: bool = False
    required: bool = False
    default: float | None = None
    words: Mapping[bool, str | bool | None] | None = None


@dataclass(frozen=True, slots=True)
class PeerMethod:
    """A mergekit method that has an equal here.

    Attributes:
        target: its name here, where it is another.
        on_deltas: its name here if it is given an ``optional`` base.
        sources: how many sources are merged, an ``end`` counted; None for any number.
        like: the variant of the method here that is equal to it, if it is not the default.
    """

    name: str
    base: Role
    parameters: Mapping[str, Parameter]
    sources: int | None = None
    like: str | None = None
    target: str | None = None
    on_deltas: str | None = None

    @property
    def is_random(self) -> bool:
        return self.name.startswith(("dare", "della"))

    @property
    def is_exact(self) -> bool:
        """Whether mergekit computes it in float32 at least."""
        return self.name in ("linear", "slerp")


_WEIGHT = Parameter("weight", per_source=True, required=True)
_DENSITY = Parameter("density", per_source=True, default=1.0)
_GAMMA = Parameter("gamma", per_source=True, default=0.01)
_LAMBDA = Parameter("scale")
_NORMALIZE = Parameter("normalize", "boolean")
_DIVIDE = Parameter("divide_by", "boolean", words={True: "weights", False: "nothing"})
_RESCALE = Parameter("rescale", "boolean", words={True: "l1", False: "none"})
_PRUNING = {"weight": _WEIGHT, "density": _DENSITY, "lambda": _LAMBDA, "rescale": _RESCALE}
_IDLE = Parameter("", "boolean")
_WINDOW = Parameter("epsilon", per_source=True, default=0.15)
_THRESHOLD = Parameter("threshold")

METHODS: Mapping[str, PeerMethod] = {
    method.name: method
    for method in (
        PeerMethod("linear", "ignored", {"weight": _WEIGHT, "normalize": _NORMALIZE}),
        PeerMethod("slerp", "end", {"t": Parameter("t", required=True)}, sources=2),
        PeerMethod("task_arithmetic", "subtracted", {"weight": _WEIGHT, "lambda": _LAMBDA, "normalize": _NORMALIZE}),
        PeerMethod("ties", "subtracted", {**_PRUNING, "normalize": _DIVIDE}, like="mergekit"),
        PeerMethod("dare_linear", "subtracted", {**_PRUNING, "normalize": _NORMALIZE}, like="mergekit"),
        PeerMethod("dare_ties", "subtracted", {**_PRUNING, "normalize": _DIVIDE}, like="mergekit"),
        PeerMethod(
            "della_linear", "subtracted", {**_PRUNING, "epsilon": _WINDOW, "normalize": _NORMALIZE}, like="mergekit"
        ),
        PeerMethod("della", "subtracted", {**_PRUNING, "epsilon": _WINDOW, "normalize": _DIVIDE}, like="mergekit"),
        PeerMethod(
            "breadcrumbs", "subtracted", {**_PRUNING, "gamma": _GAMMA, "normalize": _NORMALIZE}, like="mergekit"
        ),
        PeerMethod(
            "breadcrumbs_ties", "subtracted", {**_PRUNING, "gamma": _GAMMA, "normalize": _DIVIDE}, like="mergekit"
        ),
        PeerMethod("passthrough", "ignored", {"scale": Parameter("scale", per_source=True)}, sources=1),
        PeerMethod(
            "nuslerp",
            "optional",
            {"weight": _WEIGHT, "nuslerp_flatten": Parameter("along", "boolean"), "nuslerp_row_wise": _IDLE},
            sources=2,
            on_deltas="nuslerp_deltas",
        ),
        PeerMethod(
            "multislerp",
            "optional",
            {"weight": _WEIGHT, "normalize_weights": _NORMALIZE},
            on_deltas="multislerp_deltas",
        ),
        PeerMethod("nearswap", "subtracted", {"t": Parameter("t", required=True)}, sources=1),
        PeerMethod(
            "model_stock",
            "subtracted",
            {"filter_wise": Parameter("along", "boolean", words={True: "rows", False: "tensor"})},
        ),
        PeerMethod(
            "karcher",
            "ignored",
            {"max_iter": Parameter("iterations", default=10), "tol": Parameter("tolerance", default=1e-5)},
        ),
        PeerMethod("sce", "subtracted", {"select_topk": Parameter("select")}, like="mergekit"),
        PeerMethod("arcee_fusion", "end", {}, sources=2, like="mergekit"),
        PeerMethod("ram", "subtracted", {"epsilon": _THRESHOLD}),
        PeerMethod(
            "ramplus_tl",
            "subtracted",
            {"epsilon": _THRESHOLD, "r": Parameter("growth"), "alpha": Parameter("clip")},
            like="mergekit",
            target="ram_plus",
        ),
    )
}

ALL_PARAMETERS = frozenset(
    (
        *("weight", "normalize", "t", "density", "rescale", "int8_mask", "lambda", "scale", "gamma", "epsilon"),
        *("select_topk", "filter_wise", "max_iter", "tol", "r", "alpha", "eps", "normalize_weights"),
        *("nuslerp_row_wise", "nuslerp_flatten"),
    )
)
"""Parameters of any mergekit method; mergekit passes over those that the method at hand does not have."""
