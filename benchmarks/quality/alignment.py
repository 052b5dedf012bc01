"""A task vector carried to another base by rotations learned from few labels."""

from __future__ import annotations

import torch

from benchmarks.quality.experiment import Experiment, Scores
from benchmarks.quality.lab import MODEL, Lab
from mergekit_px import run_learner


def alignment(lab: Lab) -> Scores:
    """The target is the source base trained further; the task is digits turned by 90 degrees, 50 of them labelled."""
    images, labels = lab.images, lab.labels
    turned = torch.rot90(images, 1, (2, 3))
    source = lab.train(None, images[:500], labels[:500])
    target = lab.train(source, images[500:900], labels[500:900], epochs=15, rate=1e-3)
    tuned = lab.train(source, turned[:900], labels[:900], epochs=20, rate=1e-3)
    learned = run_learner(
        "align",
        base=lab.save("target", target),
        source_base=lab.save("source", source),
        source_model=lab.save("tuned", tuned),
        data=lab.data("few", turned[900:962], labels[900:962]),
        test=lab.data("test", turned[1297:], labels[1297:]),
        output=lab.folder / "aligned",
        model=MODEL,
        seed=lab.seed,
        device="cpu",
        overwrite=True,
        allow_code=True,
    )
    report = learned.report.model_dump(mode="json")
    scores: Scores = dict(report["test"])
    scores["(orthogonality error)"] = report["rotations"]["orthogonality_error"]
    scores["(norm ratio)"] = report["norm"]["after"] / report["norm"]["before"]
    return scores


EXPERIMENTS = (
    Experiment(
        "align",
        alignment,
        (
            ("aligned > naive", lambda s: s["aligned"] > s["naive"]),
            ("naive > zero-shot", lambda s: s["naive"] > s["zero-shot"]),
            ("aligned > sham + 10", lambda s: s["aligned"] > s["sham"] + 10),
            ("aligned > few-shot fine-tune", lambda s: s["aligned"] > s["few-shot fine-tune"]),
            ("orthogonality error < 0.1", lambda s: s["(orthogonality error)"] < 0.1),
            ("norm within 1%", lambda s: abs(s["(norm ratio)"] - 1) < 0.01),
        ),
    ),
)
