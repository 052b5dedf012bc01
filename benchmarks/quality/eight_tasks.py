"""Eight tasks made of the digits, an encoder that knows a little of each, and its fine-tunes.

As with the image encoders that merging is usually measured on: the heads come with the pre-trained encoder and stay as
they are, a fine-tune changes the encoder alone, and a merged encoder is scored on each task with that task's head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.lab import Lab, State, right
from benchmarks.quality.vit import TinyViT

WIDTH = 96
PRETRAINING, TRAINING, VALIDATION, TEST = slice(0, 100), slice(100, 1150), slice(1150, 1350), slice(1350, None)


def _permuted(images: Tensor) -> Tensor:
    order = torch.from_numpy(np.random.default_rng(1).permutation(64))
    return images.flatten(1)[:, order].view_as(images)


def _noisy(images: Tensor) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + 0.3 * noise).clamp(0, 1)


@dataclass(frozen=True)
class Task:
    """What is done to the images, and which digits there are."""

    change: Callable[[Tensor], Tensor]
    digits: range = range(10)

    def examples(self, lab: Lab, rows: slice) -> tuple[Tensor, Tensor]:
        labels = lab.labels[rows]
        kept = torch.isin(labels, torch.tensor(self.digits))
        return self.change(lab.images[rows])[kept], labels[kept]


TASKS: Mapping[str, Task] = {
    "turned-90": Task(lambda images: images.rot90(1, (2, 3))),
    "turned-180": Task(lambda images: images.rot90(2, (2, 3))),
    "turned-270": Task(lambda images: images.rot90(3, (2, 3))),
    "inverted": Task(lambda images: 1 - images),
    "mirrored": Task(lambda images: images.flip(3)),
    "permuted": Task(_permuted),
    "noisy-0-to-4": Task(_noisy, range(5)),
    "shifted-5-to-9": Task(lambda images: images.roll((2, 2), (2, 3)), range(5, 10)),
}


class EightTasks:
    """Heads, the pre-trained encoder and its fine-tunes, at one seed.

    Args:
        rate: learning rate of the fine-tunes: how far they move from the base.
    """

    def __init__(self, lab: Lab, rate: float) -> None:
        self._lab = lab
        torch.manual_seed(lab.seed)
        self._encoder = TinyViT(WIDTH)
        self._encoder.head = nn.Identity()
        self._heads = nn.ModuleList(nn.Linear(WIDTH, 10) for _ in TASKS)
        self.base = self._pretrained()
        self.tuned = {name: self._tuned(number, rate) for number, name in enumerate(TASKS)}
        self._own = {part: self._scores(self.tuned, part) for part in ("validation", "test")}
        """Accuracies of the fine-tunes, each on its own task, in the order of the tasks."""

    def accuracy(self) -> float:
        """Mean test accuracy of the fine-tunes, each on its own task."""
        return float(np.mean(self._own["test"]))

    def normalised(self, state: State, part: str = "test", among: Sequence[str] = tuple(TASKS)) -> float:
        """Mean over tasks of an encoder's accuracy in percent of the fine-tune's."""
        return float(np.mean(self.each(state, part, among)))

    def each(self, state: State, part: str = "test", among: Sequence[str] = tuple(TASKS)) -> list[float]:
        """An encoder's accuracy on each task in percent of the fine-tune's."""
        found = self._scores(dict.fromkeys(among, state), part)
        own = dict(zip(TASKS, self._own[part], strict=True))
        return [100 * one / own[name] for name, one in zip(among, found, strict=True)]

    @torch.no_grad()
    def _scores(self, states: Mapping[str, State], part: str) -> list[float]:
        rows = VALIDATION if part == "validation" else TEST
        found = []
        for (name, task), head in zip(TASKS.items(), self._heads, strict=True):
            if name not in states:
                continue
            self._encoder.load_state_dict(states[name])
            images, labels = task.examples(self._lab, rows)
            found.append(right(head(self._encoder(images)), labels))
        return found

    def _pretrained(self) -> State:
        """Encoder and heads, trained together on a hundred images in each of the eight forms."""
        parts = [task.examples(self._lab, PRETRAINING) for task in TASKS.values()]
        images, labels = torch.cat([one for one, _ in parts]), torch.cat([one for _, one in parts])
        owner = torch.cat([torch.full((len(one),), number) for number, (_, one) in enumerate(parts)])

        def loss(rows: Tensor) -> Tensor:
            features = self._encoder(images[rows])
            logits = torch.stack([head(features) for head in self._heads])
            return nn.functional.cross_entropy(logits[owner[rows], torch.arange(len(rows))], labels[rows])

        parameters = [*self._encoder.parameters(), *self._heads.parameters()]
        self._fit(parameters, loss, len(labels), epochs=30, rate=2e-3)
        self._heads.requires_grad_(False)
        return self._state()

    def _tuned(self, number: int, rate: float) -> State:
        self._encoder.load_state_dict(self.base)
        images, labels = list(TASKS.values())[number].examples(self._lab, TRAINING)
        head = self._heads[number]

        def loss(rows: Tensor) -> Tensor:
            return nn.functional.cross_entropy(head(self._encoder(images[rows])), labels[rows])

        self._fit(self._encoder.parameters(), loss, len(labels), epochs=10, rate=rate)
        return self._state()

    def _fit(
        self,
        parameters: Iterable[nn.Parameter],
        loss: Callable[[Tensor], Tensor],
        count: int,
        *,
        epochs: int,
        rate: float,
    ) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * -(-count // 64))
        generator = torch.Generator().manual_seed(self._lab.seed)
        for _ in range(epochs):
            for rows in torch.randperm(count, generator=generator).split(64):
                optimizer.zero_grad()
                loss(rows).backward()
                optimizer.step()
                schedule.step()

    def _state(self) -> State:
        return {name: tensor.detach().clone() for name, tensor in self._encoder.state_dict().items()}
