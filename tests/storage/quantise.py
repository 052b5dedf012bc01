"""The formulas of quantised formats in numpy, written from their definitions: codes with scales, and their values."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def floats8(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape) * 30).to(dtype)


def nibbles(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return rng.integers(0, 16, shape).astype(np.uint8)


def packed(codes: np.ndarray[Any, Any], *, high_first: bool = False) -> torch.Tensor:
    first, second = codes[..., 0::2], codes[..., 1::2]
    high, low = (first, second) if high_first else (second, first)
    return torch.from_numpy((high << 4 | low).astype(np.uint8))


def mxfp4(rng: np.random.Generator, experts: int, out: int, inside: int) -> tuple[dict[str, torch.Tensor], Any]:
    codes = nibbles(rng, (experts, out, inside // 32, 32))
    scales = rng.integers(120, 132, (experts, out, inside // 32)).astype(np.uint8)
    values = E2M1[codes] * 2.0 ** (scales.astype(int) - 127)[..., None]
    stored = {"_blocks": packed(codes), "_scales": torch.from_numpy(scales)}
    return stored, values.reshape(experts, out, inside).swapaxes(1, 2)


def nvfp4(rng: np.random.Generator, out: int, inside: int) -> tuple[torch.Tensor, torch.Tensor, float, Any]:
    codes = nibbles(rng, (out, inside))
    scales = torch.from_numpy(rng.uniform(1, 200, (out, inside // 16))).to(torch.float8_e4m3fn)
    whole = 0.03125
    values = E2M1[codes] * np.repeat(scales.double().numpy(), 16, 1) * whole
    return packed(codes), scales, whole, values


def bnb4(
    rng: np.random.Generator, shape: tuple[int, int], block: int = 64, nested: bool = False
) -> tuple[dict[str, torch.Tensor], Any]:
    count = shape[0] * shape[1]
    blocks = -(-count // block)
    codes = nibbles(rng, (count,))
    table = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "shape": shape, "dtype": "bfloat16"}
    stored = {"": packed(codes, high_first=True).reshape(-1, 1), ".quant_map": torch.from_numpy(table)}
    if nested:
        magnitude_codes = rng.integers(0, 256, blocks).astype(np.uint8)
        inner = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        outer = rng.uniform(0.1, 1, -(-blocks // 256)).astype(np.float32)
        state |= {"nested_blocksize": 256, "nested_offset": 1.5, "nested_dtype": "float32"}
        magnitudes = inner[magnitude_codes] * np.repeat(outer, 256)[:blocks] + 1.5
        stored[".absmax"] = torch.from_numpy(magnitude_codes)
        stored[".nested_absmax"] = torch.from_numpy(outer)
        stored[".nested_quant_map"] = torch.from_numpy(inner)
    else:
        magnitudes = rng.uniform(0, 2, blocks).astype(np.float32)
        stored[".absmax"] = torch.from_numpy(magnitudes)
    text = json.dumps(state).encode()
    stored[".quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    values = table[codes] * np.repeat(magnitudes, block)[:count]
    return stored, values.reshape(shape)


def words(codes: np.ndarray[Any, Any], bits: int) -> torch.Tensor:
    """Codes along the last axis as one string of bits, the lowest first, cut into words of 32."""
    stream = (codes[..., None] >> np.arange(bits) & 1).reshape(*codes.shape[:-1], -1)
    stream = np.pad(stream, [(0, 0)] * (codes.ndim - 1) + [(0, -stream.shape[-1] % 32)])
    values = (stream.reshape(*codes.shape[:-1], -1, 32).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1)
    return torch.from_numpy(values.astype(np.uint32).view(np.int32))


def integers(
    rng: np.random.Generator, out: int, inside: int, bits: int, group: int, lowest: int = 0
) -> tuple[Any, Any, Any]:
    """Codes (out, in), zero points and scales (out, groups)."""
    count = -(-inside // group)
    codes, zeros = rng.integers(0, 1 << bits, (out, inside)), rng.integers(lowest, 1 << bits, (out, count))
    return codes, zeros, rng.uniform(0.001, 0.1, (out, count)).astype(np.float16)


def values_of(codes: Any, zeros: Any, scales: Any, groups: Any) -> Any:
    return ((codes - zeros[:, groups]) * scales.astype(np.float64)[:, groups]).astype(np.float32)


def gptq(
    rng: np.random.Generator,
    out: int,
    inside: int,
    bits: int = 4,
    group: int = 32,
    *,
    version: int = 1,
    ordered: bool = False,
    symmetric: bool = False,
) -> tuple[dict[str, torch.Tensor], Any]:
    codes, zeros, scales = integers(rng, out, inside, bits, group, lowest=1)
    zeros = np.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros
    groups = np.arange(inside) // group
    groups = rng.permutation(groups) if ordered else groups
    stored = {
        "!qweight": words(codes, bits).T.contiguous(),
        "!qzeros": words((zeros - (version == 1)).T, bits),
        "!scales": torch.from_numpy(scales.T.copy()),
        "!g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    return stored, values_of(codes, zeros, scales, groups)


def awq(rng: np.random.Generator, out: int, inside: int, group: int = 32) -> tuple[dict[str, torch.Tensor], Any]:
    codes, zeros, scales = integers(rng, out, inside, 4, group)

    def shuffled(values: Any) -> torch.Tensor:
        rows = values.T.reshape(values.shape[1], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return words(rows.reshape(values.shape[1], -1), 4)

    stored = {"!qweight": shuffled(codes), "!qzeros": shuffled(zeros), "!scales": torch.from_numpy(scales.T.copy())}
    return stored, values_of(codes, zeros, scales, np.arange(inside) // group)


def compressed_integers(
    rng: np.random.Generator,
    out: int,
    inside: int,
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = True,
    ordered: bool = False,
) -> tuple[dict[str, torch.Tensor], Any]:
    codes, zeros, scales = integers(rng, out, inside, bits, group)
    zeros = np.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros
    groups = np.arange(inside) // group
    stored = {
        "!weight_packed": words(codes, bits),
        "!weight_scale": torch.from_numpy(scales),
        "!weight_shape": torch.tensor([out, inside]),
    }
    if not symmetric:
        stored["!weight_zero_point"] = words(zeros.T, bits).T.contiguous()
    if ordered:
        groups = rng.permutation(groups)
        stored["!weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
    return stored, values_of(codes, zeros, scales, groups)


def quantisation(bits: int = 4, group: int = 32, **more: Any) -> dict[str, Any]:
    """A config that names GPTQ's settings."""
    return {"quantization_config": {"quant_method": "gptq", "bits": bits, "group_size": group} | more}
