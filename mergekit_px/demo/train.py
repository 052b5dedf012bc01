"""A tiny `transformers` vision transformer: trained, saved as an ordinary checkpoint folder, loaded back, scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, TensorDataset

from mergekit_px.demo.tasks import SHARED_IMAGES, Images, Labels, Task

Model = Any
"""An instance of ``transformers.ViTForImageClassification``."""

Answers = NDArray[np.bool_]

BATCH = 64
RUN_STEPS, SAVED_EVERY, RUN_RATE = 300, 25, 2e-3
"""The base's training run: the rate stays as it is, so the last checkpoints differ and their mean is better."""
FINE_TUNE_EPOCHS, FINE_TUNE_RATE = 6, 3e-4


class Trainer:
    """Trains on one thread with its own generators, so that a seed means the same numbers on every run."""

    def __init__(self, seed: int) -> None:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.seed = seed

    def run(self, tasks: Mapping[str, Task], folder: Path) -> None:
        """Train a new model on a few images of every task, and save it every so many steps as ``step-N``."""
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=192,
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = ViTForImageClassification(config)
        images = np.concatenate([task.train_images[:SHARED_IMAGES] for task in tasks.values()])
        labels = np.concatenate([task.train_labels[:SHARED_IMAGES] for task in tasks.values()])
        schedule = partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.05, total_iters=SAVED_EVERY)
        for step in self._steps(model, images, labels, RUN_STEPS, RUN_RATE, schedule):
            if step % SAVED_EVERY == 0:
                model.save_pretrained(folder / f"step-{step}")

    def fine_tune(self, base: Path, task: Task, folder: Path) -> None:
        """Train the encoder of ``base`` on one task's other images; the classifier stays as it is."""
        model = _load(base)
        model.classifier.requires_grad_(False)
        images, labels = task.train_images[SHARED_IMAGES:], task.train_labels[SHARED_IMAGES:]
        steps = FINE_TUNE_EPOCHS * -(-len(images) // BATCH)
        schedule = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=FINE_TUNE_RATE, total_steps=steps)
        for _ in self._steps(model, images, labels, steps, FINE_TUNE_RATE, schedule):
            pass
        model.save_pretrained(folder)

    def answers(self, folder: Path, tasks: Mapping[str, Task]) -> dict[str, Answers]:
        """Which test images of each task the checkpoint in ``folder`` gets right."""
        model = _load(folder)
        with torch.inference_mode(), _one_thread():
            return {name: _predict(model, task.test_images) == task.test_labels for name, task in tasks.items()}

    def _steps(
        self,
        model: Model,
        images: Images,
        labels: Labels,
        steps: int,
        rate: float,
        schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
    ) -> Iterator[int]:
        """Train step by step, yielding the number of each."""
        examples = TensorDataset(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels))
        generator = torch.Generator().manual_seed(self.seed)
        loader = DataLoader(examples, BATCH, shuffle=True, generator=generator)
        batches = chain.from_iterable(repeat(loader))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
        scheduler = schedule(optimizer)
        model.train()
        with _one_thread():
            for step, (pixels, targets) in zip(range(1, steps + 1), batches, strict=False):
                loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                yield step


def _load(folder: Path) -> Model:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder, local_files_only=True).eval()


def _predict(model: Model, images: Images) -> Labels:
    labels: Labels = model(pixel_values=torch.from_numpy(images).unsqueeze(1)).logits.argmax(dim=1).numpy()
    return labels


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
