"""Data whose labels may be left out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mergekit_px.errors import InputError
from mergekit_px.learn.data import (
    IGNORED,
    LABELS,
    Examples,
    examples,
    read_arrays,
    require_classes,
    to_device,
)
from mergekit_px.learn.objective import check_fit


def load_proxy(path: str) -> tuple[Examples, bool]:
    """The examples of a file and whether they have labels; without, every label is the ignored one.

    Raises:
        InputError: as `load_examples` does, and for labels that are not classes.
    """
    arrays = read_arrays(path)
    if LABELS not in arrays:
        return _without_labels(arrays, path), False
    found = examples(arrays, path)
    if found.arrays[LABELS].is_floating_point():
        raise InputError("the labels are values, not classes", where=path, hint="number the classes from 0")
    return found, True


def check_data(module: nn.Module, data: Examples, *, labelled: bool, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ``InputError`` where arrays or labels do not fit the model."""
    few = to_device(data.take(torch.arange(min(2, len(data)))).arrays, device, dtype)
    if not labelled:
        few[LABELS] = torch.zeros(len(few[LABELS]), device=device)  # values, which no output is compared with
    classes = check_fit(module, few, data.where, reads_logits=True)
    if classes is not None:
        require_classes(data.arrays[LABELS], classes, data.where)


def _without_labels(arrays: Mapping[str, Tensor], where: str) -> Examples:
    if not arrays:
        raise InputError("it holds no arrays", where=where)
    rows = max((len(array) for array in arrays.values() if array.ndim), default=0)
    if rows < 2:
        raise InputError("it holds fewer than two examples", where=where)
    checked = examples({**arrays, LABELS: torch.arange(rows)}, where)
    return Examples({**checked.arrays, LABELS: torch.full((rows,), IGNORED)}, where)
