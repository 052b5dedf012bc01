"""Which tensors of a checkpoint are encodings of others: told from names, dtypes and shapes, never from one alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit_px.checkpoint.dtypes import DTYPES, DType
from mergekit_px.checkpoint.json_text import parse_object, shown
from mergekit_px.checkpoint.open import Checkpoint, StoredTensor
from mergekit_px.errors import InputError, MalformedCheckpointError
from mergekit_px.small_files import LARGEST_SMALL_FILE
from mergekit_px.storage.encoding import Encoding
from mergekit_px.storage.four_bit import BitsAndBytes4, Mxfp4, Nvfp4
from mergekit_px.storage.scaled import Scaled, block_sides

ReadBytes = Callable[[StoredTensor], bytes]
"""Gives the bytes of a small stored tensor."""

_FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
"""Behind the name of the tensor of codes: DeepSeek's and transformers' fp8; compressed-tensors and ModelOpt."""
_COMFY_SCALE = "scale_weight"
_COMFY_MARKER = "scaled_fp8"
_STATE = ".quant_state."
_OF_ACTIVATIONS = ("input_scale", "scale_input", "output_scale", "weight_format", "input_global_scale")
"""Beside a weight, and of no meaning for its values: scales of activations, a tag of its layout."""
_UNDECODED = {
    "qweight": "packed integers as GPTQ and AWQ have them",
    "qzeros": "packed integers as GPTQ and AWQ have them",
    "SCB": "bitsandbytes 8-bit scales",
    "weight_packed": "packed integers of compressed-tensors",
    "weight_shape": "packed integers of compressed-tensors",
    "weight_zero_point": "integers with a zero point",
    "absmax": "bitsandbytes 4-bit scales",
    "quant_map": "bitsandbytes 4-bit tables",
    "scale_weight": "scales of quantised weights",
    "weight_scale": "scales of quantised weights",
    "weight_scale_inv": "scales of quantised weights",
    "weight_scale_2": "scales of quantised weights",
    "weight_global_scale": "scales of quantised weights",
}
"""Last part of a name -> what only quantised storage has under it."""


@dataclass
class QuantisedTensors:
    """What of a checkpoint is stored in encoded form.

    Attributes:
        encodings: by the name of the decoded tensor.
        parts: name of every stored tensor that belongs to one.
        refused: name of a stored tensor -> what it is, where it is known to be encoded and cannot be decoded.
    """

    encodings: dict[str, Encoding] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)


def quantised_tensors(checkpoint: Checkpoint, read_bytes: ReadBytes) -> QuantisedTensors:
    """Recognise the encoded tensors of a checkpoint.

    Args:
        read_bytes: for the few bytes in which some formats keep shapes and settings.

    Raises:
        InputError: scales or settings that do not fit their codes.
    """
    return _Recognition(checkpoint, read_bytes).result()


class _Recognition:
    def __init__(self, checkpoint: Checkpoint, read_bytes: ReadBytes) -> None:
        self.tensors = checkpoint.tensors
        self.where = checkpoint.label
        self.read_bytes = read_bytes
        self.compute = _compute_dtype(checkpoint.config)
        self.block = _declared_block(checkpoint.config)
        self.found = QuantisedTensors()
        self.states = {name.partition(_STATE)[0]: name for name in self.tensors if _STATE in name}
        """Name of bitsandbytes' 4-bit codes -> name of the tensor with their settings."""

    def result(self) -> QuantisedTensors:
        for name, tensor in self.tensors.items():
            if name in self.found.parts:
                continue
            if tensor.dtype.name in _FLOAT8 or tensor.dtype.name == "I8":
                self._scaled(name, tensor)
            elif tensor.dtype.name == "U8":
                self._four_bit(name, tensor)
        if self.found.encodings and _COMFY_MARKER in self.tensors:
            self.found.parts.add(_COMFY_MARKER)
        rest = [name for name in self.tensors if name not in self.found.parts and name not in self.found.refused]
        for leaf, what in _UNDECODED.items():
            self.found.refused.update({name: what for name in rest if name.rpartition(".")[2] == leaf})
        packed = [name for name in rest if _looks_packed(name, self.tensors[name])]
        for name in packed:
            what = f"packed codes ({self.tensors[name].dtype}) of no known format"
            self.found.refused.setdefault(name, what)
        return self.found

    def _add(self, encoding: Encoding) -> None:
        self.found.encodings[encoding.name] = encoding
        self.found.parts.update(part.name for part in encoding.parts.values())
        module = encoding.name.rpartition(".")[0]
        beside = [f"{module}.{leaf}" if module else leaf for leaf in _OF_ACTIVATIONS]
        self.found.parts.update(name for name in beside if name in self.tensors)

    def _beside(self, name: str, leaf: str) -> StoredTensor | None:
        module = name.rpartition(".")[0]
        return self.tensors.get(f"{module}.{leaf}" if module else leaf)

    def _dtype(self, scales: StoredTensor) -> DType:
        return self.compute or (scales.dtype if scales.dtype.name in ("F16", "BF16") else DTYPES["BF16"])

    def _scaled(self, name: str, codes: StoredTensor) -> None:
        scales = next((self.tensors[name + end] for end in _SCALE_SUFFIXES if name + end in self.tensors), None)
        divisor = 1.0
        if scales is None and name.endswith("weight"):
            scales = self._beside(name, _COMFY_SCALE)
            if scales is None and codes.dtype.name == "I8" and (scales := self._beside(name, "SCB")) is not None:
                divisor = 127.0
        if scales is None:
            return
        if f"{name}_zero_point" in self.tensors:
            self.found.refused[name] = "integers with a zero point"
            return
        sides = block_sides(codes.shape, scales.shape, self.block)
        if divisor != 1.0 and scales.shape != codes.shape[:1]:
            sides = None
        if not scales.dtype.arithmetic and scales.dtype.name != "F8_E8M0":
            sides = None
        if sides is None or 0 in codes.shape or not codes.shape:
            raise self._misfit(name, codes, scales)
        self._add(
            Scaled(
                name=name,
                shape=codes.shape,
                dtype=self._dtype(scales),
                parts={"codes": codes, "scales": scales},
                where=self.where,
                sides=sides,
                divisor=divisor,
            )
        )

    def _misfit(self, name: str, codes: StoredTensor, scales: StoredTensor) -> InputError:
        return InputError(
            f"the scales {shown(scales.name)} ({scales.dtype}, {list(scales.shape)}) do not fit the codes {shown(name)}"
            f" ({codes.dtype}, {list(codes.shape)})",
            where=self.where,
            hint="scales are one, one for each row, or one for each block of equal sides",
        )

    def _four_bit(self, name: str, codes: StoredTensor) -> None:
        if name.endswith("_blocks") and (scales := self.tensors.get(f"{name.removesuffix('_blocks')}_scales")):
            self._mxfp4(name.removesuffix("_blocks"), codes, scales)
        elif f"{name}.absmax" in self.tensors:
            self._bitsandbytes(name, codes)
        elif name.endswith(("weight", "weight_packed")):
            plain = name.removesuffix("_packed")
            block_scales = self.tensors.get(f"{plain}_scale")
            for leaf, divides in (("_global_scale", True), ("_scale_2", False)):
                whole = self.tensors.get(plain + leaf)
                if block_scales is not None and whole is not None and block_scales.dtype.name == "F8_E4M3":
                    self._nvfp4(plain, codes, block_scales, whole, divides)
                    return

    def _mxfp4(self, name: str, codes: StoredTensor, scales: StoredTensor) -> None:
        if codes.shape != (*scales.shape, 16) or len(scales.shape) != 3 or scales.dtype.name not in ("U8", "F8_E8M0"):
            raise self._misfit(name, codes, scales)
        experts, out, blocks = scales.shape
        parts = {"codes": codes, "scales": scales}
        dtype = self.compute or DTYPES["BF16"]
        self._add(Mxfp4(name=name, shape=(experts, blocks * 32, out), dtype=dtype, parts=parts, where=self.where))

    def _nvfp4(self, name: str, codes: StoredTensor, scales: StoredTensor, whole: StoredTensor, divides: bool) -> None:
        width = 2 * codes.shape[-1]
        shape = (*codes.shape[:-1], width)
        if width % 16 or scales.shape != (*shape[:-1], width // 16) or whole.elements != 1:
            raise self._misfit(name, codes, scales)
        parts = {"codes": codes, "scales": scales, "tensor_scale": whole}
        dtype = self.compute or DTYPES["BF16"]
        self._add(Nvfp4(name=name, shape=shape, dtype=dtype, parts=parts, where=self.where, divides=divides))

    def _bitsandbytes(self, name: str, codes: StoredTensor) -> None:
        state = self.states.get(name)
        parts = {
            "codes": codes,
            **{
                role: self.tensors[f"{name}.{leaf}"]
                for role, leaf in {
                    "scales": "absmax",
                    "table": "quant_map",
                    "nested_scales": "nested_absmax",
                    "nested_table": "nested_quant_map",
                }.items()
                if f"{name}.{leaf}" in self.tensors
            },
        }
        if state is None or "table" not in parts:
            self.found.refused[name] = "bitsandbytes 4-bit codes without their quant_state"
            return
        where = f"{self.where}: {shown(state)}"
        if self.tensors[state].nbytes > LARGEST_SMALL_FILE:
            raise InputError(f"settings of {self.tensors[state].nbytes} bytes are none", where=where)
        try:
            settings = parse_object(self.read_bytes(self.tensors[state]), where, strict=False)
            shape = tuple(int(size) for size in settings["shape"])
            block, nested = int(settings["blocksize"]), int(settings.get("nested_blocksize") or 0)
            offset = float(settings.get("nested_offset") or 0.0)
            stored = str(settings.get("dtype") or "")
        except MalformedCheckpointError as error:
            raise InputError(f"these are no settings of bitsandbytes ({error.what})", where=where) from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"these are no settings of bitsandbytes ({error})", where=where) from None
        elements = math.prod(shape)
        scales = parts["scales"]
        if not shape or min(shape) < 1 or block < 2 or block % 2 or codes.elements != -(-elements // 2):
            raise InputError(f"shape {list(shape)} in blocks of {block} does not fit the codes", where=where)
        nested_fits = not nested or (
            "nested_table" in parts
            and "nested_scales" in parts
            and parts["nested_scales"].elements == -(-scales.elements // nested)
        )
        if scales.elements != -(-elements // block) or (scales.dtype.name == "U8") != bool(nested) or not nested_fits:
            raise self._misfit(name, codes, scales)
        names = {dtype.torch_name: dtype for dtype in DTYPES.values() if dtype.arithmetic}
        self._add(
            BitsAndBytes4(
                name=name,
                shape=shape,
                dtype=self.compute or names.get(stored, DTYPES["BF16"]),
                parts=parts,
                where=self.where,
                block=block,
                nested_block=nested,
                nested_offset=offset,
            )
        )
        self.found.parts.add(state)


def _looks_packed(name: str, tensor: StoredTensor) -> bool:
    """Integers of more than one axis under the name of a weight; tables of positions and masks have other names."""
    packed = tensor.dtype.kind == "integer" or tensor.dtype.bits < 8
    return packed and len(tensor.shape) >= 2 and name.rpartition(".")[2] == "weight"


def _sections(config: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if config is None:
        return []
    return [config, *(part for key, part in config.items() if key.endswith("_config") and isinstance(part, Mapping))]


def _compute_dtype(config: Mapping[str, Any] | None) -> DType | None:
    """The dtype that the config says the model computes in."""
    names = {dtype.torch_name: dtype for dtype in DTYPES.values() if dtype.arithmetic and dtype.bits >= 16}
    for section in _sections(config):
        for key in ("dtype", "torch_dtype"):
            text = section.get(key)
            if isinstance(text, str) and text.removeprefix("torch.") in names:
                return names[text.removeprefix("torch.")]
    return None


def _declared_block(config: Mapping[str, Any] | None) -> tuple[int, ...] | None:
    for section in _sections(config):
        for part in (section, section.get("quantization_config")):
            block = part.get("weight_block_size") if isinstance(part, Mapping) else None
            if isinstance(block, list) and block and all(isinstance(side, int) and side > 0 for side in block):
                return tuple(block)
    return None
