"""One-shot federated learning: a coefficient for each client and tensor, distilled from the clients' ensemble."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.coefficients import learned
from benchmarks.quality.experiment import Claim, Experiment, Scores, ahead
from benchmarks.quality.lab import MODEL, Lab, State, added, difference, predict, right
from benchmarks.quality.vit import TinyViT, larger
from mergekit_px.learn.ofasd.settings import CoefficientSettings


def split(labels: Tensor, clients: int, alpha: float, seed: int) -> list[Tensor]:
    """The rows of each client: for every class shares of the clients are drawn by a Dirichlet distribution."""
    shares = np.random.default_rng(seed).dirichlet([alpha] * clients, size=int(labels.max()) + 1)
    owner = torch.tensor(
        [
            np.random.default_rng(seed * 10000 + row).choice(clients, p=shares[label])
            for row, label in enumerate(labels.tolist())
        ]
    )
    parts = [(owner == client).nonzero().flatten() for client in range(clients)]
    return [rows for rows in parts if len(rows)]


@dataclass(frozen=True)
class Federation:
    """A base, its clients' fine-tunes, how many examples each had, and what tells how good a model is."""

    base: State
    clients: Sequence[State]
    counts: Sequence[float]
    logits: Callable[[State], Tensor]
    """Of the test examples."""
    labels: Tensor

    def score(self, state: State) -> float:
        return right(self.logits(state), self.labels)

    def by_count(self) -> State:
        """FedAvg, weighted by the numbers of examples: what learned coefficients begin with."""
        deltas = [difference(client, self.base) for client in self.clients]
        total = sum(self.counts)
        weighted = [
            {name: count / total * tensor for name, tensor in delta.items()}
            for count, delta in zip(self.counts, deltas, strict=True)
        ]
        return added(self.base, weighted, 1.0)

    def teacher(self, logits: Callable[[State], Tensor]) -> Tensor:
        """Logits of the ensemble, weighted by the numbers of examples: what `pxmerge ofasd` distils."""
        shares = [count / sum(self.counts) for count in self.counts]
        return torch.stack([share * logits(one) for share, one in zip(shares, self.clients, strict=True)]).sum(0)

    def controls(self) -> Scores:
        """What is there without learning."""
        deltas = [difference(client, self.base) for client in self.clients]
        found = {
            "base": self.score(self.base),
            "best client": max(map(self.score, self.clients)),
            "FedAvg": self.score(added(self.base, deltas, 1 / len(deltas))),
            "FedAvg by count": self.score(self.by_count()),
            "teacher": right(self.teacher(self.logits), self.labels),
        }
        return found


def digits(
    lab: Lab,
    alpha: float,
    *,
    with_labels: bool = False,
    clients: int = 5,
    make: Callable[[], TinyViT] = TinyViT,
) -> Scores:
    """A base trained on 100 digits, clients on 900 by a Dirichlet split, 447 for the test.

    Coefficients are learned from 350 other digits without their labels, or from the clients' own with labels. Beside
    them all weights are trained by the same, from FedAvg by count, as the clients were.
    """
    images, labels = lab.images, lab.labels
    pool, proxy, test = slice(100, 1000), slice(1000, 1350), slice(1350, None)
    base = lab.train(None, images[:100], labels[:100], epochs=150, make=make)
    parts = split(labels[pool], clients, alpha, lab.seed)

    def tuned(start: State, images: Tensor, labels: Tensor) -> State:
        return lab.train(start, images, labels, epochs=20, rate=1e-3, make=make)

    federation = Federation(
        base,
        [tuned(base, images[pool][rows], labels[pool][rows]) for rows in parts],
        [float(len(rows)) for rows in parts],
        lambda state: predict(state, images[test], make),
        labels[test],
    )
    names = [lab.save(f"client{number}", state) for number, state in enumerate(federation.clients)]
    start, model = lab.save("base", base), MODEL.replace(TinyViT.__name__, make.__name__)

    def both(objective: str, data: str, settings: CoefficientSettings) -> Scores:
        whole = settings.model_copy(update={"granularity": "model"})
        return {
            f"{title} {objective}": federation.score(learned(lab, start, names, data, one, federation.counts, model))
            for title, one in (("isotropic", whole), ("anisotropic", settings))
        }

    found = federation.controls()
    begin = federation.by_count()
    if with_labels:
        settings = CoefficientSettings(label_share=0.5, validation=0.1, test=0.01, seed=lab.seed)
        found |= both("CE+KD", lab.data("pooled", images[pool], labels[pool]), settings)
        found["all weights CE"] = federation.score(tuned(begin, images[pool], labels[pool]))
        return found
    settings = CoefficientSettings(label_share=0.0, validation=0.25, test=0.03, seed=lab.seed)
    found |= both("KD", lab.data("proxy", images[proxy], labels[proxy]), settings)
    said = federation.teacher(lambda state: predict(state, images[proxy], make)).softmax(-1)
    found["all weights KD"] = federation.score(tuned(begin, images[proxy], said))
    return found


UNLABELLED: tuple[Claim, ...] = (
    ahead("anisotropic KD", "FedAvg"),
    ahead("anisotropic KD", "FedAvg by count"),
    ahead("anisotropic KD", "isotropic KD"),
    ahead("anisotropic KD", "all weights KD"),
    ahead("anisotropic KD", "teacher"),
    ahead("teacher", "FedAvg"),
)

EXPERIMENTS = (
    Experiment("ofasd", partial(digits, alpha=0.5), compared=UNLABELLED),
    Experiment("ofasd-clients", partial(digits, alpha=0.5, clients=20), compared=UNLABELLED, by_default=False),
    Experiment("ofasd-larger", partial(digits, alpha=0.5, make=larger), compared=UNLABELLED, by_default=False),
    Experiment(
        "ofasd-skewed",
        partial(digits, alpha=0.1, with_labels=True),
        (ahead("anisotropic CE+KD", "FedAvg by count", by=2),),
        (
            ahead("anisotropic CE+KD", "FedAvg"),
            ahead("anisotropic CE+KD", "isotropic CE+KD"),
            ahead("anisotropic CE+KD", "all weights CE"),
        ),
    ),
)
