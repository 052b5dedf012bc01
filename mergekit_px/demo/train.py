"""A tiny `transformers` vision transformer: trained, saved as an ordinary checkpoint folder, loaded back, scored."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mergekit_px.demo.tasks import Images, Labels, Task

Model = Any
"""An instance of ``transformers.ViTForImageClassification``."""

BATCH = 64
BASE_EPOCHS = 30
FINE_TUNE_EPOCHS = 8


class Trainer:
    """Trains on one thread with its own generators, so that a seed means the same numbers on every run."""

    def __init__(self, seed: int) -> None:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.seed = seed

    def base(self, task: Task) -> Model:
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
        return self._train(model, task, epochs=BASE_EPOCHS, learning_rate=2e-3)

    def fine_tune(self, base: Model, task: Task) -> Model:
        return self._train(copy.deepcopy(base), task, epochs=FINE_TUNE_EPOCHS, learning_rate=5e-4)

    def save(self, model: Model, folder: Path) -> None:
        model.save_pretrained(folder)

    def score(self, folder: Path, tasks: Mapping[str, Task]) -> dict[str, float]:
        """Test accuracy in percent on each task of the checkpoint in ``folder``."""
        from transformers import AutoModelForImageClassification

        model = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True).eval()
        with torch.inference_mode(), _one_thread():
            return {name: _accuracy(model, task.test_images, task.test_labels) for name, task in tasks.items()}

    def _train(self, model: Model, task: Task, *, epochs: int, learning_rate: float) -> Model:
        images, labels = torch.from_numpy(task.train_images).unsqueeze(1), torch.from_numpy(task.train_labels)
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
        batches = -(-len(images) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * batches)
        model.train()
        with _one_thread():
            for _ in range(epochs):
                for batch in torch.randperm(len(images), generator=generator).split(BATCH):
                    logits = model(pixel_values=images[batch]).logits
                    loss = torch.nn.functional.cross_entropy(logits, labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
        return model.eval()


def _accuracy(model: Model, images: Images, labels: Labels) -> float:
    logits = model(pixel_values=torch.from_numpy(images).unsqueeze(1)).logits
    right = logits.argmax(dim=1) == torch.from_numpy(labels)
    return round(100.0 * float(right.double().mean()), 1)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
