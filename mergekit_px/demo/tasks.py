"""The digits as four tasks with the same labels, distorted in a way of its own each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.float32]
Labels = NDArray[np.int64]

TEST_IMAGES = 500
SHARED_IMAGES = 100
"""Training images of each task that the base learns from; its fine-tune learns from the others."""


@dataclass(frozen=True, slots=True)
class Task:
    """Images of shape (n, 8, 8) in [0, 1] and labels 0 to 9, for training and for testing."""

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels


def load_tasks(seed: int) -> dict[str, Task]:
    """scikit-learn's 1797 bundled digits, split once by ``seed``; every task has the same digits on each side."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)
    labels = digits.target.astype(np.int64)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(images))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return {
        name: Task(distort(images[train], generator), labels[train], distort(images[test], generator), labels[test])
        for name, distort in _DISTORTIONS.items()
    }


def _turned(images: Images, generator: np.random.Generator) -> Images:
    """Turned left or right by 25 to 50 degrees."""
    from scipy.ndimage import rotate

    angles = generator.choice([-1.0, 1.0], len(images)) * generator.uniform(25.0, 50.0, len(images))
    turned = [rotate(image, angle, reshape=False, order=1) for image, angle in zip(images, angles, strict=True)]
    return np.stack(turned).astype(np.float32)


def _faint(images: Images, generator: np.random.Generator) -> Images:
    """A quarter of the contrast, on a light ground."""
    return (0.25 * images + 0.6).astype(np.float32)


def _slanted(images: Images, generator: np.random.Generator) -> Images:
    """Rows shifted sideways, the upper ones right and the lower ones left."""
    slanted = np.zeros_like(images)
    height, width = images.shape[1:]
    for row in range(height):
        shift = round(((height - 1) / 2 - row) * 0.8)
        kept = slice(max(0, -shift), width - max(0, shift))
        moved = slice(max(0, shift), width - max(0, -shift))
        slanted[:, row, moved] = images[:, row, kept]
    return slanted


def _mirrored(images: Images, generator: np.random.Generator) -> Images:
    """Left and right exchanged."""
    return np.ascontiguousarray(images[:, :, ::-1])


_DISTORTIONS: dict[str, Callable[[Images, np.random.Generator], Images]] = {
    "turned": _turned,
    "faint": _faint,
    "slanted": _slanted,
    "mirrored": _mirrored,
}

TASKS = tuple(_DISTORTIONS)
