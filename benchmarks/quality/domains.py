"""Four domains of the digits with the same labels, and a model's mean accuracy over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from benchmarks.quality.lab import State, score

DOMAINS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda images: images,
    "turned": lambda images: images.rot90(1, (2, 3)),
    "inverted": lambda images: 1 - images,
    "flipped": lambda images: images.flip(3),
}


def domain_scores(state: State, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Percent of right answers in each domain."""
    return {name: score(state, domain(images), labels) for name, domain in DOMAINS.items()}


def mean_score(state: State, images: Tensor, labels: Tensor) -> float:
    found = domain_scores(state, images, labels)
    return sum(found.values()) / len(found)
