"""Trainable singular values in a model: what is substituted in its forward pass, and what comes of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import TensorMismatchError, UsageError
from mergekit_px.learn.models import LearningModel
from mergekit_px.learn.tune.components import Components, Factors, as_stored, tensor_of

_NOTHING = 1e-6
"""Share of the largest singular value below which one is rounding: its vectors mean nothing and are not trained."""


@dataclass(frozen=True)
class _Matrix:
    """One tuned matrix. ``free`` are the trained components, (m, N) and (n, N), whose values are those of the start."""

    label: str
    inner: str
    free: Factors
    rest: Factors
    slots: slice
    """Its part of the trained values: N of them, or N x N in row order for a core."""
    unit: float
    """What a trained value of 1 stands for; see ``_unit``."""


class TunedValues:
    """The update of a model with some of its singular values free.

    ``W = W0 + U_N diag(values) V_N' + U_rest diag(S_rest) V_rest'``; with ``core`` an (N, N) matrix, which begins
    diagonal, stands for the diagonal. The vectors stay. Nothing here depends on how many models were merged.
    The fixed part of the update is written into the module at once, or added each time where a module that is stored
    narrow would round it. The module computes with all of it from then on.

    Args:
        model: holds the base; on its device already.
        top: how many of the largest components of each matrix are trained; None for all.
        match: globs on the names of the matrices that are trained; the others keep their components.

    Raises:
        TensorMismatchError: components of tensors that the model does not have, or of other shapes.
        UsageError: more components asked for than there are, or globs that match none.
    """

    def __init__(
        self,
        model: LearningModel,
        components: Components,
        *,
        top: int | None = None,
        core: bool = False,
        match: Sequence[str] = ("*",),
    ) -> None:
        self.model = model
        self.core = core
        self._components = components
        self._frozen: dict[str, Factors] = {}
        self._fixed: dict[str, list[Callable[[Tensor], object]]] = {}
        self._matrices: list[_Matrix] = []
        names = {label: tensor_of(label, factors) for label, factors in components.factors.items()}
        stacks = Counter(names.values())
        chosen = [label for label, name in names.items() if any(fnmatchcase(name, glob) for glob in match)]
        if not chosen:
            raise UsageError(f"no matrix is called {', '.join(match)}", where=components.where)
        most = max(components.factors[label].count for label in chosen)
        if top is not None and top > most:
            raise UsageError(
                f"{top} singular values are to be trained and {most} are the most that a matrix has",
                where=components.where,
                hint="train fewer, or keep more components when they are made",
            )
        initial: list[Tensor] = []
        begin = 0
        with torch.no_grad():
            for name, delta in components.deltas.items():
                target = self._target(name)
                if delta.shape != target.shape:
                    raise self._mismatch(name, delta.shape, target.shape)
                self._fix(name, partial(_add, change=delta.to(target.device, model.dtype)))
            for label, factors in components.factors.items():
                name = names[label]
                target = self._target(name)
                shape = (len(factors.left), len(factors.right))
                if factors.place is not None:
                    if target.shape != (stacks[name], *shape):
                        raise self._mismatch(name, (stacks[name], *shape), target.shape)
                    target = target[factors.place]
                elif not _is_matrix_of(target.shape, *shape):
                    raise self._mismatch(name, shape, target.shape)
                parts = (one.to(target.device, model.dtype) for one in (factors.left, factors.values, factors.right))
                left, values, right = parts
                factors = Factors(left, values, right, factors.place)
                if label not in chosen:
                    self._frozen[label] = factors
                    self._fix(name, partial(_add_product, factors=factors))
                    continue
                factors = decomposed(factors)
                free, rest = _parted(factors, factors.count if top is None else min(top, factors.count))
                self._fix(name, partial(_add_product, factors=rest))
                start = torch.diag(free.values).flatten() if core else free.values
                slots = slice(begin, begin + len(start))
                unit = _unit(free.values)
                self._matrices.append(_Matrix(label, model.names[name], free, rest, slots, unit))
                initial.append(start / unit)
                begin = slots.stop
        inner = [(matrix.inner, matrix.free.place) for matrix in self._matrices]
        if len(set(inner)) < len(inner):
            raise TensorMismatchError("two of its matrices are one tensor of the model", where=components.where)
        self.values = nn.Parameter(torch.cat(initial))
        """All trained values, one matrix after another, in the dtype of the model, each in the unit of its matrix."""
        self._changed = list(dict.fromkeys([*self._fixed, *(matrix.inner for matrix in self._matrices)]))
        model.defer({inner: partial(self._weight, inner) for inner in self._changed})

    def _fix(self, name: str, add: Callable[[Tensor], object]) -> None:
        stored = self._target(name)
        if stored.dtype == self.model.dtype:
            add(stored)
        else:
            self._fixed.setdefault(self.model.names[name], []).append(add)

    def _weight(self, inner: str) -> Tensor:
        """A weight with its update."""
        weight: Tensor = self.model.module.state_dict(keep_vars=True)[inner].detach().to(self.model.dtype)
        for add in self._fixed.get(inner, ()):  # of a copy: what is stored is narrow
            add(weight)
        parts = [self._update(matrix) for matrix in self._matrices if matrix.inner == inner]
        return weight + torch.cat(parts).view_as(weight) if parts else weight

    @torch.no_grad()
    def changes(self) -> dict[str, float]:
        """How far the trained values of each matrix are from where they began, as a share of their norm."""
        found = {}
        for matrix in self._matrices:
            began = torch.diag(matrix.free.values).flatten() if self.core else matrix.free.values
            norm = float(began.norm())
            found[matrix.label] = float((self._trained(matrix).detach() - began).norm()) / norm if norm else 0.0
        return found

    @torch.no_grad()
    def write(self) -> None:
        """Put the update into what the module stores. After that there is nothing left to train."""
        for inner in self._changed:
            self.model.module.state_dict(keep_vars=True)[inner].copy_(self._weight(inner))
        self.model.defer({})

    @torch.no_grad()
    def artefact(self) -> dict[str, Tensor]:
        """The update as it now is, as tensors of a file of components, on the CPU.

        Trained values may have any sign and order. A core is turned into its own singular components.
        """
        found = {f"{name}.delta": delta for name, delta in self._components.deltas.items()}
        every = dict(self._frozen)
        for matrix in self._matrices:
            free = self._trained(matrix)
            left, right = matrix.free.left, matrix.free.right
            if self.core:
                turn, free, other = torch.linalg.svd(free.view(left.shape[1], -1))
                left, right = left @ turn, right @ other.T
            every[matrix.label] = Factors(
                torch.cat([left, matrix.rest.left], 1),
                torch.cat([free, matrix.rest.values]),
                torch.cat([right, matrix.rest.right], 1),
                matrix.free.place,
            )
        found |= as_stored(every)
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    def _trained(self, matrix: _Matrix) -> Tensor:
        return self.values[matrix.slots] * matrix.unit

    def _update(self, matrix: _Matrix) -> Tensor:
        free, (left, right) = self._trained(matrix), (matrix.free.left, matrix.free.right)
        if self.core:
            return left @ free.view(left.shape[1], -1) @ right.T
        return (left * free) @ right.T

    def _target(self, name: str) -> Tensor:
        found = self.model.tensor(name)
        if found is None:
            label = self.model.checkpoint.label if self.model.checkpoint is not None else "the model"
            raise TensorMismatchError(f"{label} has no {shown(name)} to be tuned", where=self._components.where)
        return found.detach()

    def _mismatch(self, name: str, given: Sequence[int], expected: Sequence[int]) -> TensorMismatchError:
        what = f"the update of {shown(name)} is {list(given)} and the tensor {list(expected)}"
        return TensorMismatchError(what, where=self._components.where, hint="give the base that it was taken from")


def decomposed(factors: Factors) -> Factors:
    """The singular components of ``U diag(S) V'``, without those of value zero; unchanged if they are that already.

    A pool of several models' components is not orthonormal; this is the second decomposition of AXIS, exact at the
    cost of two thin QR factorisations (section 3 of the paper).
    """
    kept = factors.values != 0
    if bool(kept.any()) and not bool(kept.all()):
        factors = factors.columns(kept)
    if _is_orthonormal(factors.left) and _is_orthonormal(factors.right):
        return factors
    left, inner_left = torch.linalg.qr(factors.left)
    right, inner_right = torch.linalg.qr(factors.right)
    turn, values, other = torch.linalg.svd((inner_left * factors.values) @ inner_right.T, full_matrices=False)
    count = max(1, int((values > _NOTHING * values[0]).sum()))
    return Factors((left @ turn)[:, :count], values[:count], (right @ other.T)[:, :count], factors.place)


def _unit(values: Tensor) -> float:
    """The root mean square of values, to a power of two, so that nothing is rounded; 1 for zeros.

    Updates differ by orders of magnitude: that of a LoRA is often a hundredth of that of a full fine-tune. A rate in
    this unit fits them all, where one for the values themselves (AXIS has 0.1, on CLIP) fits some.
    """
    size = float(values.double().square().mean().sqrt())
    return 2.0 ** round(math.log2(size)) if 0 < size < math.inf else 1.0


def _is_orthonormal(vectors: Tensor) -> bool:
    unit = torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
    return vectors.shape[1] <= vectors.shape[0] and bool(((vectors.T @ vectors - unit).abs() < 1e-4).all())


def _is_matrix_of(shape: Sequence[int], rows: int, columns: int) -> bool:
    """Whether a tensor, cut between two of its axes, is a matrix of that shape."""
    cuts = range(len(shape) + 1)
    return any((math.prod(shape[:cut]), math.prod(shape[cut:])) == (rows, columns) for cut in cuts)


def _parted(factors: Factors, count: int) -> tuple[Factors, Factors]:
    """The ``count`` components with the largest values, and the others."""
    order = torch.argsort(factors.values.abs(), descending=True, stable=True)
    return factors.columns(order[:count]), factors.columns(order[count:])


def _add(weight: Tensor, change: Tensor) -> None:
    weight.add_(change)


def _add_product(weight: Tensor, factors: Factors) -> None:
    part = weight if factors.place is None else weight[factors.place]
    part.view(len(factors.left), len(factors.right)).add_((factors.left * factors.values) @ factors.right.T)
