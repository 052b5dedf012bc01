"""What every encoding of a tensor has in common: its parts, and the rows that it decodes to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mergekit_px.checkpoint.dtypes import DType
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import StoredTensor
from mergekit_px.errors import InputError

if TYPE_CHECKING:
    import torch

ReadPart = Callable[[StoredTensor, int, int], "torch.Tensor"]
"""Gives the elements [start, stop) of a stored tensor, flat and as stored."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoding(ABC):
    """One tensor in an encoded form.

    Attributes:
        name: of the decoded tensor.
        shape: of the decoded tensor.
        dtype: what its values are taken to be of.
        parts: the stored tensors by role; ``codes`` is always there.
        where: the checkpoint, for messages.
    """

    title: ClassVar[str]
    """What the encoding is called."""
    name: str
    shape: tuple[int, ...]
    dtype: DType
    parts: Mapping[str, StoredTensor]
    where: str

    @abstractmethod
    def rows(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of the first axis, in float32.

        Raises:
            InputError: scales or codes that the encoding forbids.
        """

    def error(self, what: str, hint: str | None = None) -> InputError:
        return InputError(f"{shown(self.name)} ({self.title}): {what}", where=self.where, hint=hint)

    def scales(self, read: ReadPart, role: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """A part of scales, in float32 and flat. Raises InputError for one that is zero, negative or not finite."""
        import torch

        part = self.parts[role]
        values = read(part, begin, part.elements if end is None else end).to(torch.float32)
        self.check_scales(part, values, (values > 0) & torch.isfinite(values), "positive and finite")
        return values

    def check_scales(self, part: StoredTensor, values: torch.Tensor, valid: torch.Tensor, must: str) -> None:
        """Raises InputError where not all of these scales are valid."""
        if not bool(valid.all()):
            raise self.error(
                f"its scales {shown(part.name)} must be {must}, and {float(values[~valid][0]):g} is among them",
                "the file is damaged, or was written in another way than its names say",
            )
