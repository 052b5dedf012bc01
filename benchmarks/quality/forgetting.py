"""Subtracting a task vector from a base that is good in every domain: its own domain is forgotten, the others less."""

from __future__ import annotations

import torch

from benchmarks.quality.domains import DOMAINS, domain_scores
from benchmarks.quality.experiment import Experiment, Scores, ahead
from benchmarks.quality.lab import Lab, State

FORGOTTEN = "turned"


def forgetting(lab: Lab) -> Scores:
    """A base of 1000 images in every domain, a fine-tune on 300 others in one.

    The control is a random vector in which every tensor has the norm that it has in the task vector.
    """
    images, labels = lab.images, lab.labels
    known = torch.cat([domain(images[:1000]) for domain in DOMAINS.values()])
    base = lab.train(None, known, labels[:1000].repeat(len(DOMAINS)))
    tuned = lab.train(base, DOMAINS[FORGOTTEN](images[1000:1300]), labels[1000:1300], epochs=10, rate=1e-3)
    generator = torch.Generator().manual_seed(lab.seed)
    control = {}
    for name, tensor in tuned.items():
        noise = torch.randn(tensor.shape, generator=generator)
        control[name] = base[name] + noise * ((tensor - base[name]).norm() / noise.norm())

    def without(title: str, state: State, scale: float) -> State:
        vector = lab.write(f"{title}-vector", "subtract", lab.save(title, state), start)
        return lab.merge("add", start, vector, "--weights", str(-scale))

    def scores(state: State) -> tuple[float, float]:
        found = domain_scores(state, images[1300:], labels[1300:])
        target = found.pop(FORGOTTEN)
        return target, sum(found.values()) / len(found)

    start = lab.save("base", base)
    found = {}
    arms = {"base": base, "negated x 1.5": without("tuned", tuned, 1.5), "random x 1.5": without("noise", control, 1.5)}
    arms["negated x 2"] = without("tuned", tuned, 2.0)
    for title, state in arms.items():
        found[f"{title}, target"], found[f"{title}, others"] = scores(state)
    for part in ("target", "others"):
        for title in ("negated x 1.5", "random x 1.5"):
            found[f"(drop of {part}, {title})"] = found[f"base, {part}"] - found[f"{title}, {part}"]
    return found


EXPERIMENTS = (
    Experiment(
        "forgetting",
        forgetting,
        (
            (
                "the target falls by more than 1.5 times the fall of the others",
                lambda s: s["(drop of target, negated x 1.5)"] - 1.5 * s["(drop of others, negated x 1.5)"],
            ),
            ahead("(drop of target, negated x 1.5)", "(drop of target, random x 1.5)", by=10),
        ),
    ),
)
