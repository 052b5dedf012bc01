"""What an experiment is, and where experiments are found."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import benchmarks.quality
from benchmarks.quality.lab import Lab

Scores = dict[str, float]
Claim = tuple[str, Callable[[Mapping[str, float]], float]]
"""What is said, and by how much it is so: above 0 where it is true."""


def ahead(first: str, second: str, *, by: float = 0.0) -> Claim:
    """That a score is above another."""
    text = f"{first} > {second} + {by:g}" if by else f"{first} > {second}"
    return text, lambda scores: scores[first] - scores[second] - by


@dataclass(frozen=True)
class Experiment:
    """A function from the data of one seed to scores, and what is claimed of them."""

    name: str
    measure: Callable[[Lab], Scores]
    claims: tuple[Claim, ...] = ()
    """Checked: on average over the seeds true by more than two standard errors."""
    compared: tuple[Claim, ...] = ()
    """Shown in the same way, and not checked."""
    table: Callable[[Sequence[Scores]], str] | None = None
    """Makes the table of the scores of all seeds; a line for each score if left out."""
    by_default: bool = True
    """Whether it runs without being named."""


def find_experiments() -> dict[str, Experiment]:
    """The experiments of all modules of this package, by name."""
    found = {}
    for module in pkgutil.iter_modules(benchmarks.quality.__path__):
        if module.name != "__main__":
            contents = importlib.import_module(f"benchmarks.quality.{module.name}")
            found.update({one.name: one for one in getattr(contents, "EXPERIMENTS", ())})
    return found
