"""What every experiment needs: data in the order of a seed, a folder, training, merging by `pxmerge`, scoring."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.quality import vit
from benchmarks.quality.vit import TinyViT
from mergekit_px.cli import main as pxmerge

State = dict[str, Tensor]
Found = TypeVar("Found")

MODEL = f"{Path(vit.__file__).resolve()}:TinyViT"


class Lab:
    """The digits in an order drawn by a seed, and a folder for what is made of them.

    Args:
        methods: the titles that are wanted of an experiment that compares methods; all if left out.
        scales: whether it looks for the best scale of each, which takes most of its time.
    """

    def __init__(self, seed: int, folder: Path, methods: Sequence[str] | None = None, *, scales: bool = True) -> None:
        self.seed = seed
        self.folder = folder
        self.methods = methods
        self.scales = scales

    @cached_property
    def images(self) -> Tensor:
        return torch.from_numpy(_digits().images[self._order]).float().div(16).unsqueeze(1)

    @cached_property
    def labels(self) -> Tensor:
        return torch.from_numpy(_digits().target[self._order])

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.random.default_rng(self.seed).permutation(len(_digits().target))

    def train(
        self,
        start: State | None,
        images: Tensor,
        labels: Tensor,
        *,
        epochs: int = 30,
        rate: float = 3e-3,
        make: Callable[[], nn.Module] = TinyViT,
    ) -> State:
        """AdamW with a cosine schedule in batches of 64, from ``start`` or from the seed's own initial weights.

        Args:
            labels: classes, or a probability for each of them.
        """
        torch.manual_seed(self.seed)
        model = make()
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

    def remembered(self, name: str, measure: Callable[[], Found]) -> Found:
        """What was measured under this name in this folder before, or is now."""
        path = self.folder / "measured.json"
        known: dict[str, Found] = json.loads(path.read_text()) if path.exists() else {}
        if name not in known:
            value = measure()
            known = {**(json.loads(path.read_text()) if path.exists() else {}), name: value}
            fresh = path.with_suffix(".new")
            fresh.write_text(json.dumps(known))
            fresh.replace(path)
        return known[name]

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


@cache
def _digits() -> Any:
    from sklearn.datasets import load_digits

    return load_digits()


@torch.no_grad()
def predict(state: State, images: Tensor, make: Callable[[], nn.Module] = TinyViT) -> Tensor:
    """Logits, (images, 10)."""
    model = make().eval()
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
