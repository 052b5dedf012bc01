"""The eight tasks of text: heads, fine-tunes in full or by LoRA, scores; what was made once is kept in the folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.quality.lab import Lab, State, right
from benchmarks.quality.packages import TASKS, examples
from benchmarks.quality.text_encoder import Encoder, Lines, tokenized

COUNTS = {"train": 640, "validation": 40, "test": 120}
STEPS, BATCH = 40, 16
RATES = {"full": 2e-4, "lora": 2e-3}
RANK = 16
SHOTS = 4
"""Texts of a class that a head is made of: few, so that a fine-tune has something to gain."""
_SHARPNESS = 10.0
"""Factor of the cosines before the softmax."""


class TextTasks:
    """A base, its fine-tunes and their scores, at one seed.

    The head of a task are the directions of the mean features of a few texts of each class, as the frozen encoder has
    them; they stay as they are, as the text embeddings of CLIP do.
    """

    def __init__(self, lab: Lab, kind: Literal["full", "lora"]) -> None:
        self._lab, self._kind = lab, kind
        self._encoder = Encoder()
        self._lines: dict[tuple[str, str], tuple[Lines, Tensor]] = {}
        self.names = tuple(TASKS)
        self.base = self._encoder.state()
        self.base_folder = lab.save("base", self.base)
        self._heads = self._made_heads()
        self.sources = [self._tuned(name) for name in self.names]

    def accuracy(self, part: str = "test") -> list[float]:
        """Accuracy of each fine-tune on its own task."""
        return self._lab.remembered(f"own {part}", lambda: [self._own(name, part) for name in self.names])

    def each(self, state: State, part: str = "test") -> list[float]:
        """An encoder's accuracy on each task in percent of that task's fine-tune."""
        self._encoder.load(state)
        own = self.accuracy(part)
        self._encoder.load(state)
        return [100 * self._score(name, part) / mine for name, mine in zip(self.names, own, strict=True)]

    def _own(self, name: str, part: str) -> float:
        self._encoder.load(load_file(self._lab.folder / f"{name}.tuned.safetensors"))
        return self._score(name, part)

    def _score(self, name: str, part: str) -> float:
        lines, labels = self._part(name, part)
        return right(self._encoder.features(lines) @ self._heads[name].T, labels)

    def _part(self, name: str, part: str) -> tuple[Lines, Tensor]:
        if (name, part) not in self._lines:
            texts, labels = examples(TASKS[name], part, COUNTS[part], self._lab.seed)
            self._lines[name, part] = tokenized(texts), torch.tensor(labels)
        return self._lines[name, part]

    def _made_heads(self) -> State:
        path = self._lab.folder / "heads.safetensors"
        if not path.exists():
            save_file({name: self._head(name) for name in self.names}, path)
        heads: State = load_file(path)
        return heads

    def _head(self, name: str) -> Tensor:
        lines, labels = self._part(name, "train")
        return head(self._encoder, lines, labels, len(TASKS[name].classes))

    def _tuned(self, name: str) -> str:
        """The path of a fine-tune: a checkpoint, or an adapter."""
        whole, source = self._lab.folder / f"{name}.tuned.safetensors", self._lab.folder / name
        if not whole.exists():
            torch.manual_seed(self._lab.seed)
            encoder = Encoder()
            if self._kind == "full":
                self._fit(encoder, name)
                self._lab.save(name, encoder.state())
            else:
                _add_lora(encoder)
                self._fit(encoder, name)
                encoder.model.save_pretrained(source)
                encoder.model = encoder.model.merge_and_unload()
            save_file(encoder.state(), whole)
            print(f"  {name} tuned, seed {self._lab.seed}", file=sys.stderr, flush=True)
        return str(source)

    def _fit(self, encoder: Encoder, name: str) -> None:
        lines, labels = self._part(name, "train")
        rate = RATES[self._kind]

        def logits(rows: list[int]) -> Tensor:
            return encoder([lines[row] for row in rows]) @ self._heads[name].T

        fit(encoder, logits, labels, STEPS, rate, self._lab.seed)


def head(encoder: Encoder, lines: Lines, labels: Tensor, classes: int) -> Tensor:
    """The directions of the mean features of a few lines of each class."""
    rows = [(labels == place).nonzero()[:SHOTS, 0] for place in range(classes)]
    means = [encoder.features([lines[row] for row in chosen.tolist()]).mean(0) for chosen in rows]
    return _SHARPNESS * nn.functional.normalize(torch.stack(means), dim=-1)


def fit(
    module: nn.Module,
    logits: Callable[[list[int]], Tensor],
    targets: Tensor,
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """AdamW in one cycle.

    Args:
        logits: of the examples in some rows.
        targets: the class of each example, or a probability for each class.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(targets), generator=generator).tolist()
        rows, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(rows), targets[rows]).backward()
        optimizer.step()
        schedule.step()


def _add_lora(encoder: Encoder) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["query", "key", "value", "dense"])
    encoder.model = get_peft_model(encoder.model, config)
