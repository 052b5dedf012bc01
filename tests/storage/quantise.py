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
