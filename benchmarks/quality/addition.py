"""Adding task vectors to a base that is weak in every domain: one scale, or a coefficient for each tensor."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.quality.coefficients import learned
from benchmarks.quality.domains import DOMAINS, mean_score
from benchmarks.quality.experiment import Experiment, Scores
from benchmarks.quality.lab import Lab, added, difference, score
from mergekit_px.learn.ofasd import Settings


def addition(lab: Lab) -> Scores:
    """Four domains, a base of 150 images in all of them, four fine-tunes on 950, 200 labels to choose by."""
    images, labels = lab.images, lab.labels
    domains = DOMAINS.values()
    start = torch.cat([domain(images[:150]) for domain in domains])
    base = lab.train(None, start, labels[:150].repeat(4))
    tuned = [lab.train(base, domain(images[150:1100]), labels[150:1100], epochs=10, rate=1e-3) for domain in domains]
    deltas = [difference(state, base) for state in tuned]
    few = torch.cat([domain(images[1100 + 50 * n : 1150 + 50 * n]) for n, domain in enumerate(domains)])
    few_labels = labels[1100:1300]
    test = images[1300:], labels[1300:]

    best = max(range(21), key=lambda step: score(added(base, deltas, step / 20), few, few_labels))
    found = {
        "base": mean_score(base, *test),
        "best single": max(mean_score(state, *test) for state in tuned),
        "average": mean_score(added(base, deltas, 0.25), *test),
        "task arithmetic": mean_score(added(base, deltas, best / 20), *test),
    }
    names = [lab.save(f"domain{number}", state) for number, state in enumerate(tuned)]
    whole, data = lab.save("base", base), lab.data("few", few, few_labels)
    settings = Settings(objective="cross-entropy", validation=0.2, test=0.01, seed=lab.seed)
    found["isotropic CE"] = mean_score(learned(lab, whole, names, data, replace(settings, granularity="model")), *test)
    found["anisotropic CE"] = mean_score(learned(lab, whole, names, data, settings), *test)
    return found


EXPERIMENTS = (
    Experiment(
        "atlas",
        addition,
        (
            ("anisotropic CE > isotropic CE", lambda s: s["anisotropic CE"] > s["isotropic CE"]),
            ("anisotropic CE > task arithmetic", lambda s: s["anisotropic CE"] > s["task arithmetic"]),
            ("task arithmetic > base", lambda s: s["task arithmetic"] > s["base"]),
            ("base > best single", lambda s: s["base"] > s["best single"]),
        ),
    ),
)
