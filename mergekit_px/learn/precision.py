"""The precision of forward passes: float32, or bfloat16 where it was asked for.

What is trained, summed or written stays in the dtype of the model; only the products of a pass are made in bfloat16.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]


def passes(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Inside, forward passes are in that precision (torch's autocast); backward passes follow them of themselves."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
