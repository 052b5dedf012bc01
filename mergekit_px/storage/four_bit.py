"""Codes of four bits, two in a byte: MXFP4, NVFP4, and the nf4 and fp4 of bitsandbytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mergekit_px.storage.encoding import MX_BIAS, Encodable, Encoding, ReadPart

if TYPE_CHECKING:
    import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of float4 e2m1 by code: OCP Microscaling Formats 1.0, table 5."""


def looked_up(packed: torch.Tensor, table: torch.Tensor, *, high_first: bool) -> torch.Tensor:
    """Two values for each byte, along the last axis."""
    import torch

    low, high = table[(packed & 15).long()], table[(packed >> 4).long()]
    pair = (high, low) if high_first else (low, high)
    return torch.stack(pair, -1).flatten(-2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mxfp4(Encodable):
    """Blocks of 32 e2m1 codes along the inputs, with a power of two for each.

    Attributes:
        swapped: as gpt-oss keeps its experts: ``_blocks`` (..., out, in/32, 16), of matrices that are (in, out).
            Otherwise two codes a byte, (..., out, in/2), of matrices that are (out, in).
    """

    title: ClassVar[str] = "MXFP4"
    swapped: bool

    def rows(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        import torch

        spans = self.spans(begin, end)
        raw = read(self.parts["scales"], *spans["scales"]).view(torch.uint8)
        if bool((raw == 255).any()):
            raise self.error("a scale is NaN (code 255)", "the file is damaged")
        codes = read(self.parts["codes"], *spans["codes"]).reshape(-1, 16)
        values = looked_up(codes, torch.tensor(E2M1), high_first=False)
        values = torch.ldexp(values, (raw.to(torch.int32) - MX_BIAS).unsqueeze(-1))
        values = values.reshape(end - begin, *self._stored_shape[1:])
        return values.transpose(-1, -2).contiguous() if self.swapped else values

    def spans(self, begin: int, end: int) -> dict[str, tuple[int, int]]:
        blocks = math.prod(self.shape[1:]) // 32
        return {"codes": (begin * blocks * 16, end * blocks * 16), "scales": (begin * blocks, end * blocks)}

    def largest(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        import torch

        return self._blocks(rows).abs().amax(-1).to(torch.float32)

    def encoded(self, rows: torch.Tensor, begin: int, largest: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        values = self._blocks(rows).to(torch.float32)
        # A block's largest value is in [4, 8) of its scale, and 6 the largest code; or twice the scale is nearer.
        power = (torch.frexp(largest).exponent - 3).clamp(-MX_BIAS, MX_BIAS - 1)
        low, low_error = _nearest(values, power)
        high, high_error = _nearest(values, power + 1)
        higher = 4 * high_error < low_error
        codes = torch.where(higher.unsqueeze(-1), high, low)
        power = torch.where(largest > 0, power + higher.to(power.dtype), torch.zeros_like(power))
        scales = (power + MX_BIAS).to(torch.uint8)
        return {"codes": (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(-1), "scales": scales.reshape(-1)}

    def _blocks(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows.transpose(-1, -2).contiguous() if self.swapped else rows).reshape(-1, 32)

    @property
    def _stored_shape(self) -> tuple[int, ...]:
        """As the codes lie."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.swapped else self.shape


def _nearest(values: torch.Tensor, power: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest e2m1 codes of blocks under scales of two to some power, and each block's squared error in scales."""
    import torch

    scaled = torch.ldexp(values, -power.unsqueeze(-1))
    grid = torch.tensor(E2M1[:8], device=values.device)
    # A magnitude halfway goes to the even code: bounds between an even code and the next belong to the lower one.
    bounds = (grid[1:] + grid[:-1]) / 2
    magnitude = scaled.abs()
    codes = torch.bucketize(magnitude, bounds)
    codes += ((codes % 2 == 1) & (magnitude == bounds[codes.clamp(max=6)])).to(codes.dtype)
    error = (magnitude - grid[codes]).square().sum(-1)
    signed = codes.to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
    return signed, error


@dataclass(frozen=True, kw_only=True, eq=False)
class Nvfp4(Encoding):
    """Blocks of 16 e2m1 codes with a float8 scale each, and one scale for the tensor.

    Attributes:
        divides: the tensor's scale divides (compressed-tensors' ``weight_global_scale``) instead of multiplying.
    """

    title: ClassVar[str] = "NVFP4"
    divides: bool

    def rows(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        import torch

        columns = self.shape[-1]
        row = math.prod(self.shape[1:])
        codes = read(self.parts["codes"], begin * row // 2, end * row // 2).reshape(-1, 8)
        blocks = read(self.parts["scales"], begin * row // 16, end * row // 16).to(torch.float32)
        if not bool((torch.isfinite(blocks) & (blocks >= 0)).all()):
            raise self.error("a scale of a block is negative or NaN", "the file is damaged")
        whole = self.scales(read, "tensor_scale")
        whole = 1 / whole if self.divides else whole
        values = looked_up(codes, torch.tensor(E2M1), high_first=False) * (blocks * whole).reshape(-1, 1)
        return values.reshape(end - begin, *self.shape[1:-1], columns)


@dataclass(frozen=True, kw_only=True, eq=False)
class BitsAndBytes4(Encoding):
    """A table of 16 values times the largest magnitude of each block of consecutive elements.

    The magnitudes may be encoded themselves, in blocks of bytes with a table of 256 values and an offset.
    """

    title: ClassVar[str] = "bitsandbytes 4-bit"
    block: int
    nested_block: int = 0
    nested_offset: float = 0.0

    def rows(self, read: ReadPart, begin: int, end: int) -> torch.Tensor:
        import torch

        row = math.prod(self.shape[1:])
        start, stop = begin * row, end * row
        first, last = start // self.block, -(-stop // self.block)
        low = first * self.block
        high = min(last * self.block, math.prod(self.shape))
        packed = read(self.parts["codes"], low // 2, -(-high // 2))
        table = read(self.parts["table"], 0, 16).to(torch.float32)
        values = looked_up(packed, table, high_first=True)[: high - low]
        magnitudes = self._magnitudes(read, first, last).repeat_interleave(self.block)[: high - low]
        return (values * magnitudes)[start - low : stop - low].reshape(end - begin, *self.shape[1:])

    def _magnitudes(self, read: ReadPart, first: int, last: int) -> torch.Tensor:
        import torch

        if not self.nested_block:
            values = read(self.parts["scales"], first, last).to(torch.float32)
        else:
            codes = read(self.parts["scales"], first, last).long()
            low, high = first // self.nested_block, -(-last // self.nested_block)
            outer = self.scales(read, "nested_scales", low, high).repeat_interleave(self.nested_block)
            outer = outer[first - low * self.nested_block :][: last - first]
            values = read(self.parts["nested_table"], 0, 256).to(torch.float32)[codes] * outer + self.nested_offset
        # A block of zeros has the magnitude 0; a nested encoding may round one slightly below.
        if not bool(torch.isfinite(values).all()) or (not self.nested_block and bool((values < 0).any())):
            raise self.error("a largest magnitude of a block is negative or not finite", "the file is damaged")
        return values
