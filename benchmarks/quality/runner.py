"""Measure experiments, one seed after another or several at a time, and print what they found."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from benchmarks.quality.experiment import Experiment, Scores, find_experiments
from benchmarks.quality.lab import Lab


def measure(
    name: str, seed: int, work: Path | None, methods: Sequence[str] | None = None, scales: bool = True
) -> tuple[Scores, float]:
    """The scores of an experiment at one seed, and the processor seconds they took now.

    Args:
        work: a folder in which what was made stays, for the next run to go on with.
        methods: those that are wanted of an experiment that compares methods.
        scales: whether it looks for the best scale of each.
    """
    import torch

    torch.set_num_threads(1)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as passing:
        folder = Path(passing) if work is None else work / name / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        scores = find_experiments()[name].measure(Lab(seed, folder, methods, scales=scales))
    return scores, time.process_time() - started


def report(experiment: Experiment, rows: Sequence[Scores], seconds: float) -> bool:
    """Print the scores of an experiment and whether its claims hold."""
    means = {title: mean(row[title] for row in rows) for title in rows[0]}
    print(f"\n{experiment.name}, {len(rows)} seeds, {seconds:.0f} s of processor time")
    if experiment.table is not None:
        print(experiment.table(rows))
    else:
        for title, value in means.items():
            print(f"  {title:36} {value:7.2f}   " + " ".join(f"{row[title]:7.2f}" for row in rows))
    verdicts = {}
    for text, margin in (*experiment.claims, *experiment.compared):
        margins = [margin(row) for row in rows]
        verdicts[text] = verdict(margins)
        each = f"above 0 in {sum(one > 0 for one in margins)} of {len(rows)} seeds"
        print(f"  {verdicts[text]}: {text} (by {mean(margins):.2f} ± {standard_error(margins):.2f}, {each})")
    print(json.dumps({"experiment": experiment.name, "mean": means, "seeds": rows, "holds": verdicts}), flush=True)
    return all(verdicts[text] == "holds" for text, _ in experiment.claims)


def verdict(margins: Sequence[float]) -> str:
    """Of a claim, from how much it is true by at each seed."""
    if abs(mean(margins)) <= 2 * standard_error(margins):
        return "a tie"
    return "holds" if mean(margins) > 0 else "FAILS"


def standard_error(values: Sequence[float]) -> float:
    """Of their mean; 0 for a single one, of which nothing is known."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def run(
    experiments: Mapping[str, Experiment],
    seeds: int,
    jobs: int,
    work: Path | None = None,
    methods: Sequence[str] | None = None,
    scales: bool = True,
) -> bool:
    """Measure and report; with one job in this process, where an error shows itself best."""
    if jobs == 1:
        held = []
        for name, experiment in experiments.items():
            found = [measure(name, seed, work, methods, scales) for seed in range(seeds)]
            held.append(report(experiment, [row for row, _ in found], sum(seconds for _, seconds in found)))
        return all(held)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {
            name: [pool.submit(measure, name, seed, work, methods, scales) for seed in range(seeds)]
            for name in experiments
        }
        held = []
        for name, experiment in experiments.items():
            found = [one.result() for one in futures[name]]
            held.append(report(experiment, [row for row, _ in found], sum(seconds for _, seconds in found)))
    return all(held)
