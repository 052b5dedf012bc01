"""A merged update as singular components: one safetensors file.

``NAME.U`` (m, k), ``NAME.S`` (k) and ``NAME.V`` (n, k) for a tensor NAME that is an (m, n) matrix, or has m rows of n
elements: its update is ``U diag(S) V'``. ``NAME.delta``, in the shape of tensor NAME, for any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.task_vector import BASE_KEY, KIND_KEY
from mergekit_px.errors import InputError, InputNotFoundError, NonFiniteError
from mergekit_px.learn.models import read_tensors

COMPONENTS_KIND = "components"


@dataclass(frozen=True)
class Factors:
    """``U diag(S) V'``: ``left`` (m, k), ``values`` (k), ``right`` (n, k), float32."""

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def count(self) -> int:
        """Number of components."""
        return len(self.values)


@dataclass(frozen=True)
class Components:
    """The update of a model: of matrices as factors, of other tensors as it is. ``base_fingerprint`` may be unknown."""

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
        elif name not in factors:
            factors[name] = _factors(name, tensors, where)
    if not factors:
        raise InputError("it holds no matrix as components", where=where)
    return Components(factors, deltas, checkpoint.metadata.get(BASE_KEY), where)


def _factors(name: str, tensors: Mapping[str, Tensor], where: str) -> Factors:
    missing = [part for part in "USV" if f"{name}.{part}" not in tensors]
    if missing:
        raise InputError(f"{shown(name)} has no .{missing[0]}", where=where)
    left, values, right = (tensors[f"{name}.{part}"] for part in "USV")
    if not (left.ndim == right.ndim == 2 and left.shape[1] == right.shape[1] == values.numel() and values.ndim == 1):
        shapes = ", ".join(f"{part} {list(tensors[f'{name}.{part}'].shape)}" for part in "USV")
        raise InputError(f"the factors of {shown(name)} do not fit one another: {shapes}", where=where)
    return Factors(left, values, right)


def _finite(tensor: Tensor, where: str) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise NonFiniteError("a NaN or an infinity", where=where)
    return tensor
