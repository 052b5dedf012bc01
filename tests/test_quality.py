"""The suites of methods, on tensors instead of models: what is kept, how the best scale is sought, the table."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.quality import packages
from benchmarks.quality.every_method import VARIANTS, Measured, table, variants
from benchmarks.quality.experiment import Claim, Experiment, Scores, ahead
from benchmarks.quality.lab import Lab, State
from benchmarks.quality.runner import report
from mergekit_px.methods import load_methods


class Targets:
    """Accuracy falls with the distance from what each task wants: twice the mean of the changes, of all the same."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {"layer.weight": (12, 8), "norm.weight": (12,)}
        self.base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        self.tuned = [
            {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in self.base.items()}
            for _ in range(8)
        ]
        self.asked = 0

    def each(self, state: State, part: str = "test") -> list[float]:
        self.asked += 1
        mean = {name: torch.stack([tuned[name] for tuned in self.tuned]).mean(0) for name in self.base}
        wanted = {name: tensor + 2.2 * (mean[name] - tensor) for name, tensor in self.base.items()}
        distance = sum(float((state[name] - wanted[name]).norm()) for name in self.base)
        return [100 - distance - place for place in range(8)]


def measured(folder: Path) -> tuple[Targets, Measured]:
    lab, tasks = Lab(0, folder), Targets()
    sources = [lab.save(f"tuned-{place}", tuned) for place, tuned in enumerate(tasks.tuned)]
    return tasks, Measured(lab, tasks, lab.save("base", tasks.base), sources)


def test_methods_are_scored_at_scale_1_and_at_the_best(tmp_path: Path) -> None:
    tasks, suite = measured(tmp_path)
    scores = suite.scores({name: variants()[name] for name in ("linear", "task_arithmetic", "ties, boosted")})
    assert scores["(linear, scale)"] == 2.2
    assert scores["linear, best scale"] == pytest.approx(96.5)
    assert scores["linear, worst task"] == pytest.approx(scores["linear"] - 3.5)
    assert scores["(task_arithmetic, scale)"] == 0.3  # of the sum of eight
    rows = [line.split(" | ")[0].strip("| ") for line in table([scores, scores]).splitlines()[2:]]
    assert rows[:2] == ["pre-trained encoder", "linear"]
    assert set(rows[2:]) == {"task_arithmetic", "ties, boosted"}

    again, suite = measured(tmp_path)
    assert suite.scores({"linear": variants()["linear"]})["linear"] == scores["linear"]
    assert tasks.asked > again.asked == 0
    assert "linear" in json.loads((tmp_path / "measured.json").read_text())


def test_every_method_without_data_is_in() -> None:
    known = {name for name, method in load_methods().items() if method.family == "spectral"}
    assert known - {"svc"} <= {variant.line[0].replace("-", "_") for variant in variants().values()}
    assert all(variant.corrects is None or variant.corrects in VARIANTS for variant in variants().values())


def test_differences_below_the_noise_are_ties(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Scores] = [{"a": 70.0 + n, "b": 69.5 - n, "c": 71.0 + n * (-1) ** n} for n in range(5)]

    def said(*claims: Claim, compared: Sequence[Claim] = ()) -> tuple[bool, list[str]]:
        held = report(Experiment("one", lambda lab: {}, claims, tuple(compared)), rows, 1.0)
        lines = [line.strip() for line in capsys.readouterr().out.splitlines() if " seeds)" in line]
        return held, [line.split(":")[0] for line in lines]

    assert said(ahead("a", "b"), compared=[ahead("a", "c"), ahead("b", "a")]) == (True, ["holds", "a tie", "FAILS"])
    assert said(ahead("a", "c")) == (False, ["a tie"])
    assert said(ahead("a", "b", by=6)) == (False, ["a tie"])


def test_packages_of_one_source_are_in_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "".join(
        f"Package: p{n}\nSource: s{n // 2} (1.{n})\nSection: {('games', 'mail', 'x11')[n % 3]}\n"
        f"Tag: role::program,\n use::{('gameplaying', 'editing')[n % 2]}\nDescription: line {n}\n more\n\n"
        for n in range(60)
    )
    answer = subprocess.CompletedProcess([], 0, stdout=listed)
    monkeypatch.setattr(packages.subprocess, "run", lambda *words, **options: answer)
    found = tuple(packages._parsed())
    assert (found[5].line, found[5].source) == ("line 5", "s2")
    assert found[5].labels == {"role::program", "use::editing", "section::x11"}
    monkeypatch.setattr(packages, "packages", lambda: found)
    lines = {part: packages.examples(packages.TASKS["applications"], part, 99, 0) for part in ("train", "test")}
    sources = [{int(line.split()[1]) // 2 for line in texts} for texts, _ in lines.values()]
    assert all(sources) and not sources[0] & sources[1]
    texts, labels = lines["train"]
    assert all(packages.TASKS["applications"].classes[label] in ("games", "mail") for label in labels)
    assert not any(int(line.split()[1]) % 3 == 2 for line in texts)
