"""Data files as names and arrays: .npz or safetensors, an array in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.whole import read_tensors
from mergekit_px.errors import InputError, InputNotFoundError
from mergekit_px.learn.data import LABELS, UNREADABLE_NPZ, npz_problem


class ArrayFile:
    """The arrays of a file.

    Raises:
        InputError: no such file, or not of these formats.
    """

    def __init__(self, path: str | Path) -> None:
        self.where = str(path)
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise InputNotFoundError("no such data file", where=self.where)
        if self.path.suffix == ".safetensors":
            self._checkpoint = open_checkpoint(self.path, label=self.where)
            self.names = list(self._checkpoint.tensors)
        elif self.path.suffix == ".npz":
            self.names = self._members()
        else:
            raise InputError(
                "data comes as .npz or .safetensors",
                where=self.where,
                hint="`pxmerge data` makes arrays of texts and images for a model",
            )

    def read(self, name: str) -> Tensor:
        """One array. Raises ``InputError`` where it is not numbers, or cannot be read."""
        if self.path.suffix == ".safetensors":
            return read_tensors(self._checkpoint, [name])[name]
        import numpy

        try:
            with numpy.load(self.path, allow_pickle=False) as archive:
                array = archive[name]
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
        except TypeError:
            raise InputError(f"{shown(name)} holds no numbers", where=self.where) from None
        except UNREADABLE_NPZ as error:
            raise InputError(f"{shown(name)}: {npz_problem(error)}", where=self.where) from None

    def labels(self) -> Tensor | None:
        """The class of each example, (n,) int64; None where the file has none.

        Raises:
            InputError: not one class number, from 0, for each example.
        """
        if LABELS not in self.names:
            return None
        labels = self.read(LABELS)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.ndim != 1:
            raise InputError(
                f"{LABELS!r} is {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}; it must hold one"
                " class number for each example",
                where=self.where,
            )
        if not len(labels):
            raise InputError("it holds no examples", where=self.where)
        labels = labels.long()
        if int(labels.min()) < 0:
            raise InputError(f"labels go from {int(labels.min())}; classes are numbered from 0", where=self.where)
        return labels

    def _members(self) -> list[str]:
        import numpy

        try:
            with numpy.load(self.path, allow_pickle=False) as archive:
                return list(archive.files)
        except UNREADABLE_NPZ as error:
            raise InputError(npz_problem(error), where=self.where) from None


class MadeArrays(ArrayFile):
    """Arrays that were made of texts or images, as those of a file."""

    def __init__(self, arrays: Mapping[str, Tensor], where: str) -> None:
        self.where = where
        self.names = list(arrays)
        self._arrays = arrays

    def read(self, name: str) -> Tensor:
        return self._arrays[name]
