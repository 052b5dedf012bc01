"""Merging eight fine-tunes by their singular components, beside averaging, task arithmetic and TIES."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.quality.eight_tasks import EightTasks
from benchmarks.quality.experiment import Experiment, Scores
from benchmarks.quality.lab import Lab

SCALES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.2, 1.5)
"""Of the whole update; 1 / 8 of the sum of eight is their average."""

METHODS: Mapping[str, Sequence[str]] = {
    "task arithmetic": ("task-arithmetic",),
    "TIES": ("ties",),
    "TSV-M": ("tsv-m",),
    "Iso-C": ("iso-c",),
    "Iso-CTS": ("iso-cts",),
    **{f"svd {share}": ("svd", "--orthogonalise", "--top-k", share) for share in ("20%", "50%", "100%")},
    **{f"svd {share} plain": ("svd", "--no-orthogonalise", "--top-k", share) for share in ("20%", "50%", "100%")},
}


def spectral(lab: Lab, rate: float) -> Scores:
    """Normalised accuracy of every method at scale 1 and at the best scale on 200 validation images."""
    tasks = EightTasks(lab, rate)
    base, names = lab.save("base", tasks.base), [lab.save(name, state) for name, state in tasks.tuned.items()]

    def score(*line: str) -> float:
        return tasks.normalised(lab.merge(*line, "--base", base, "--sources", *names))

    def best_scale(*line: str) -> float:
        merged = lab.merge(*line, "--base", base, "--sources", *names)
        update = {name: tensor - tasks.base[name] for name, tensor in merged.items()}

        def validated(scale: float) -> float:
            state = {name: tensor + scale * update[name] for name, tensor in tasks.base.items()}
            return tasks.normalised(state, "validation")

        return max(SCALES, key=validated)

    found = {
        "(mean accuracy of fine-tunes)": tasks.accuracy(),
        "pre-trained": tasks.normalised(tasks.base),
        "average": score("task-arithmetic", "--scale", "0.125"),
    }
    for title, line in METHODS.items():
        scale = best_scale(*line)
        found[title] = score(*line)
        found[f"{title}, best scale"] = score(*line, "--scale", str(scale))
        found[f"({title}, scale)"] = scale
    return found


def near(lab: Lab) -> Scores:
    return spectral(lab, 3e-4)


def far(lab: Lab) -> Scores:
    return spectral(lab, 1e-3)


EXPERIMENTS = (Experiment("spectral", near), Experiment("spectral-far", far))
