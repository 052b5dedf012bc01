"""Eight labelled lines of each class of the eight tasks of text: what merging makes of them, and a plain fine-tune."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.quality.experiment import Experiment, Scores
from benchmarks.quality.lab import Lab, State
from benchmarks.quality.packages import TASKS, examples
from benchmarks.quality.text_encoder import Encoder, Lines, padded, tokenized
from benchmarks.quality.text_tasks import TextTasks, fit

LABELS = 8
"""Lines of each class."""
STEPS, RATE = 200, 1e-4
"""Of the fine-tunes beside."""
_HEADS = "PXMERGE_QUALITY_HEADS"


class TaskEncoder:
    """The encoder with the heads of all tasks, of which each example names its own: what `pxmerge tune` loads."""

    def __new__(cls) -> nn.Module:  # type: ignore[misc]
        encoder = Encoder().model
        heads = load_file(os.environ[_HEADS])
        widest = max(len(head) for head in heads.values())
        stacked = torch.stack([nn.functional.pad(heads[name], (0, 0, 0, widest - len(heads[name]))) for name in TASKS])
        absent = torch.tensor([[place >= len(heads[name]) for place in range(widest)] for name in TASKS])
        usual = type(encoder).forward

        def forward(self: nn.Module, input_ids: Tensor, attention_mask: Tensor, task: Tensor) -> Tensor:
            hidden = usual(self, input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask[..., None]
            features = nn.functional.normalize((hidden * mask).sum(1), dim=-1)
            logits = (stacked[task] @ features[..., None])[..., 0]
            return logits.masked_fill(absent[task], -100.0)

        encoder.__class__ = type("TaskEncoder", (type(encoder),), {"forward": forward})
        module: nn.Module = encoder
        return module


class FewLabels:
    """The fine-tunes of `text` at one seed, and a few labels of other lines."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._tasks = TextTasks(lab, "full")
        os.environ[_HEADS] = str(lab.folder / "heads.safetensors")
        self._lines, self._labels, self._task = self._few()
        self._inputs = ("--base", self._tasks.base_folder, "--sources", *self._tasks.sources)

    def rows(self) -> Mapping[str, Callable[[], State]]:
        svd, wudi = ("svd", "--top-k", "100%"), ("wudi", "--solver", "closed", "--sides", "both")
        return {
            "average": partial(self._merge, "linear"),
            "`svd`, 100%": partial(self._merge, *svd),
            "`wudi --solver closed --sides both`": partial(self._merge, *wudi),
            "`svd`, then `tune`": partial(self._tuned, "--orthogonalise"),
            "`svd` plain, then `tune`": partial(self._tuned, "--no-orthogonalise"),
            "fine-tune from the average": partial(self._fine_tuned, "linear"),
            "fine-tune from `svd`, 100%": partial(self._fine_tuned, *svd),
            "fine-tune from the pre-trained encoder": self._fine_tuned,
        }

    def each(self, title: str, make: Callable[[], State]) -> list[float]:
        """Accuracy by task, in percent of that of its own fine-tune."""

        def measured() -> list[float]:
            scores = self._tasks.each(make())
            print(f"  {title}, seed {self._lab.seed}: {mean(scores):.1f}", file=sys.stderr, flush=True)
            return scores

        return self._lab.remembered(title, measured)

    def _few(self) -> tuple[Lines, Tensor, Tensor]:
        lines: Lines = []
        found: list[tuple[int, int]] = []
        for number, task in enumerate(TASKS.values()):
            texts, labels = examples(task, "validation", 2000, self._lab.seed)
            rows = [row for place in range(len(task.classes)) for row in _first(labels, place)]
            lines += tokenized([texts[row] for row in rows])
            found += [(labels[row], number) for row in rows]
        labels_of, task_of = torch.tensor(found).T
        return lines, labels_of, task_of

    def _merge(self, *line: str) -> State:
        return self._lab.merge(*line, *self._inputs)

    def _tuned(self, start: str) -> State:
        data = self._lab.folder / "few.npz"
        tokens, mask = padded(self._lines)
        arrays = {"input_ids": tokens, "attention_mask": mask, "task": self._task, "labels": self._labels}
        np.savez(data, **{name: array.numpy() for name, array in arrays.items()})
        pool = self._lab.write("pool", "svd", "--top-k", "100%", "--as", "components", start, *self._inputs)
        learning = ["--base", self._tasks.base_folder, "--data", str(data), "--batch", "32", "--test", "0"]
        learning += ["--model", f"{__file__}:TaskEncoder", "--allow-code"]
        return load_file(Path(self._lab.write("tuned", "tune", pool, *learning)) / "model/model.safetensors")

    def _fine_tuned(self, *line: str) -> State:
        """All weights trained on the same lines."""
        module = TaskEncoder()
        module.load_state_dict(self._merge(*line) if line else self._tasks.base)

        def logits(rows: list[int]) -> Tensor:
            tokens, mask = padded([self._lines[row] for row in rows])
            found: Tensor = module(input_ids=tokens, attention_mask=mask, task=self._task[rows])
            return found

        fit(module, logits, self._labels, STEPS, RATE, self._lab.seed)
        return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _first(labels: Sequence[int], place: int) -> list[int]:
    return [row for row, label in enumerate(labels) if label == place][:LABELS]


def text_labels(lab: Lab) -> Scores:
    few = FewLabels(lab)
    scores: Scores = {}
    for title, make in few.rows().items():
        each = few.each(title, make)
        scores[title], scores[f"{title}, worst task"] = mean(each), min(each)
    return scores


def table(rows: Sequence[Scores]) -> str:
    lines = ["| | mean | worst task | by seed |", "| --- | ---: | ---: | --- |"]
    for title in [name for name in rows[0] if f"{name}, worst task" in rows[0]]:
        values = [row[title] for row in rows]
        error = f" ± {stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
        worst = mean(row[f"{title}, worst task"] for row in rows)
        lines.append(
            f"| {title} | {mean(values):.1f}{error} | {worst:.1f} | {' / '.join(f'{value:.1f}' for value in values)} |"
        )
    return "\n".join(lines)


EXPERIMENTS = (Experiment("text-labels", text_labels, table=table, by_default=False),)
