"""Spectral merges as they are, and scaled so that sources find 0.6 of their own updates in them (``--recover``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import mean

from benchmarks.quality.eight_tasks import EightTasks
from benchmarks.quality.experiment import Experiment, Scores
from benchmarks.quality.lab import Lab

METHODS: Mapping[str, Sequence[str]] = {
    "TSV-M": ("tsv-m",),
    "svd 100%": ("svd", "--top-k", "100%"),
    "svd 20%": ("svd", "--top-k", "20%"),
    "svd 100% plain": ("svd", "--top-k", "100%", "--no-orthogonalise"),
    "svd 100%, svc": ("svd", "--top-k", "100%", "--calibrate", "svc"),
    "Iso-C": ("iso-c",),
    "Iso-CTS": ("iso-cts",),
    "DC-Merge": ("dc-merge",),
    "WUDI, closed, both sides": ("wudi", "--solver", "closed", "--sides", "both"),
    "boosting": ("subspace-boosting",),
}


def recovered(lab: Lab, rate: float) -> Scores:
    tasks = EightTasks(lab, rate)
    base, names = lab.save("base", tasks.base), [lab.save(name, state) for name, state in tasks.tuned.items()]
    found = {"pre-trained": tasks.normalised(tasks.base)}
    for title, line in METHODS.items():
        for option in ("", "--recover"):
            more = (option, "0.6") if option else ()
            merged = lab.merge(*line, *more, "--base", base, "--sources", *names)
            found[f"{title} {option}".strip()] = tasks.normalised(merged)
    return found


def table(rows: Sequence[Scores]) -> str:
    lines = ["| | as it is | by seed | `--recover 0.6` | by seed |", "| --- | ---: | --- | ---: | --- |"]
    for title in METHODS:
        cells = []
        for name in (title, f"{title} --recover"):
            cells += [f"{mean(row[name] for row in rows):.1f}", " / ".join(f"{row[name]:.1f}" for row in rows)]
        lines.append(f"| {' | '.join([title, *cells])} |")
    return "\n".join(lines)


EXPERIMENTS = (
    Experiment("recover", partial(recovered, rate=3e-4), table=table),
    Experiment("recover-far", partial(recovered, rate=1e-3), table=table),
)
