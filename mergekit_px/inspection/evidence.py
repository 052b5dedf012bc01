"""What was measured on real fine-tunes, and what these were to one another: the figures of docs/quality.md.

A test holds the figures against that page, so neither changes without the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

PAGE = "docs/quality.md"

ERROR = 1.5
"""Points below which a difference of two scores says nothing: the standard error of one accuracy there."""

CAVEAT = (
    "what was measured are small image encoders with heads that stay as they are, no language models and no LoRAs; the "
    "order may differ for yours, and where fine-tunes moved far from a base that was good already every spectral "
    "method was below the average: score the result (pxmerge search)"
)


@dataclass(frozen=True)
class MeasuredMethod:
    """How a row of the suites is asked for."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    base_free: bool = False
    """Whether it needs no base."""


METHODS: Mapping[str, MeasuredMethod] = {
    "average": MeasuredMethod("linear", base_free=True),
    "task arithmetic": MeasuredMethod("task_arithmetic"),
    "TIES": MeasuredMethod("ties"),
    "TSV-M": MeasuredMethod("tsv_m"),
    "Iso-C": MeasuredMethod("iso_c"),
    "Iso-CTS": MeasuredMethod("iso_cts"),
    "svd 100%": MeasuredMethod("svd", {"top_k": "100%"}),
}
"""Title of a row -> the method with the settings that were measured."""


@dataclass(frozen=True)
class Suite:
    """Scores at scale 1 in percent of the fine-tunes' accuracy, and how the fine-tunes lie to one another."""

    experiment: str
    sources: int
    relative: float
    weights_cosine: float
    cosine: float
    rank_share: float
    alignment: float
    pretrained: float
    scores: Mapping[str, float]


_near = partial(
    Suite,
    relative=0.042,
    weights_cosine=0.999,
    cosine=0.067,
    rank_share=0.438,
    alignment=0.796,
)
_far = partial(
    Suite,
    relative=0.084,
    weights_cosine=0.996,
    cosine=0.056,
    rank_share=0.467,
    alignment=0.798,
)
"""The two sets of fine-tunes that all suites draw from, and how they lie to one another."""

SUITES: tuple[Suite, ...] = (
    _near(
        "few",
        sources=2,
        pretrained=75.0,
        scores={"average": 90.3, "task arithmetic": 91.1, "TIES": 89.2, "TSV-M": 93.1, "Iso-C": 83.9, "svd 100%": 93.0},
    ),
    _near(
        "few",
        sources=3,
        pretrained=74.6,
        scores={"average": 87.5, "task arithmetic": 68.9, "TIES": 88.7, "TSV-M": 91.6, "Iso-C": 85.0, "svd 100%": 91.7},
    ),
    _far(
        "few-far",
        sources=2,
        pretrained=72.8,
        scores={"average": 90.2, "task arithmetic": 81.9, "TIES": 88.7, "TSV-M": 92.5, "Iso-C": 85.1, "svd 100%": 92.4},
    ),
    _far(
        "few-far",
        sources=3,
        pretrained=73.0,
        scores={"average": 87.2, "task arithmetic": 45.3, "TIES": 87.2, "TSV-M": 90.9, "Iso-C": 87.0, "svd 100%": 91.0},
    ),
    _near(
        "spectral",
        sources=8,
        pretrained=75.2,
        scores={
            "average": 80.4,
            "task arithmetic": 19.9,
            "TIES": 81.9,
            "TSV-M": 86.3,
            "Iso-C": 85.3,
            "Iso-CTS": 84.4,
            "svd 100%": 86.6,
        },
    ),
    _far(
        "spectral-far",
        sources=8,
        pretrained=69.7,
        scores={
            "average": 76.8,
            "task arithmetic": 13.9,
            "TIES": 68.5,
            "TSV-M": 81.6,
            "Iso-C": 82.5,
            "Iso-CTS": 81.0,
            "svd 100%": 81.0,
        },
    ),
)


def nearest_suite(sources: int, relative: float | None) -> Suite:
    """The suite of about as many sources, and of those the one whose fine-tunes moved about as far."""

    def distance(suite: Suite) -> tuple[float, float]:
        moved = abs(math.log(relative / suite.relative)) if relative else 0.0
        return abs(math.log(sources / suite.sources)), moved

    return min(SUITES, key=distance)
