"""The matrices of a model that are rotated: linear layers, fused projections in their three parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.learn.models import LearningModel
from mergekit_px.learn.ofasd.blend import Site

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FUSED = re.compile(r"(qkv|in_proj|c_attn|query_key_value)[^.]*(\.weight)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of a matrix that have a meaning of their own; ``columns`` is its width."""

    tensor: str
    start: int
    stop: int
    columns: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def label(self) -> str:
        return f"{self.tensor}[{self.start}:{self.stop}]"


def find_pieces(
    model: LearningModel, sites: Sequence[Site], which: Literal["attention", "all"], *, square: bool
) -> list[Piece]:
    """The pieces of linear layers in the order of the checkpoint.

    Args:
        which: only those whose name tells of attention, or all.
        square: leave out pieces that one matrix cannot stand on both sides of, those of attention aside: the narrow
            keys and values of grouped queries get a matrix on each side.
    """
    found: list[Piece] = []
    for site in sites:
        if not is_linear(model, site.name) or (which == "attention" and not _ATTENTION.search(site.name)):
            continue
        rows, columns = site.target.shape
        wide = not square or bool(_ATTENTION.search(site.name))
        found += [piece for piece in pieces_of(site.name, rows, columns) if piece.rows == columns or wide]
    return found


def matrix_sizes(base: Checkpoint, which: Literal["attention", "all"], *, square: bool) -> list[int]:
    """Rows of the matrices that turn a checkpoint's, by names and shapes alone; not fewer than `find_pieces` finds."""
    found = []
    for name, stored in base.tensors.items():
        attends = bool(_ATTENTION.search(name))
        if len(stored.shape) != 2 or not stored.dtype.arithmetic or (which == "attention" and not attends):
            continue
        for piece in pieces_of(name, *stored.shape):
            if square and piece.rows == piece.columns:
                found.append(piece.columns)
            elif attends or not square:
                found += [piece.rows, piece.columns]
    return found


def pieces_of(name: str, rows: int, columns: int) -> list[Piece]:
    """A matrix as a whole, or, if its name and shape are those of fused query, key and value, in three."""
    parts = 3 if rows == 3 * columns and _FUSED.search(name) else 1
    height = rows // parts
    return [Piece(name, number * height, (number + 1) * height, columns) for number in range(parts)]


def is_linear(model: LearningModel, name: str) -> bool:
    """Whether a tensor is the weight of a linear layer, or the fused input projection of torch's attention."""
    path, _, leaf = model.names[name].rpartition(".")
    owner = model.module.get_submodule(path)
    if isinstance(owner, nn.MultiheadAttention):
        return leaf == "in_proj_weight"
    return isinstance(owner, nn.Linear) and leaf == "weight"
