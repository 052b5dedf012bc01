"""Built-in models and data: scikit-learn's 1797 handwritten digits, a perceptron and a convolutional network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mergekit_px.errors import UsageError
from mergekit_px.learn.data import LABELS, Examples, examples


class DigitsPerceptron(nn.Module):
    """64 - 256 - 256 - 10 with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(64, 256)
        self.hidden2 = nn.Linear(256, 256)
        self.classifier = nn.Linear(256, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.hidden1(pixel_values.flatten(1)).relu()
        logits: Tensor = self.classifier(self.hidden2(hidden).relu())
        return logits


class DigitsConvolution(nn.Module):
    """Two 3 x 3 convolutions of 8 and 16 channels with batch norm and pooling, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(16)
        self.classifier = nn.Linear(64, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = nn.functional.max_pool2d(self.norm1(self.conv1(pixel_values)).relu(), 2)
        hidden = nn.functional.max_pool2d(self.norm2(self.conv2(hidden)).relu(), 2)
        logits: Tensor = self.classifier(hidden.flatten(1))
        return logits


BUILT_IN_MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "digits-mlp": DigitsPerceptron,
    "digits-cnn": DigitsConvolution,
}


def digits() -> Examples:
    """``pixel_values`` of shape (1797, 1, 8, 8) in [0, 1], and ``labels`` 0 to 9.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise UsageError("the digits are those of scikit-learn", hint='run: pip install "pxmerge[demo]"')
    from sklearn.datasets import load_digits

    bundled = load_digits()
    pixels = torch.from_numpy(bundled.images).float().div(16).unsqueeze(1)
    return examples({"pixel_values": pixels, LABELS: torch.from_numpy(bundled.target)}, "digits")
