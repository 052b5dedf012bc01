"""What every experiment needs: data in the order of a seed, a folder, training, merging by `pxmerge`, scoring."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.quality import vit
from benchmarks.quality.vit import TinyViT
from mergekit_px.cli import main as pxmerge

State = dict[str, Tensor]

MODEL = f"{Path(vit.__file__).resolve()}:TinyViT"


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
        """AdamW with a cosine schedule in batches of 64, from ``start`` or from the seed's own initial weights."""
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
        """Write a checkpoint folder and return its path."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    def data(self, name: str, images: Tensor, labels: Tensor) -> str:
        """Write a data file and return its path."""
        path = self.folder / f"{name}.npz"
        np.savez(path, x=images.numpy(), labels=labels.numpy())
        return str(path)

    def merge(self, *line: str) -> State:
        """What a line of `pxmerge`, without ``-o``, makes."""
        merged: State = load_file(Path(self.write("merged", *line)) / "model.safetensors")
        return merged

    def write(self, name: str, *line: str) -> str:
        """Run a line of `pxmerge`, without ``-o``, and return the path of what it wrote."""
        output = str(self.folder / name)
        with contextlib.redirect_stdout(io.StringIO()):
            code = pxmerge([*line, "-o", output, "--overwrite", "-q"])
        if code != 0:
            raise RuntimeError(f"pxmerge {' '.join(line)} ended with {code}")
        return output


@torch.no_grad()
def predict(state: State, images: Tensor) -> Tensor:
    """Logits, (images, 10)."""
    model = TinyViT().eval()
    model.load_state_dict(state)
    logits: Tensor = model(images)
    return logits


def score(state: State, images: Tensor, labels: Tensor) -> float:
    """Percent of right answers."""
    return right(predict(state, images), labels)


def right(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(-1) == labels).double().mean())


def added(base: State, deltas: Sequence[State], scale: float) -> State:
    """The base plus the scaled sum of task vectors."""
    return {name: tensor + scale * torch.stack([one[name] for one in deltas]).sum(0) for name, tensor in base.items()}


def difference(tuned: State, base: State) -> State:
    return {name: tensor - base[name] for name, tensor in tuned.items()}
