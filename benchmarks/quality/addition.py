"""Adding task vectors to a base that is weak in every domain: one scale, or a coefficient for each tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.quality.coefficients import learned
from benchmarks.quality.domains import DOMAINS, mean_score
from benchmarks.quality.experiment import Experiment, Scores, ahead
from benchmarks.quality.lab import Lab, State, added, difference, score
from benchmarks.quality.vit import TinyViT
from mergekit_px.learn.ofasd.settings import CoefficientSettings


def addition(lab: Lab) -> Scores:
    """Four domains, a base of 150 images in all of them, four fine-tunes on 950, and 200 labelled images to choose by.

    The 200 images are seen in all four domains. 50 images in each domain are 200 labels for 124 coefficients; what
    that comes to is measured too. Coefficients begin with 0, as in the paper. Beside them all weights are trained on
    the same labels, from the average, as the fine-tunes were.
    """
    images, labels = lab.images, lab.labels
    domains = list(DOMAINS.values())
    start = torch.cat([domain(images[:150]) for domain in domains])
    base = lab.train(None, start, labels[:150].repeat(4))
    tuned = [lab.train(base, domain(images[150:1100]), labels[150:1100], epochs=10, rate=1e-3) for domain in domains]
    deltas = [difference(state, base) for state in tuned]
    shown = torch.cat([domain(images[1100:1300]) for domain in domains]), labels[1100:1300].repeat(4)
    few = torch.cat([domain(images[1100 + 50 * n : 1150 + 50 * n]) for n, domain in enumerate(domains)])

    def test(state: State) -> float:
        return mean_score(state, images[1300:], labels[1300:])

    best = max(range(21), key=lambda step: score(added(base, deltas, step / 20), *shown))
    found = {
        "base": test(base),
        "best single": max(test(state) for state in tuned),
        "average": test(added(base, deltas, 0.25)),
        "task arithmetic": test(added(base, deltas, best / 20)),
    }
    names = [lab.save(f"domain{number}", state) for number, state in enumerate(tuned)]
    whole, data = lab.save("base", base), lab.data("shown", *shown)
    settings = CoefficientSettings(
        objective="cross-entropy", initial=0.0, learning_rate=1e-2, validation=0.2, test=0.01, seed=lab.seed
    )
    isotropic = settings.model_copy(update={"granularity": "model"})
    found["isotropic CE"] = test(learned(lab, whole, names, data, isotropic))
    found["anisotropic CE"] = test(learned(lab, whole, names, data, settings))
    found["anisotropic CE, plain loop"] = test(plain_loop(base, deltas, *shown, seed=lab.seed))
    average = added(base, deltas, 0.25)
    found["fine-tune from the average"] = test(lab.train(average, *shown, epochs=10, rate=1e-3))
    data = lab.data("few", few, labels[1100:1300])
    found["isotropic CE, 50 a domain"] = test(learned(lab, whole, names, data, isotropic))
    found["anisotropic CE, 50 a domain"] = test(learned(lab, whole, names, data, settings))
    tuned_on_few = lab.train(average, few, labels[1100:1300], epochs=10, rate=1e-3)
    found["fine-tune from the average, 50 a domain"] = test(tuned_on_few)
    return found


def plain_loop(base: State, deltas: Sequence[State], images: Tensor, labels: Tensor, *, seed: int) -> State:
    """aTLAS as in its paper's few-shot setting (arXiv:2407.02880), on all labels, all task vectors in memory.

    Coefficients from 0, AdamW with rate and decay of 0.1, ten epochs of batches of 128, cosine, gradients clipped to 1.
    """
    model = TinyViT().eval()
    stacked = {name: torch.stack([delta[name] for delta in deltas]) for name in base}
    coefficients = torch.zeros(len(base), len(deltas), requires_grad=True)

    def state() -> State:
        rows = zip(base.items(), coefficients, strict=True)
        return {name: tensor + torch.tensordot(row, stacked[name], dims=1) for (name, tensor), row in rows}

    optimizer = torch.optim.AdamW([coefficients], lr=0.1, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10 * -(-len(labels) // 128))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(10):
        for rows in torch.randperm(len(labels), generator=generator).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(functional_call(model, state(), (images[rows],)), labels[rows]).backward()
            nn.utils.clip_grad_norm_([coefficients], 1.0)
            optimizer.step()
            schedule.step()
    return {name: tensor.detach() for name, tensor in state().items()}


EXPERIMENTS = (
    Experiment(
        "atlas",
        addition,
        (
            ahead("task arithmetic", "base"),
            ahead("base", "best single"),
        ),
        compared=(
            ahead("anisotropic CE", "isotropic CE"),
            ahead("anisotropic CE", "task arithmetic"),
            ahead("anisotropic CE", "fine-tune from the average"),
            ahead("anisotropic CE, 50 a domain", "isotropic CE, 50 a domain"),
            ahead("anisotropic CE, 50 a domain", "fine-tune from the average, 50 a domain"),
        ),
    ),
)
