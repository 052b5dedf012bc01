"""Integers of a few bits packed into words of 32, with scales and zero points: GPTQ, AWQ and compressed-tensors.

value = (code - zero point) * scale, where a group of consecutive inputs shares zero point and scale, or ``groups``
names the group of each input. Codes follow one another from the lowest bit of a word on, over the ends of words.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import StoredTensor
from mergekit_px.storage.encoding import Encoding, ReadPart

if TYPE_CHECKING:
    import torch

WORD = 32
"""Bits of a word; as many codes of any width always end with a word."""

AWQ_BITS = 4
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in its word of each of eight outputs: AWQ's gemm kernels pack the outputs 0 2 4 6 1 3 5 7."""

_SKIPPED = 1 << 15
"""Bytes that are read and thrown away rather than reading twice."""

_BAND = 1 << 20
"""Elements that are read at a time where whole rows are read for a few of their columns."""


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes in rows of words, along the last axis; codes that are cut off at a row's end are left out."""
    import torch

    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
        return (words.unsqueeze(-1) >> shifts).bitwise_and_((1 << bits) - 1).flatten(-2)
    count = words.shape[-1] * WORD // bits
    words = torch.nn.functional.pad(words, (0, -words.shape[-1] % bits)).long() & 0xFFFFFFFF
    words = words.unflatten(-1, (-1, bits))
    starts = torch.arange(0, WORD * bits, bits)
    first, offset = starts // WORD, starts % WORD
    after = (first + 1).clamp(max=bits - 1)
    codes = (words[..., first] >> offset | words[..., after] << (WORD - offset)) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count].int()


def group_sizes(inputs: int, count: int) -> set[int]:
    """The sizes that so many groups of inputs may have: equal ones, or powers of two with the last cut short."""
    if count == 1:
        return {inputs}
    equal = {inputs // count} if inputs % count == 0 else set()
    return equal | {1 << power for power in range(4, 12) if -(-inputs // (1 << power)) == count}


def columns(read: ReadPart, part: StoredTensor, begin: int, end: int) -> torch.Tensor:
    """Columns [begin, end) of a stored matrix, without holding more of it than a band of rows."""
    import torch

    rows, width = part.shape
    if (width - (end - begin)) * part.dtype.bits // 8 > _SKIPPED:
        return torch.stack([read(part, row * width + begin, row * width + end) for row in range(rows)])
    step = max(1, _BAND // width)
    bands = [(low, min(low + step, rows)) for low in range(0, rows, step)]
    return torch.cat([read(part, low * width, high * width).view(-1, width)[:, begin:end] for low, high in bands])


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedIntegers(Encoding):
    """What the formats share; they differ in how codes, zero points and scales lie.

    Attributes:
        bits: of a code.
        group: inputs that share a scale, where no ``groups`` say otherwise; the last group may be cut short.
    """

    bits: int
    group: int

    @abstractmethod
    def codes(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        """The codes of outputs [begin, end), outputs first."""

    @abstractmethod
    def zeros(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        """Their zero points by group, outputs first, or one zero point for all."""

    @abstractmethod
    def group_scales(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        """Their scales by group, outputs first."""

    def rows(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        import torch

        scales = self.group_scales(read, begin, end).to(torch.float32)
        self.check_scales(self.parts["scales"], scales, (scales != 0) & torch.isfinite(scales), "finite and not zero")
        values = self.codes(read, begin, end).to(torch.float32)
        zeros = self.zeros(read, begin, end).to(torch.float32)
        group = self._group_of_inputs(read, scales.shape[1])
        values -= zeros if zeros.ndim == 0 else zeros.index_select(1, group)
        values *= scales.index_select(1, group)
        return values

    def _group_of_inputs(self, read: ReadPart, count: int) -> torch.Tensor:
        import torch

        part = self.parts.get("groups")
        even = torch.arange(self.shape[1]) // self.group
        if part is None:
            return even
        group = read(part, 0, part.elements).long()
        if bool((group == -1).all()):
            # compressed-tensors' way of saying that the groups follow one another.
            return even
        if not bool(((group >= 0) & (group < count)).all()):
            wrong = int(group[(group < 0) | (group >= count)][0])
            raise self.error(
                f"{shown(part.name)} names group {wrong}, and there are {count}",
                "the file is damaged, or was written in another way than its names say",
            )
        return group


def _word_bounds(begin: int, end: int, size: int) -> tuple[int, int]:
    """The codes around [begin, end) that fill whole words."""
    return begin // WORD * WORD, min(-(-end // WORD) * WORD, size)


@dataclass(frozen=True, kw_only=True, eq=False)
class Gptq(PackedIntegers):
    """``qweight`` (words of inputs, outputs), ``qzeros`` (groups, words of outputs), ``scales`` (groups, outputs) and
    ``g_idx``, the group of each input. Zero points are kept less one."""

    title: ClassVar[str] = "GPTQ"
    kept_less: ClassVar[int] = 1

    def codes(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        return unpacked(columns(read, self.parts["codes"], begin, end).T.contiguous(), self.bits)[:, : self.shape[1]]

    def zeros(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        low, high = _word_bounds(begin, end, self.shape[0])
        words = columns(read, self.parts["zeros"], low * self.bits // WORD, -(-high * self.bits // WORD))
        kept = unpacked(words, self.bits)[:, begin - low : end - low].T
        # A zero point of 0 was kept as -1, which is the largest code.
        return (kept + self.kept_less) & ((1 << self.bits) - 1)

    def group_scales(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        return columns(read, self.parts["scales"], begin, end).T


@dataclass(frozen=True, kw_only=True, eq=False)
class GptqV2(Gptq):
    """As GPTQ, with zero points kept as they are."""

    title: ClassVar[str] = "GPTQ v2"
    kept_less: ClassVar[int] = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Awq(PackedIntegers):
    """``qweight`` (inputs, words of outputs), ``qzeros`` (groups, words of outputs), ``scales`` (groups, outputs)."""

    title: ClassVar[str] = "AWQ"

    def codes(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        return self._outputs(read, "codes", begin, end)

    def zeros(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        return self._outputs(read, "zeros", begin, end)

    def group_scales(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        return columns(read, self.parts["scales"], begin, end).T

    def _outputs(self, read: ReadPart, role: str, begin: int, end: int) -> torch.Tensor:
        import torch

        side = len(_AWQ_ORDER)
        first = begin // side
        words = columns(read, self.parts[role], first, -(-end // side)).T.contiguous()
        shifts = torch.tensor(_AWQ_ORDER, dtype=torch.int32) * AWQ_BITS
        codes = (words.unsqueeze(1) >> shifts[:, None]).bitwise_and_((1 << AWQ_BITS) - 1).flatten(0, 1)
        return codes[begin - first * side : end - first * side]


@dataclass(frozen=True, kw_only=True, eq=False)
class CompressedIntegers(PackedIntegers):
    """``weight_packed`` (outputs, words of inputs), ``weight_scale`` (outputs or 1, groups) and, where they are not
    symmetric, ``weight_zero_point`` (words of outputs, groups). Codes are kept plus half their range."""

    title: ClassVar[str] = "packed integers of compressed-tensors"

    def codes(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        part = self.parts["codes"]
        width = part.shape[1]
        return unpacked(read(part, begin * width, end * width).view(-1, width), self.bits)[:, : self.shape[1]]

    def zeros(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        import torch

        part = self.parts.get("zeros")
        if part is None:
            return torch.tensor(1 << (self.bits - 1))
        groups = part.shape[1]
        low, high = _word_bounds(begin, end, self.shape[0])
        first, last = low * self.bits // WORD, -(-high * self.bits // WORD)
        words = read(part, first * groups, last * groups).view(-1, groups).T.contiguous()
        return unpacked(words, self.bits)[:, begin - low : end - low].T

    def group_scales(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        part = self.parts["scales"]
        if part.elements == 1:
            return read(part, 0, 1).view(1, 1)
        groups = math.prod(part.shape[1:])
        return read(part, begin * groups, end * groups).view(-1, groups)
