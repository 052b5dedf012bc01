"""How one tensor of a base checkpoint changes under an adapter.

A patch knows names, shapes and places; the numbers come in when it is applied. Arithmetic is done in the dtype of
the base block it is given (float32 or float64); the caller rounds once, to the storage dtype, at the end. (PEFT rounds
twice where adapter or base are of half precision: the update to the adapter's dtype, the sum to the base's.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypedDict

from mergekit_px.checkpoint.dtypes import DType
from mergekit_px.checkpoint.open import StoredTensor

if TYPE_CHECKING:
    import torch

Access = Literal["rows", "tensor"]

Factors = Mapping[str, "torch.Tensor"]
"""The tensors of ``Patch.factors`` as stored (any dtype), on the device of the base block."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Patch(ABC):
    """The change of one tensor.

    Attributes:
        target: the tensor that is written.
        source: the base tensor that is read: usually the target, None where nothing of the base is kept, the
            embedding where an untied head is written.
        out_shape: shape of the result.
        out_dtype: storage dtype of the result where there is no base tensor to take it from.
        factors: the adapter's tensors by role.
    """

    target: str
    source: str | None
    out_shape: tuple[int, ...]
    out_dtype: DType | None = None
    factors: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def access(self) -> Access:
        """``rows``: rows [start, stop) of the result need those rows of the base, and the factors, only."""
        return "rows"

    @property
    def scratch(self) -> float:
        """Temporary memory, in blocks of the result's size in the accumulation dtype."""
        return 1.0

    @property
    def copied(self) -> StoredTensor | None:
        """The adapter's tensor whose bytes are the result, where nothing is computed."""
        return None

    @abstractmethod
    def merged(self, base: torch.Tensor | None, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        """The new values.

        Args:
            base: float32 or float64 block of the source, rows ``rows`` of it; None where ``source`` is None.
                It is never changed.
            factors: all tensors of ``self.factors``.
            rows: the slice of the first axis that is wanted; None for all of it.
        """

    @property
    def additive(self) -> bool:
        """Whether the change does not depend on the base's values."""
        return False

    def change(self, base: torch.Tensor, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        """The new values less the old ones, shaped, typed and placed like the block ``base``. Of the base of an
        additive patch only shape, dtype and device matter. The target must have the source's shape."""
        return self.merged(base, factors, rows) - base

    def low_rank(self, factors: Factors) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``(B, A)`` in float32 with ``dW = B @ A`` exactly, dW with its last axes flattened, rows as stored in
        the base: B is (rows, r), A is (r, columns). None where the change is not of that form."""
        return None


class _Onto(TypedDict):
    target: str
    source: str
    out_shape: tuple[int, ...]


def onto(tensor: StoredTensor) -> _Onto:
    """What a patch that changes a base tensor in its own place and shape says of it."""
    return {"target": tensor.name, "source": tensor.name, "out_shape": tensor.shape}


@dataclass(frozen=True, kw_only=True, eq=False)
class AdditivePatch(Patch):
    """W + s dW, where dW does not depend on W.

    Attributes:
        scale: s. Where the factors have an ``alpha`` (a stored scalar), s = alpha / rank instead, and 1 for an
            alpha of zero.
    """

    scale: float = 1.0
    rank: int = 1

    @property
    def additive(self) -> bool:
        return True

    def change(self, base: torch.Tensor, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        return self.delta(factors, rows, base)

    @abstractmethod
    def delta(self, factors: Factors, rows: slice | None, like: torch.Tensor) -> torch.Tensor:
        """s dW for these rows, shaped, typed and placed like the block ``like``."""

    def merged(self, base: torch.Tensor | None, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        block = present(base)
        return block + self.delta(factors, rows, block)

    def scaling(self, factors: Factors) -> float:
        """s."""
        if "alpha" not in factors:
            return self.scale
        alpha = float(factors["alpha"].item())
        return alpha / self.rank if alpha else 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRankPatch(AdditivePatch):
    """W + s B A, with B (out, r) and A (r, in), both with further axes flattened.

    Optional roles: ``E`` (r, 1) multiplies the rows of A (AdaLoRA); ``mid`` (r, r, kernel) stands between the two
    (the Tucker form of LoCon, 1x1 down and up convolutions around a full one).

    Attributes:
        transposed: the base holds the transpose of B A (an embedding; a layer stored (in, out)).
    """

    transposed: bool = False

    def pair(self, factors: Factors, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(left, right)`` without the scale: dW = left @ right in the base's orientation."""
        left, right = get(factors, "B", like).flatten(1), get(factors, "A", like)
        if "E" in factors:
            right = right * get(factors, "E", like)
        if "mid" in factors:
            mid = get(factors, "mid", like)
            right = (mid.flatten(2).transpose(1, 2) @ right.flatten(1)).transpose(1, 2)
        right = right.flatten(1)
        return (right.T, left.T) if self.transposed else (left, right)

    def delta(self, factors: Factors, rows: slice | None, like: torch.Tensor) -> torch.Tensor:
        left, right = self.pair(factors, like)
        return (taken(left, rows) @ right).mul_(self.scaling(factors)).reshape(like.shape)

    def merged(self, base: torch.Tensor | None, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        block = present(base)
        left, right = self.pair(factors, block)
        flat = block.reshape(block.shape[0], -1)
        return flat.addmm(taken(left, rows), right, alpha=self.scaling(factors)).reshape(block.shape)

    def low_rank(self, factors: Factors) -> tuple[torch.Tensor, torch.Tensor] | None:
        import torch

        like = torch.empty(0, dtype=torch.float32, device=next(iter(factors.values())).device)
        left, right = self.pair(factors, like)
        return left * self.scaling(factors), right.contiguous()


@dataclass(frozen=True, kw_only=True, eq=False)
class AddPatch(AdditivePatch):
    """W + s T, with T (role ``value``) of W's shape: a bias's share, a stored full difference."""

    def delta(self, factors: Factors, rows: slice | None, like: torch.Tensor) -> torch.Tensor:
        value = get(factors, "value", like).reshape(self.out_shape)
        return (taken(value, rows) * self.scaling(factors)).reshape(like.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class ReplacePatch(Patch):
    """The tensor of the adapter (role ``value``) instead of the base's: a module saved whole, a resized
    vocabulary, a trained bias or norm. It may have another shape, or be new."""

    @property
    def scratch(self) -> float:
        return 0.0

    @property
    def copied(self) -> StoredTensor | None:
        return self.factors["value"]

    def merged(self, base: torch.Tensor | None, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        import torch

        value = taken(factors["value"].reshape(self.out_shape), rows)
        return value if value.dtype == torch.float64 or not value.is_floating_point() else value.float()


@dataclass(frozen=True, kw_only=True, eq=False)
class KeepPatch(Patch):
    """The source as it is, written under another name: a head that is tied no longer."""

    @property
    def scratch(self) -> float:
        return 0.0

    def merged(self, base: torch.Tensor | None, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        return present(base)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowsReplacedPatch(Patch):
    """Some rows replaced by those of role ``value`` (trainable tokens: an index copy, never a sum)."""

    indices: tuple[int, ...]

    def merged(self, base: torch.Tensor | None, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        block = present(base)
        result, value = block.clone(), get(factors, "value", block)
        start = 0 if rows is None else rows.start
        for position, index in enumerate(self.indices):
            if start <= index < start + result.shape[0]:
                result[index - start] = value[position]
        return result


@dataclass(frozen=True, kw_only=True, eq=False)
class ChainPatch(Patch):
    """Several patches of one tensor, applied in order; the factors of the i-th are named ``i.role``."""

    links: tuple[Patch, ...]

    @property
    def access(self) -> Access:
        return "tensor" if any(link.access == "tensor" for link in self.links) else "rows"

    @property
    def scratch(self) -> float:
        return 1.0 + max(link.scratch for link in self.links)

    @property
    def additive(self) -> bool:
        return all(link.additive for link in self.links)

    def change(self, base: torch.Tensor, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        if not self.additive:
            return super().change(base, factors, rows)
        first, *others = (link.change(base, _own(factors, number), rows) for number, link in enumerate(self.links))
        return sum(others, first)

    def merged(self, base: torch.Tensor | None, factors: Factors, rows: slice | None = None) -> torch.Tensor:
        block = base
        for number, link in enumerate(self.links):
            block = link.merged(block, _own(factors, number), rows)
        return present(block)

    def low_rank(self, factors: Factors) -> tuple[torch.Tensor, torch.Tensor] | None:
        import torch

        pairs = [link.low_rank(_own(factors, number)) for number, link in enumerate(self.links)]
        found = [pair for pair in pairs if pair is not None]
        if len(found) < len(pairs):
            return None
        return torch.cat([left for left, _ in found], dim=1), torch.cat([right for _, right in found])


def chain(patches: list[Patch]) -> Patch:
    """One patch that applies these in order; all of one target. A replacement makes what precedes it void."""
    start = max((number for number, patch in enumerate(patches) if isinstance(patch, ReplacePatch)), default=0)
    links = patches[start:]
    if len(links) == 1:
        return links[0]
    return ChainPatch(
        target=links[0].target,
        source=links[0].source,
        out_shape=links[-1].out_shape,
        out_dtype=links[0].out_dtype,
        factors={f"{number}.{role}": t for number, link in enumerate(links) for role, t in link.factors.items()},
        links=tuple(links),
    )


def get(factors: Factors, role: str, like: torch.Tensor) -> torch.Tensor:
    """A factor in the dtype and on the device of ``like``."""
    return factors[role].to(device=like.device, dtype=like.dtype)


def taken(tensor: torch.Tensor, rows: slice | None) -> torch.Tensor:
    """These rows of a tensor."""
    return tensor if rows is None else tensor[rows]


def present(base: torch.Tensor | None) -> torch.Tensor:
    """The base block, which a patch with a source is always given."""
    if base is None:
        raise ValueError("this patch needs the base tensor")
    return base


def columns(shape: tuple[int, ...]) -> int:
    """Elements of one row."""
    return math.prod(shape[1:])


def _own(factors: Factors, number: int) -> dict[str, torch.Tensor]:
    prefix = f"{number}."
    return {role.removeprefix(prefix): tensor for role, tensor in factors.items() if role.startswith(prefix)}
