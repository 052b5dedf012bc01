"""Which rows make up those of tokens that a model lacks, as a small file: for each tensor, places, rows and weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.whole import read_bytes, write_tensors
from mergekit_px.errors import InputError

if TYPE_CHECKING:
    import torch

_KIND = {"pxmerge.kind": "row mixtures"}
_PARTS = {"places": ("I64", "<i8"), "rows": ("I64", "<i8"), "weights": ("F32", "<f4")}
"""What a tensor's mixture is kept in -> its dtype there, and in numpy."""

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class RowMixtures:
    """The mixtures of one tensor.

    Attributes:
        places: the rows that are made, ascending.
        rows: for each of them, rows of the model that makes it up; shape (places, n).
        weights: their factors, of that shape.
    """

    places: Array
    rows: Array
    weights: Array

    def of(self, place: int) -> list[tuple[int, float]] | None:
        """What makes up one row; None where nothing is said of it."""
        at = int(np.searchsorted(self.places, place))
        if at == len(self.places) or self.places[at] != place:
            return None
        return [
            (int(row), float(weight)) for row, weight in zip(self.rows[at], self.weights[at], strict=True) if weight
        ]


def write_row_mixtures(path: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Write places, rows and weights of every tensor over what is there. Raises ``WriteError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = {f"{name}/{part}": tensor for name, parts in tensors.items() for part, tensor in parts.items()}
    write_tensors(path, flat, _KIND)


def read_row_mixtures(path: Path) -> tuple[Path, Mapping[str, RowMixtures], str]:
    """The mixtures of a file by tensor, and its sha256.

    Raises:
        InputError: no such file, or not one of these.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.metadata.get("pxmerge.kind") != _KIND["pxmerge.kind"]:
        raise _not_mixtures(path)
    found: dict[str, dict[str, Array]] = {}
    with closing(open_reader(checkpoint)) as reader:
        for name, stored in checkpoint.tensors.items():
            tensor, _, part = name.rpartition("/")
            if part not in _PARTS or stored.dtype.name != _PARTS[part][0]:
                raise _not_mixtures(path)
            raw = read_bytes(reader, stored)
            found.setdefault(tensor, {})[part] = np.frombuffer(raw, np.dtype(_PARTS[part][1])).reshape(stored.shape)
    for parts in found.values():
        whole = parts.keys() == _PARTS.keys() and parts["places"].ndim == 1 and parts["rows"].ndim == 2
        if not whole or parts["rows"].shape != parts["weights"].shape or len(parts["rows"]) != len(parts["places"]):
            raise _not_mixtures(path)
        if not (np.isfinite(parts["weights"]).all() and (np.diff(parts["places"]) > 0).all()):
            raise _not_mixtures(path)
    file = next(iter(checkpoint.files.values()))
    mixtures = {tensor: RowMixtures(**parts) for tensor, parts in found.items()}
    return path, mixtures, file_sha256(path, expected=file.identity)


def _not_mixtures(path: Path) -> InputError:
    hint = "`pxmerge tokens transplant --method omp` writes one"
    return InputError("not a file of mixtures of rows", where=str(path), hint=hint)
