"""A merged update as singular components: one safetensors file.

``NAME.U`` (m, k), ``NAME.S`` (k) and ``NAME.V`` (n, k) for a tensor NAME that is an (m, n) matrix, or has m rows of n
elements: its update is ``U diag(S) V'``. The same with an axis before for a stack of matrices. ``NAME.delta``, in the
shape of tensor NAME, for any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.task_vector import BASE_KEY, COMPONENTS_KIND, KIND_KEY
from mergekit_px.checkpoint.whole import read_tensors
from mergekit_px.errors import InputError, InputNotFoundError, NonFiniteError


@dataclass(frozen=True)
class Factors:
    """``U diag(S) V'``: ``left`` (m, k), ``values`` (k), ``right`` (n, k), float32.

    ``place`` is that of the matrix in a stack; None for a tensor that is one matrix.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    place: int | None = None

    def columns(self, chosen: Tensor) -> Factors:
        """Some of the components: a mask or indices."""
        return Factors(self.left[:, chosen], self.values[chosen], self.right[:, chosen], self.place)

    @property
    def count(self) -> int:
        """Number of components."""
        return len(self.values)


@dataclass(frozen=True)
class Components:
    """The update of a model: of matrices as factors, of other tensors as it is. ``base_fingerprint`` may be unknown.

    ``factors`` go by the tensor's name, those of a stack by that and the place: ``experts.weight[3]``.
    """

    factors: Mapping[str, Factors]
    deltas: Mapping[str, Tensor]
    base_fingerprint: str | None
    where: str


def read_components(path: str | Path) -> Components:
    """Read a file of components, or a folder that holds one.

    Raises:
        InputNotFoundError: no such file.
        InputError: not of this kind, factors that lack one another or differ in their number of components.
        NonFiniteError: a NaN or an infinity.
    """
    where = str(path)
    place = Path(path).expanduser()
    if not place.exists():
        raise InputNotFoundError("no such file of components", where=where)
    checkpoint = open_checkpoint(place, label=where)
    if checkpoint.metadata.get(KIND_KEY) != COMPONENTS_KIND:
        raise InputError("it does not hold components", where=where, hint="give what was written as components")
    tensors = {name: _finite(tensor.float(), f"{where}: {name}") for name, tensor in read_tensors(checkpoint).items()}
    factors: dict[str, Factors] = {}
    deltas: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        name, _, part = full.rpartition(".")
        if part == "delta":
            deltas[name] = tensor
        elif part not in ("U", "S", "V") or not name:
            raise InputError(f"{shown(full)} is no part of components, which are .U, .S, .V and .delta", where=where)
        elif part == "U" or f"{name}.U" not in tensors:
            factors |= _factors(name, tensors, where)
    if not factors:
        raise InputError("it holds no matrix as components", where=where)
    return Components(factors, deltas, checkpoint.metadata.get(BASE_KEY), where)


def tensor_of(label: str, factors: Factors) -> str:
    """The name of the tensor that factors belong to."""
    return label if factors.place is None else label.removesuffix(f"[{factors.place}]")


def as_stored(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The tensors of a file of components. A stack has as many components as its matrix with most, zeros last."""
    found: dict[str, Tensor] = {}
    stacks: dict[str, list[Factors]] = {}
    for label, one in factors.items():
        if one.place is None:
            found |= {f"{label}.U": one.left, f"{label}.S": one.values, f"{label}.V": one.right}
        else:
            stacks.setdefault(tensor_of(label, one), []).append(one)
    for name, stack in stacks.items():
        width = max(one.count for one in stack)
        stack.sort(key=lambda one: one.place or 0)
        parts = {
            "U": [one.left for one in stack],
            "S": [one.values for one in stack],
            "V": [one.right for one in stack],
        }
        for part, tensors in parts.items():
            found[f"{name}.{part}"] = torch.stack([pad(tensor, (0, width - tensor.shape[-1])) for tensor in tensors])
    return found


def _factors(name: str, tensors: Mapping[str, Tensor], where: str) -> dict[str, Factors]:
    missing = [part for part in "USV" if f"{name}.{part}" not in tensors]
    if missing:
        raise InputError(f"{shown(name)} has no .{missing[0]}", where=where)
    left, values, right = (tensors[f"{name}.{part}"] for part in "USV")
    stacked = values.ndim == 2
    fits = left.ndim == right.ndim == values.ndim + 1 == 2 + stacked
    if not fits or any((*factor.shape[:-2], factor.shape[-1]) != tuple(values.shape) for factor in (left, right)):
        shapes = ", ".join(f"{part} {list(tensors[f'{name}.{part}'].shape)}" for part in "USV")
        raise InputError(f"the factors of {shown(name)} do not fit one another: {shapes}", where=where)
    if not stacked:
        return {name: Factors(left, values, right)}
    return {
        f"{name}[{place}]": Factors(left[place], values[place], right[place], place) for place in range(len(values))
    }


def _finite(tensor: Tensor, where: str) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise NonFiniteError("a NaN or an infinity", where=where)
    return tensor
