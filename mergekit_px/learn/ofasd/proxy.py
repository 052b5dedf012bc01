"""Data whose labels may be left out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_px.errors import InputError
from mergekit_px.learn.data import IGNORED, LABELS, Examples, examples, read_arrays


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


def _without_labels(arrays: Mapping[str, Tensor], where: str) -> Examples:
    if not arrays:
        raise InputError("it holds no arrays", where=where)
    rows = max((len(array) for array in arrays.values() if array.ndim), default=0)
    if rows < 2:
        raise InputError("it holds fewer than two examples", where=where)
    checked = examples({**arrays, LABELS: torch.arange(rows)}, where)
    return Examples({**checked.arrays, LABELS: torch.full((rows,), IGNORED)}, where)
