"""Merging two or three fine-tunes at a time of the eight, and what fine-tunes are to one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.quality.eight_tasks import TASKS, EightTasks
from benchmarks.quality.experiment import Experiment, Scores
from benchmarks.quality.lab import Lab
from mergekit_px.inspection.models import advise

METHODS: Mapping[str, Sequence[str]] = {
    "task arithmetic": ("task-arithmetic",),
    "TIES": ("ties",),
    "TSV-M": ("tsv-m",),
    "Iso-C": ("iso-c",),
    "svd 100%": ("svd", "--top-k", "100%"),
}
GROUPS: Mapping[int, Sequence[slice]] = {
    2: tuple(slice(start, start + 2) for start in range(0, 8, 2)),
    3: (slice(0, 3), slice(3, 6)),
}
"""How many at a time -> which of the eight tasks, in their order."""


def few(lab: Lab, rate: float) -> Scores:
    """Normalised accuracy at scale 1 over the tasks that were merged, mean over the groups of tasks."""
    tasks = EightTasks(lab, rate)
    base, names = lab.save("base", tasks.base), {name: lab.save(name, state) for name, state in tasks.tuned.items()}
    found = relations(base, list(names.values()))
    for count, groups in GROUPS.items():
        chosen = [tuple(TASKS)[group] for group in groups]

        def score(*line: str, chosen: Sequence[Sequence[str]] = chosen) -> float:
            scores = []
            for group in chosen:
                merged = lab.merge(*line, "--base", base, "--sources", *(names[name] for name in group))
                scores.append(tasks.normalised(merged, among=group))
            return float(np.mean(scores))

        found[f"pre-trained, {count}"] = float(np.mean([tasks.normalised(tasks.base, among=group) for group in chosen]))
        found[f"average, {count}"] = score("task-arithmetic", "--scale", str(1 / count))
        found |= {f"{title}, {count}": score(*line) for title, line in METHODS.items()}
    return found


def relations(base: str, names: Sequence[str]) -> Scores:
    """What the models are to one another, as `pxmerge advise` measures it."""
    found = advise(names, base=base).relations
    weights = [source.cosine for source in found.sources if source.cosine is not None]
    measured = {
        "(relative change)": found.relative,
        "(cosine of weights)": float(np.mean(weights)),
        "(cosine of changes)": found.cosine,
        "(effective rank, share)": found.rank_share,
        "(alignment)": found.alignment,
    }
    return {title: float(value) for title, value in measured.items() if value is not None}


def near(lab: Lab) -> Scores:
    return few(lab, 3e-4)


def far(lab: Lab) -> Scores:
    return few(lab, 1e-3)


EXPERIMENTS = (Experiment("few", near), Experiment("few-far", far))
