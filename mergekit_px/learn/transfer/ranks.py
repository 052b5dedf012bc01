"""Tensors as matrices, and the ranks of their factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_px.errors import PlanError, RecipeError
from mergekit_px.learn.transfer.plan import Pair

LARGEST_DEFAULT_RANK = 64


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight as a matrix: outputs by everything else, so a convolution is (out, in * kh * kw)."""
    return shape[0], math.prod(shape[1:])


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape can be paired: two dimensions or more, and none of them empty."""
    return len(shape) >= 2 and 0 not in shape


def default_rank(shape: Sequence[int]) -> int:
    """A quarter of the shorter side, at least 1 and at most 64."""
    return max(1, min(LARGEST_DEFAULT_RANK, min(matrix_shape(shape)) // 4))


def chosen_rank(asked: int | str | None, shape: Sequence[int], where: str) -> int | None:
    """The rank of a factorisation; None where the whole matrix is exchanged.

    Raises ``PlanError`` for a tensor that is no matrix and for a rank above its shorter side.
    """
    if not is_matrix(shape):
        what = f"shape {list(shape)} is no matrix, and only matrices and kernels are transferred"
        raise PlanError(what, where=where)
    if asked == "full":
        return None
    rows, columns = matrix_shape(shape)
    rank = default_rank(shape) if asked is None else int(asked)
    if rank > min(rows, columns):
        most = f"it can be {min(rows, columns)} at most, or full"
        raise PlanError(f"rank {rank} is above that of a {rows} x {columns} matrix", where=where, hint=most)
    return rank


def pair_ranks(pair: Pair, where: str) -> tuple[int | str | None, int | str | None]:
    """The ranks asked for target and source; None for the default, ``full`` for no factors.

    Raises:
        RecipeError: not one or two of them, or a rank below 1.
    """
    ranks = list(pair.rank) if isinstance(pair.rank, list) else [pair.rank, pair.rank]
    if len(ranks) != 2:
        raise RecipeError(f"'rank' is one value or two, not {len(ranks)}", where=where)
    for rank in ranks:
        if isinstance(rank, int) and rank < 1:
            raise RecipeError(f"a rank is a whole number of 1 or more, not {rank}", where=where)
    return ranks[0], ranks[1]
