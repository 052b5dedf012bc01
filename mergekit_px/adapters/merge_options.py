"""How several adapters are made into one. Every method but RobustMerge is defined on the updates dW, not on the
factors, so ranks and scales may differ.

==================  ========================================================================================
``linear``          ``sum w_i dW_i``, at its own rank unless a lower one is asked
``cat``             the same, as stacked factors: exact, the rank is the sum of the ranks
``svd``             the nearest adapter of the wanted rank to ``sum w_i dW_i``; dW is never formed
``ties``            on dW: trim, elect signs, combine; then the nearest of the wanted rank
``dare_linear``     on dW: drop at random, rescale, add; then the nearest of the wanted rank
``dare_ties``       on dW: drop at random, elect signs, combine; then the nearest of the wanted rank
``magnitude_prune`` on dW: keep the largest, add; then the nearest of the wanted rank
``knots``           a merger on ``diag(s) V_t^T`` in the common left basis (arXiv 2410.19735)
``core``            a merger on the cores in common bases of both sides (arXiv 2509.17786)
``ctm``             a merger after compression to common bases of the wanted rank (arXiv 2606.03723)
``robust``          RobustMerge, on the factors (arXiv 2502.17159)
==================  ========================================================================================

What PEFT's ``add_weighted_adapter`` computes under the names linear, ties, dare and magnitude_prune is another thing:
it combines the A and the B each by itself, which leaves cross terms B_i A_j in the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from mergekit_px.adapters.mergers import TRIMMING, DivideBy, Merger, find_merger
from mergekit_px.errors import UsageError

Method = Literal[
    "linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "knots", "core", "ctm", "robust"
]

METHODS: tuple[Method, ...] = (
    "linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "knots", "core", "ctm", "robust",
)  # fmt: skip

_ON_DELTAS = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How adapters are merged.

    Attributes:
        weights: one for each adapter; 1 / T each if left out.
        rank: of the result; the largest rank of the adapters if left out (``cat`` and ``linear``: what is needed).
        merger: the rule inside ``knots``, ``core`` and ``ctm``, by name or as a function.
        density: share of entries that is kept: of largest magnitude (0.2 by default), or at random (0.5).
        scope: where the largest magnitudes are sought: in all modules of an adapter together (the default, but for
            ``core`` and ``ctm``), or in each alone.
        divide_by: what TIES divides the sum over agreeing adapters by.
        scale: factor of the result (lambda).
        calibrate: damp the directions that many B share first, and give the result the adapters' mean norm (Pico).
        balance: beta of ``ctm``.
        isotropic: make the merged core's singular values equal (``core`` only).
        seed: of random rules.
        dtype: of the written factors, a torch dtype's name; that of the first adapter if left out.
    """

    method: Method = "svd"
    weights: Sequence[float] | None = None
    rank: int | None = None
    merger: str | Merger = "ties"
    density: float | None = None
    scope: Literal["model", "tensor"] | None = None
    divide_by: DivideBy = "weights"
    scale: float = 1.0
    calibrate: bool = False
    balance: float = 0.0
    isotropic: bool = False
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method '{self.method}'", hint=f"known are {', '.join(METHODS)}")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"a rank must be positive, got {self.rank}")
        if self.density is not None and not 0 <= self.density <= 1:
            raise UsageError(f"a density must be from 0 to 1, got {self.density}")
        if self.calibrate and self.method == "robust":
            raise UsageError("robust works on the factors, so it cannot be calibrated")
        find_merger(self.merger)

    @property
    def rule(self) -> str | Merger:
        """The merger that the method uses."""
        return self.method if self.method in _ON_DELTAS else self.merger

    def without_effect(self) -> list[str]:
        """The fields that were given and that the method, or its rule, does not look at."""
        rule = self.rule if self.method in (*_ON_DELTAS, "knots", "core", "ctm") else "linear"
        known = isinstance(rule, str)
        looked_at = {
            "merger": self.method in ("knots", "core", "ctm"),
            "density": rule != "linear",
            "scope": not known or rule in TRIMMING,
            "divide_by": not known or rule in ("ties", "dare_ties"),
            "seed": not known or rule in ("dare_linear", "dare_ties"),
            "balance": self.method == "ctm",
            "isotropic": self.method == "core",
        }
        given = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        return [name for name in given if not looked_at.get(name, True)]

    @property
    def forms_updates(self) -> bool:
        """Whether dW is formed, all (out, in) of it."""
        return self.method in _ON_DELTAS

    @property
    def trims_model(self) -> bool:
        """Whether one cut serves all modules of an adapter."""
        return self.scope == "model" or (self.scope is None and self.method not in ("core", "ctm"))

    @property
    def kept_share(self) -> float:
        """The density, or its default."""
        if self.density is not None:
            return self.density
        return 0.5 if self.rule in ("dare_linear", "dare_ties") else 0.2
