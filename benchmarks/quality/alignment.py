"""A task vector carried to another base by rotations learned from few labels."""

from __future__ import annotations

import torch

from benchmarks.quality.experiment import Experiment, Scores, ahead
from benchmarks.quality.lab import MODEL, Lab, added, difference, score
from mergekit_px import run_learner


def alignment(lab: Lab) -> Scores:
    """The target is the source base trained further; the task is digits turned by 90 degrees, 62 of them labelled."""
    images, labels = lab.images, lab.labels
    few, test = slice(900, 962), slice(1297, None)
    turned = torch.rot90(images, 1, (2, 3))
    source = lab.train(None, images[:500], labels[:500])
    target = lab.train(source, images[500:900], labels[500:900], epochs=15, rate=1e-3)
    tuned = lab.train(source, turned[:900], labels[:900], epochs=20, rate=1e-3)
    learned = run_learner(
        "align",
        base=lab.save("target", target),
        source_base=lab.save("source", source),
        source_model=lab.save("tuned", tuned),
        data=lab.data("few", turned[few], labels[few]),
        test=lab.data("test", turned[test], labels[test]),
        output=lab.folder / "aligned",
        model=MODEL,
        seed=lab.seed,
        device="cpu",
        overwrite=True,
        allow_code=True,
    )
    report = learned.report.model_dump(mode="json")
    scores: Scores = dict(report["test"])
    update = [difference(tuned, source)]
    best = max(range(21), key=lambda step: score(added(target, update, step / 10), turned[few], labels[few]))
    scores["naive, scale by accuracy"] = score(added(target, update, best / 10), turned[test], labels[test])
    scores["(orthogonality error)"] = report["rotations"]["orthogonality_error"]
    scores["(norm ratio)"] = report["norm"]["after"] / report["norm"]["before"]
    return scores


EXPERIMENTS = (
    Experiment(
        "align",
        alignment,
        (
            ahead("naive", "zero-shot"),
            ahead("aligned", "sham", by=10),
            ahead("aligned", "few-shot fine-tune"),
            ("orthogonality error < 0.1", lambda s: 0.1 - s["(orthogonality error)"]),
            ("norm within 1%", lambda s: 0.01 - abs(s["(norm ratio)"] - 1)),
        ),
        (
            ahead("aligned", "naive"),
            ahead("aligned", "naive, scale by accuracy"),
            ahead("aligned", "fine-tune from naive"),
        ),
    ),
)
