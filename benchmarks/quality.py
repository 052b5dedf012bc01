"""What learning gains on real data: scikit-learn's digits, a tiny vision transformer, three seeds, all controls.

    python benchmarks/quality.py                    # every claim; some minutes on one core
    python benchmarks/quality.py ofasd --seeds 1    # one of them, to look at

It prints a table of test accuracies in percent and which claims hold in the mean over the seeds, and fails where one
does not. Claims that are not made are not checked: nothing here says that distillation beats training all weights, or
that alignment beats a fine-tune that begins with the task vector.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergekit_px.cli import main as pxmerge
from mergekit_px.learn.align import AlignOptions, AlignSettings, align_task_vector
from mergekit_px.learn.ofasd import OfasdOptions, Settings, learn_coefficients

Scores = dict[str, float]
State = dict[str, Tensor]


class TinyViT(nn.Module):
    """8 x 8 digits in patches of 2 x 2, width 48, two blocks, four heads."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 48, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 16, 48) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.norm = nn.LayerNorm(48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden).mean(dim=1))
        return logits


MODEL = f"{Path(__file__).resolve()}:TinyViT"


class Lab:
    """The digits in an order drawn by a seed, and a folder for what is made of them."""

    def __init__(self, seed: int, folder: Path) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(seed).permutation(len(digits.target))
        self.images = torch.from_numpy(digits.images[order]).float().div(16).unsqueeze(1)
        self.labels = torch.from_numpy(digits.target[order])
        self.seed = seed
        self.folder = folder

    def train(
        self, start: State | None, images: Tensor, labels: Tensor, *, epochs: int = 30, rate: float = 3e-3
    ) -> State:
        torch.manual_seed(self.seed)
        model = TinyViT()
        if start is not None:
            model.load_state_dict(start)
        steps = epochs * -(-len(images) // 64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(epochs):
            for rows in torch.randperm(len(images), generator=generator).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def save(self, name: str, state: State) -> str:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    def data(self, name: str, images: Tensor, labels: Tensor) -> str:
        path = self.folder / f"{name}.npz"
        np.savez(path, x=images.numpy(), labels=labels.numpy())
        return str(path)


@torch.no_grad()
def score(state: State, images: Tensor, labels: Tensor) -> float:
    model = TinyViT().eval()
    model.load_state_dict(state)
    return 100 * float((model(images).argmax(-1) == labels).double().mean())


def added(base: State, deltas: Sequence[State], scale: float) -> State:
    return {name: tensor + scale * torch.stack([one[name] for one in deltas]).sum(0) for name, tensor in base.items()}


def difference(tuned: State, base: State) -> State:
    return {name: tensor - base[name] for name, tensor in tuned.items()}


def learned(options: OfasdOptions) -> State:
    """The merge that a run's recipe makes."""
    learn_coefficients(options)
    merged = options.output.with_name(f"{options.output.name}-merged")
    with contextlib.redirect_stdout(io.StringIO()):
        assert pxmerge(["run", str(options.output / "recipe.yaml"), "-o", str(merged), "-q"]) == 0
    return load_file(merged / "model.safetensors")


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
        [np.random.default_rng(lab.seed * 10000 + row).choice(5, p=shares[label]) for row, label in
         enumerate(labels[pool].tolist())]
    )  # fmt: skip
    clients, counts = [], []
    for client in range(5):
        rows = (owner == client).nonzero().flatten()
        if len(rows):
            clients.append(lab.train(base, images[pool][rows], labels[pool][rows], epochs=20, rate=1e-3))
            counts.append(float(len(rows)))
    names = [lab.save(f"client{number}", state) for number, state in enumerate(clients)]
    proxy = lab.data("proxy", images[1000:1350], labels[1000:1350])
    pooled = lab.data("pooled", images[pool], labels[pool])
    mean = {name: torch.stack([one[name] for one in clients]).mean(0) for name in base}
    parts = torch.tensor(counts) / sum(counts)
    by_count = {name: sum(part * one[name] for part, one in zip(parts, clients, strict=True)) for name in base}
    logits = []
    for state in clients:
        model = TinyViT().eval()
        model.load_state_dict(state)
        with torch.no_grad():
            logits.append(model(images[test]))
    found = {
        "base": score(base, images[test], labels[test]),
        "best client": max(score(state, images[test], labels[test]) for state in clients),
        "FedAvg": score(mean, images[test], labels[test]),
        "FedAvg by count": score(by_count, images[test], labels[test]),
        "teacher": 100 * float((torch.stack(logits).mean(0).argmax(-1) == labels[test]).double().mean()),
    }

    def arm(title: str, data: str, settings: Settings) -> None:
        options = OfasdOptions(
            base=lab.save("base", base),
            sources=names,
            data=data,
            output=lab.folder / title.replace(" ", "-").replace("+", "-"),
            counts=counts,
            model=MODEL,
            settings=settings,
            compare=False,
            device="cpu",
            mode="overwrite",
            allow_code=True,
        )
        found[title] = score(learned(options), images[test], labels[test])

    if with_labels:
        arm("anisotropic CE+KD", pooled, Settings(label_share=0.5, validation=0.1, test=0.01, seed=lab.seed))
        return found
    alone = Settings(label_share=0.0, validation=0.25, test=0.03, seed=lab.seed)
    arm("isotropic KD", proxy, replace(alone, granularity="model"))
    arm("anisotropic KD", proxy, alone)
    return found


def addition(lab: Lab) -> Scores:
    """Four domains (upright, turned, inverted, flipped), a weak base of all, four fine-tunes, 200 labels."""
    domains: list[Callable[[Tensor], Tensor]] = [
        lambda x: x,
        lambda x: torch.rot90(x, 1, (2, 3)),
        lambda x: 1 - x,
        lambda x: x.flip(3),
    ]
    images, labels = lab.images, lab.labels
    start = torch.cat([domain(images[:150]) for domain in domains])
    base = lab.train(None, start, labels[:150].repeat(4))
    tuned = [lab.train(base, domain(images[150:1100]), labels[150:1100], epochs=10, rate=1e-3) for domain in domains]
    deltas = [difference(state, base) for state in tuned]
    few = torch.cat([domain(images[1100 + 50 * n : 1150 + 50 * n]) for n, domain in enumerate(domains)])
    few_labels = labels[1100:1300]

    def mean_score(state: State) -> float:
        return float(np.mean([score(state, domain(images[1300:]), labels[1300:]) for domain in domains]))

    grid = [step / 20 for step in range(21)]
    best = max(grid, key=lambda scale: score(added(base, deltas, scale), few, few_labels))
    found = {
        "base": mean_score(base),
        "best single": max(mean_score(state) for state in tuned),
        "average": mean_score(added(base, deltas, 0.25)),
        "task arithmetic": mean_score(added(base, deltas, best)),
    }
    names = [lab.save(f"domain{number}", state) for number, state in enumerate(tuned)]
    for title, granularity in (("isotropic CE", "model"), ("anisotropic CE", "tensor")):
        options = OfasdOptions(
            base=lab.save("base", base),
            sources=names,
            data=lab.data("few", few, few_labels),
            output=lab.folder / title.replace(" ", "-"),
            model=MODEL,
            settings=Settings(
                objective="cross-entropy",
                granularity=granularity,  # type: ignore[arg-type]
                validation=0.2,
                test=0.01,
                seed=lab.seed,
            ),
            compare=False,
            device="cpu",
            mode="overwrite",
            allow_code=True,
        )
        found[title] = mean_score(learned(options))
    return found


def alignment(lab: Lab) -> Scores:
    """The target is the source base trained further; the task is digits turned by 90 degrees, 50 of them labelled."""
    images, labels = lab.images, lab.labels
    turned = torch.rot90(images, 1, (2, 3))
    source = lab.train(None, images[:500], labels[:500])
    target = lab.train(source, images[500:900], labels[500:900], epochs=15, rate=1e-3)
    tuned = lab.train(source, turned[:900], labels[:900], epochs=20, rate=1e-3)
    options = AlignOptions(
        target_base=lab.save("target", target),
        source_base=lab.save("source", source),
        source_model=lab.save("tuned", tuned),
        data=lab.data("few", turned[900:962], labels[900:962]),
        test_data=lab.data("test", turned[1297:], labels[1297:]),
        output=lab.folder / "aligned",
        model=MODEL,
        settings=AlignSettings(seed=lab.seed),
        device="cpu",
        mode="overwrite",
        allow_code=True,
    )
    report = align_task_vector(options).report
    scores: Scores = dict(report["test"])
    scores["(orthogonality error)"] = report["rotations"]["orthogonality_error"]
    scores["(norm ratio)"] = report["norm"]["after"] / report["norm"]["before"]
    return scores


Claim = tuple[str, Callable[[Scores], bool]]
EXPERIMENTS: dict[str, tuple[Callable[[Lab], Scores], Sequence[Claim]]] = {
    "ofasd": (
        lambda lab: federated(lab, 0.5, with_labels=False),
        [
            ("anisotropic KD > FedAvg", lambda s: s["anisotropic KD"] > s["FedAvg"]),
            ("anisotropic KD > isotropic KD", lambda s: s["anisotropic KD"] > s["isotropic KD"]),
            ("anisotropic KD <= teacher + 1", lambda s: s["anisotropic KD"] <= s["teacher"] + 1),
        ],
    ),
    "ofasd-skewed": (
        lambda lab: federated(lab, 0.1, with_labels=True),
        [("CE+KD > FedAvg by count + 2", lambda s: s["anisotropic CE+KD"] > s["FedAvg by count"] + 2)],
    ),
    "atlas": (
        addition,
        [
            ("anisotropic CE > isotropic CE", lambda s: s["anisotropic CE"] > s["isotropic CE"]),
            ("anisotropic CE > task arithmetic", lambda s: s["anisotropic CE"] > s["task arithmetic"]),
            ("task arithmetic > base", lambda s: s["task arithmetic"] > s["base"]),
            ("base > best single", lambda s: s["base"] > s["best single"]),
        ],
    ),
    "align": (
        alignment,
        [
            ("aligned > naive", lambda s: s["aligned"] > s["naive"]),
            ("naive > zero-shot", lambda s: s["naive"] > s["zero-shot"]),
            ("aligned > sham + 10", lambda s: s["aligned"] > s["sham"] + 10),
            ("aligned > few-shot fine-tune", lambda s: s["aligned"] > s["few-shot fine-tune"]),
            ("orthogonality error < 0.1", lambda s: s["(orthogonality error)"] < 0.1),
            ("norm within 1%", lambda s: abs(s["(norm ratio)"] - 1) < 0.01),
        ],
    ),
}


def run(name: str, seeds: int) -> bool:
    """Print the scores of an experiment and whether its claims hold in the mean."""
    experiment, claims = EXPERIMENTS[name]
    started = time.perf_counter()
    rows = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(experiment(Lab(seed, Path(folder))))
    means = {title: float(np.mean([row[title] for row in rows])) for title in rows[0]}
    print(f"\n{name}, {seeds} seeds, {time.perf_counter() - started:.0f} s")
    for title, mean in means.items():
        print(f"  {title:24} {mean:7.2f}   " + " ".join(f"{row[title]:7.2f}" for row in rows))
    holds = {text: claim(means) for text, claim in claims}
    for text, held in holds.items():
        each = sum(dict(claims)[text](row) for row in rows)
        print(f"  {'holds' if held else 'FAILS'}: {text} (in {each} of {seeds} seeds)")
    print(json.dumps({"experiment": name, "mean": means, "seeds": rows}))
    return all(holds.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    if unknown := set(given.experiments) - set(EXPERIMENTS):
        parser.error(f"no such experiment: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    held = [run(name, given.seeds) for name in given.experiments or EXPERIMENTS]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
