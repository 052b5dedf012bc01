"""One-shot federated learning: a coefficient for each client and tensor, distilled from the clients' ensemble."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.quality.coefficients import learned
from benchmarks.quality.experiment import Experiment, Scores
from benchmarks.quality.lab import Lab, added, difference, predict, right, score
from mergekit_px.learn.ofasd.settings import CoefficientSettings


def federated(lab: Lab, alpha: float, *, with_labels: bool) -> Scores:
    """A base trained on 100 digits, five clients on 900 by a Dirichlet split, 447 for the test.

    Coefficients are learned from 350 other digits without their labels, or from the clients' own with labels.
    """
    images, labels = lab.images, lab.labels
    test = slice(1350, None)
    base = lab.train(None, images[:100], labels[:100], epochs=150)
    pool = slice(100, 1000)
    shares = np.random.default_rng(lab.seed).dirichlet([alpha] * 5, size=10)
    owner = torch.tensor(
        [
            np.random.default_rng(lab.seed * 10000 + row).choice(5, p=shares[label])
            for row, label in enumerate(labels[pool].tolist())
        ]
    )
    parts = [(owner == client).nonzero().flatten() for client in range(5)]
    parts = [rows for rows in parts if len(rows)]
    clients = [lab.train(base, images[pool][rows], labels[pool][rows], epochs=20, rate=1e-3) for rows in parts]
    counts = [float(len(rows)) for rows in parts]
    deltas = [difference(client, base) for client in clients]
    by_count = [
        {name: count / sum(counts) * tensor for name, tensor in delta.items()}
        for count, delta in zip(counts, deltas, strict=True)
    ]
    logits = torch.stack([predict(state, images[test]) for state in clients])
    names = [lab.save(f"client{number}", state) for number, state in enumerate(clients)]
    start = lab.save("base", base)
    found = {
        "base": score(base, images[test], labels[test]),
        "best client": max(right(one, labels[test]) for one in logits),
        "FedAvg": score(added(base, deltas, 1 / len(deltas)), images[test], labels[test]),
        "FedAvg by count": score(added(base, by_count, 1.0), images[test], labels[test]),
        "teacher": right(logits.mean(0), labels[test]),
    }

    def arm(data: str, settings: CoefficientSettings) -> float:
        return score(learned(lab, start, names, data, settings, counts), images[test], labels[test])

    if with_labels:
        settings = CoefficientSettings(label_share=0.5, validation=0.1, test=0.01, seed=lab.seed)
        found["anisotropic CE+KD"] = arm(lab.data("pooled", images[pool], labels[pool]), settings)
        return found
    proxy = lab.data("proxy", images[1000:1350], labels[1000:1350])
    settings = CoefficientSettings(label_share=0.0, validation=0.25, test=0.03, seed=lab.seed)
    found["isotropic KD"] = arm(proxy, settings.model_copy(update={"granularity": "model"}))
    found["anisotropic KD"] = arm(proxy, settings)
    return found


def unlabelled(lab: Lab) -> Scores:
    return federated(lab, 0.5, with_labels=False)


def skewed(lab: Lab) -> Scores:
    return federated(lab, 0.1, with_labels=True)


EXPERIMENTS = (
    Experiment(
        "ofasd",
        unlabelled,
        (
            ("anisotropic KD > FedAvg", lambda s: s["anisotropic KD"] > s["FedAvg"]),
            ("anisotropic KD > isotropic KD", lambda s: s["anisotropic KD"] > s["isotropic KD"]),
            ("anisotropic KD <= teacher + 1", lambda s: s["anisotropic KD"] <= s["teacher"] + 1),
        ),
    ),
    Experiment(
        "ofasd-skewed",
        skewed,
        (("CE+KD > FedAvg by count + 2", lambda s: s["anisotropic CE+KD"] > s["FedAvg by count"] + 2),),
    ),
)
