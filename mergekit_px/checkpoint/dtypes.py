"""The element types of safetensors 0.8: width, the torch type of the same bits, and what arithmetic allows.

Source: the ``Dtype`` enumeration of the safetensors format. The order of the table is the order of that
enumeration; the reference writer sorts tensors by it, last (widest) first.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from mergekit_px.errors import InputError, MalformedCheckpointError, UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        name: the code in a safetensors header.
        bits: width of one element.
        torch_name: attribute of ``torch`` with these bits; None where torch has none. Torch counts F4 in
            pairs: a header shape ``[4, 8]`` is a torch shape ``(4, 4)``.
        kind: ``float``, ``integer``, ``bool`` or ``complex``.
        arithmetic: whether torch converts it to float32 and back, so that weights of it can be merged.
        max_finite: the largest finite magnitude of the float kinds.
        rank: position in the order of the reference writer.
    """

    name: str
    bits: int
    torch_name: str | None
    kind: str
    arithmetic: bool
    max_finite: float | None
    rank: int

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype. Raises ``InputError`` where the installed torch has none."""
        import torch

        found = getattr(torch, self.torch_name, None) if self.torch_name else None
        if not isinstance(found, torch.dtype):
            raise InputError(
                f"torch {torch.__version__} has no type for {self.name}",
                hint="such tensors can be copied, not computed with",
            )
        return found

    def __str__(self) -> str:
        return self.name


def _table() -> dict[str, DType]:
    rows: list[tuple[str, int, str | None, str, bool, float | None]] = [
        ("BOOL", 8, "bool", "bool", False, None),
        ("F4", 4, "float4_e2m1fn_x2", "float", False, 6.0),
        ("F6_E2M3", 6, None, "float", False, 7.5),
        ("F6_E3M2", 6, None, "float", False, 28.0),
        ("U8", 8, "uint8", "integer", False, None),
        ("I8", 8, "int8", "integer", False, None),
        ("F8_E5M2", 8, "float8_e5m2", "float", True, 57344.0),
        ("F8_E4M3", 8, "float8_e4m3fn", "float", True, 448.0),
        ("F8_E8M0", 8, "float8_e8m0fnu", "float", False, 2.0**127),
        ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", "float", True, 240.0),
        ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", "float", True, 57344.0),
        ("I16", 16, "int16", "integer", False, None),
        ("U16", 16, "uint16", "integer", False, None),
        ("F16", 16, "float16", "float", True, 65504.0),
        ("BF16", 16, "bfloat16", "float", True, (2 - 2.0**-7) * 2.0**127),
        ("I32", 32, "int32", "integer", False, None),
        ("U32", 32, "uint32", "integer", False, None),
        ("F32", 32, "float32", "float", True, (2 - 2.0**-23) * 2.0**127),
        ("C64", 64, "complex64", "complex", False, None),
        ("F64", 64, "float64", "float", True, (2 - 2.0**-52) * 2.0**1023),
        ("I64", 64, "int64", "integer", False, None),
        ("U64", 64, "uint64", "integer", False, None),
    ]
    return {row[0]: DType(*row, rank=rank) for rank, row in enumerate(rows)}


DTYPES: Mapping[str, DType] = MappingProxyType(_table())

_BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in DTYPES.values() if dtype.torch_name}

_SPELLINGS: Mapping[str, DType] = {
    **{dtype.name.lower(): dtype for dtype in DTYPES.values()},
    **{name: dtype for name, dtype in _BY_TORCH_NAME.items()},
    "half": DTYPES["F16"],
    "fp16": DTYPES["F16"],
    "float": DTYPES["F32"],
    "fp32": DTYPES["F32"],
    "double": DTYPES["F64"],
    "fp64": DTYPES["F64"],
    "short": DTYPES["I16"],
    "int": DTYPES["I32"],
    "long": DTYPES["I64"],
    "cfloat": DTYPES["C64"],
}


def parse_dtype(text: str) -> DType:
    """The type meant by ``text``: ``BF16``, ``bf16``, ``bfloat16``, ``torch.bfloat16``, ``half`` and the like.

    Raises ``UsageError`` with the nearest spelling.
    """
    spelling = text.strip().lower().removeprefix("torch.")
    if spelling in _SPELLINGS:
        return _SPELLINGS[spelling]
    near = difflib.get_close_matches(spelling, _SPELLINGS, n=1)
    hint = f"did you mean {near[0]}?" if near else "give one such as float32, bfloat16, float16, float8_e4m3fn"
    raise UsageError(f"unknown dtype {text!r}", hint=hint)


def dtype_of(torch_dtype: torch.dtype) -> DType:
    """The type with the same bits as a torch dtype. Raises ``InputError`` where safetensors has none."""
    name = str(torch_dtype).removeprefix("torch.")
    if name not in _BY_TORCH_NAME:
        raise InputError(f"safetensors cannot hold {torch_dtype}", hint="convert the tensor first")
    return _BY_TORCH_NAME[name]


def byte_count(dtype: DType, shape: Sequence[int]) -> int:
    """Bytes of a tensor; ``shape`` in elements as a header counts them.

    Raises ``MalformedCheckpointError`` if F4 or F6 elements do not fill whole bytes.
    """
    bits = math.prod(shape) * dtype.bits
    if bits % 8:
        raise MalformedCheckpointError(f"shape {list(shape)} of {dtype.name} does not fill whole bytes")
    return bits // 8
