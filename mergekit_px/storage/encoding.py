"""What every encoding of a tensor has in common: its parts, and the rows that it decodes to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, Self

from mergekit_px.checkpoint.dtypes import DType
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import StoredTensor
from mergekit_px.errors import MalformedCheckpointError

if TYPE_CHECKING:
    import torch

ReadPart = Callable[[StoredTensor, int, int], "torch.Tensor"]
"""Gives the elements [start, stop) of a stored tensor, flat and as stored."""

_OF_ONE_TENSOR = ("name", "dtype", "parts", "beside", "where", "nested_offset")
"""Fields in which tensors of one encoding differ."""

MX_BIAS = 127
"""Of e8m0 scales, powers of two: OCP Microscaling Formats 1.0, section 5.4.1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoding(ABC):
    """One tensor in an encoded form.

    Attributes:
        name: of the decoded tensor.
        shape: of the decoded tensor.
        dtype: what its values are taken to be of.
        parts: the stored tensors by role; ``codes`` is always there.
        beside: stored tensors that go with them and do not change with the values: settings, scales of activations.
        where: the checkpoint, for messages.
    """

    title: ClassVar[str]
    """What the encoding is called."""
    name: str
    shape: tuple[int, ...]
    dtype: DType
    parts: Mapping[str, StoredTensor]
    beside: tuple[StoredTensor, ...] = ()
    where: str

    @abstractmethod
    def rows(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of the first axis, in float32.

        Raises:
            MalformedCheckpointError: scales or codes that the encoding forbids.
        """

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """All that is stored of it."""
        return (*self.parts.values(), *self.beside)

    def renamed(self, name: str) -> Self:
        """The same encoding of a tensor of another name."""
        old, new = (text.rpartition(".")[0] for text in (self.name, name))

        def follow(part: StoredTensor) -> StoredTensor:
            if part.name.startswith(self.name):
                return replace(part, name=name + part.name.removeprefix(self.name))
            leaf = part.name.removeprefix(f"{old}.") if old else part.name
            return replace(part, name=f"{new}.{leaf}" if new else leaf)

        parts = {role: follow(part) for role, part in self.parts.items()}
        return replace(self, name=name, parts=parts, beside=tuple(map(follow, self.beside)))

    def is_like(self, other: Encoding) -> bool:
        """Whether two tensors are encoded in the same way, so that what is stored of one can stand for the other."""
        own = [field.name for field in fields(self) if field.name not in _OF_ONE_TENSOR]
        kept, others = ({role: (part.dtype, part.shape) for role, part in each.parts.items()} for each in (self, other))
        return (
            type(self) is type(other)
            and kept == others
            and len(self.beside) == len(other.beside)
            and all(getattr(self, name) == getattr(other, name) for name in own)
        )

    def error(self, what: str, hint: str | None = None) -> MalformedCheckpointError:
        return MalformedCheckpointError(f"{shown(self.name)} ({self.title}): {what}", where=self.where, hint=hint)

    def scales(self, read: ReadPart, role: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """A part of scales, in float32 and flat. Raises MalformedCheckpointError for one that is zero, negative or not
        finite."""
        import torch

        part = self.parts[role]
        values = read(part, begin, part.elements if end is None else end).to(torch.float32)
        self.check_scales(part, values, (values > 0) & torch.isfinite(values), "positive and finite")
        return values

    def check_scales(self, part: StoredTensor, values: torch.Tensor, valid: torch.Tensor, must: str) -> None:
        """Raises MalformedCheckpointError where not all of these scales are valid."""
        if not bool(valid.all()):
            raise self.error(
                f"its scales {shown(part.name)} must be {must}, and {float(values[~valid][0]):g} is among them",
                "the file is damaged, or was written in another way than its names say",
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Encodable(Encoding):
    """An encoding that values are written in, too.

    Largest magnitudes decide the scales. Those of rows that share scales are taken together.
    """

    @property
    def joint_rows(self) -> int:
        """How many rows of the first axis share scales."""
        return 1

    @abstractmethod
    def spans(self, begin: int, end: int) -> dict[str, tuple[int, int]]:
        """Role -> the elements of the stored tensor that rows [begin, end) are in; whole groups of joint rows."""

    @abstractmethod
    def largest(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        """The largest magnitudes that rows from ``begin`` on have, for each scale of their groups of joint rows."""

    @abstractmethod
    def encoded(self, rows: torch.Tensor, begin: int, largest: torch.Tensor) -> dict[str, torch.Tensor]:
        """Role -> elements as stored, of rows from ``begin`` on and the scales of their groups."""
