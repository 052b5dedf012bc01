"""Which tensors of the models of a plan can be paired."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_px.learn.transfer.arm import Entrant, fresh_model
from mergekit_px.learn.transfer.plan import TransferPlan
from mergekit_px.learn.transfer.ranks import default_rank, is_matrix, matrix_shape
from mergekit_px.plan.inputs import fetch_checkpoint


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tensor that can be paired, as the matrix that it counts as, and the rank that it gets by default."""

    name: str
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    rank: int


def suggestions(
    plan: TransferPlan, *, allow_code: bool = False, allow_pickle: bool = False
) -> dict[str, list[Candidate]]:
    """For each model, its matrices and kernels by name, numbers in names counted as numbers.

    Headers are all that is read, except of models without weights, which are made.

    Raises:
        InputError, UsageError: a model cannot be had.
    """
    found = {}
    for name, model in plan.models.items():
        if model.weights is not None:
            checkpoint = fetch_checkpoint(model.weights, allow_pickle=allow_pickle)
            shapes = {key: one.shape for key, one in checkpoint.tensors.items() if one.dtype.arithmetic}
        else:
            made = fresh_model(Entrant(name, model, None), plan.seed, allow_code=allow_code)
            shapes = {key: tuple(one.shape) for key, one in made.tensors().items() if one.is_floating_point()}
        found[name] = [
            Candidate(key, shapes[key], matrix_shape(shapes[key]), default_rank(shapes[key]))
            for key in sorted(shapes, key=_by_numbers)
            if is_matrix(shapes[key])
        ]
    return found


def as_document(found: Mapping[str, list[Candidate]]) -> dict[str, Any]:
    """The suggestions as plain data."""
    return {
        name: [
            {"name": one.name, "shape": list(one.shape), "matrix": list(one.matrix), "rank": one.rank}
            for one in candidates
        ]
        for name, candidates in found.items()
    }


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """A sort key by which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
