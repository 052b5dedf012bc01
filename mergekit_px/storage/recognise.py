"""Which tensors of a checkpoint are encodings of others: told from names, dtypes and shapes, never from one alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mergekit_px.checkpoint.dtypes import DTYPES, DType
from mergekit_px.checkpoint.json_text import parse_object, shown
from mergekit_px.checkpoint.open import Checkpoint, StoredTensor
from mergekit_px.errors import InputError, MalformedCheckpointError
from mergekit_px.small_files import LARGEST_SMALL_FILE
from mergekit_px.storage.encoding import Encoding
from mergekit_px.storage.four_bit import BitsAndBytes4, Mxfp4, Nvfp4
from mergekit_px.storage.integer_settings import IntegerSettings, integer_settings
from mergekit_px.storage.packed_integers import (
    AWQ_BITS,
    WORD,
    Awq,
    CompressedIntegers,
    Gptq,
    GptqV2,
    PackedIntegers,
    group_sizes,
    unpacked,
)
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
    "qweight": "packed integers of GPTQ or AWQ without their scales or zero points",
    "qzeros": "zero points of GPTQ or AWQ without their codes",
    "SCB": "bitsandbytes 8-bit scales",
    "weight_packed": "packed codes of compressed-tensors without their scales or shape",
    "weight_shape": "packed codes of compressed-tensors without their scales or shape",
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
        self.checkpoint = checkpoint
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
            if name.rpartition(".")[2] == "qweight":
                self._gptq_or_awq(name, tensor)
            elif tensor.dtype.name in _FLOAT8 or tensor.dtype.name == "I8":
                self._scaled(name, tensor)
            elif tensor.dtype.name == "U8":
                self._four_bit(name, tensor)
            elif name.rpartition(".")[2] == "weight_packed":
                self._compressed_integers(name, tensor)
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

    @cached_property
    def settings(self) -> IntegerSettings:
        return integer_settings(self.checkpoint, _sections(self.checkpoint.config))

    def _add(self, encoding: Encoding) -> None:
        codes = encoding.parts["codes"].name
        if encoding.name != codes and encoding.name in self.tensors:
            raise InputError(
                f"{shown(encoding.name)} is there plainly and encoded, as {shown(codes)}",
                where=self.where,
                hint="keep one of the two",
            )
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

    def _gptq_or_awq(self, name: str, codes: StoredTensor) -> None:
        parts = self._parts(name, codes, {"zeros": "qzeros", "scales": "scales", "groups": "g_idx"})
        if "zeros" not in parts or "scales" not in parts:
            return
        zeros, scales = parts["zeros"], parts["scales"]
        if any(len(part.shape) != 2 or 0 in part.shape for part in (codes, zeros, scales)):
            raise self._unfit(parts)
        count, outputs = scales.shape
        if codes.shape[1] * WORD == outputs * AWQ_BITS:
            bits, inputs = AWQ_BITS, codes.shape[0]
            fits = zeros.shape == (count, codes.shape[1]) and inputs % count == 0
        else:
            bits = zeros.shape[1] * WORD // outputs
            inputs = codes.shape[0] * WORD // max(bits, 1)
            fits = codes.shape[1] == outputs and zeros.shape == (count, -(-outputs * bits // WORD))
            fits &= 2 <= bits <= 8 and codes.shape[0] * WORD == inputs * bits
        if not fits:
            raise self._unfit(parts)
        awq = codes.shape[1] != outputs
        if self.settings.unknown is not None:
            self.found.refused[name] = f"packed integers in {self.settings.unknown}"
        elif not awq and self.settings.ordered and "groups" not in parts:
            self.found.refused[name] = "packed integers of GPTQ in the order of activations (desc_act) without a g_idx"
        else:
            kind = Awq if awq else self._gptq(zeros, bits)
            self._add_integers(kind, f"{name.removesuffix('qweight')}weight", (outputs, inputs), parts, bits, count)

    def _gptq(self, zeros: StoredTensor, bits: int) -> type[Gptq]:
        """Which of the two ways zero points are kept in; where nothing says it, the middle of the codes tells."""
        if self.settings.zero_points is not None:
            return GptqV2 if self.settings.zero_points == "gptq_v2" else Gptq
        import torch

        words = torch.frombuffer(bytearray(self.read_bytes(zeros)), dtype=torch.int32).view(zeros.shape)
        kept = unpacked(words, bits).unique().tolist()
        for kind in (Gptq, GptqV2):
            if kept == [(1 << (bits - 1)) - kind.kept_less]:
                return kind
        raise InputError(
            f"the zero points {shown(zeros.name)} may be kept less one (GPTQ) or as they are (GPTQ v2), and nothing"
            " says which",
            where=self.where,
            hint="give the model's folder, with a config.json whose quantization_config names the checkpoint_format",
        )

    def _compressed_integers(self, name: str, codes: StoredTensor) -> None:
        leaves = {"scales": "weight_scale", "sizes": "weight_shape", "zeros": "weight_zero_point"}
        parts = self._parts(name, codes, leaves | {"groups": "weight_g_idx"})
        sizes = parts.pop("sizes", None)
        if sizes is None or "scales" not in parts:
            return
        scales = parts["scales"]
        shape = self._sizes(sizes)
        if len(shape) != 2 or min(shape) < 1 or codes.shape[:1] != shape[:1] or len(codes.shape) != 2:
            raise self._unfit(parts, f"{shown(sizes.name)} = {list(shape)}")
        outputs, inputs = shape
        fitting = [bits for bits in range(2, 9) if -(-inputs * bits // WORD) == codes.shape[1]]
        declared = [bits for bits in fitting if any(scheme.bits == bits for scheme in self.settings.schemes)]
        bits = next(iter([*declared, *fitting]), 0)
        count = 1 if scales.elements == 1 else math.prod(scales.shape[1:])
        zeros = parts.get("zeros")
        if (
            not bits
            or (scales.elements != 1 and scales.shape not in ((outputs, count), (outputs,)))
            or (zeros is not None and zeros.shape != (-(-outputs * bits // WORD), count))
        ):
            raise self._unfit(parts, f"{shown(sizes.name)} = {list(shape)}")
        schemes = [scheme for scheme in self.settings.schemes if scheme.allows(bits, inputs, count)]
        if zeros is None and schemes and all(scheme.symmetric is False for scheme in schemes):
            self.found.refused[name] = "packed integers that are not symmetric without their zero points"
            return
        self._add_integers(CompressedIntegers, name.removesuffix("_packed"), shape, parts, bits, count)
        self.found.parts.add(sizes.name)

    def _sizes(self, part: StoredTensor) -> tuple[int, ...]:
        if part.dtype.name not in ("I64", "I32") or part.elements != 2:
            raise InputError(f"{shown(part.name)} ({part.dtype}, {list(part.shape)}) is no shape", where=self.where)
        width = part.dtype.bits // 8
        stored = self.read_bytes(part)
        return tuple(int.from_bytes(stored[at : at + width], "little", signed=True) for at in (0, width))

    def _parts(self, name: str, codes: StoredTensor, leaves: Mapping[str, str]) -> dict[str, StoredTensor]:
        beside = {role: self._beside(name, leaf) for role, leaf in leaves.items()}
        return {"codes": codes, **{role: part for role, part in beside.items() if part is not None}}

    def _add_integers(
        self,
        kind: type[PackedIntegers],
        name: str,
        shape: tuple[int, ...],
        parts: Mapping[str, StoredTensor],
        bits: int,
        count: int,
    ) -> None:
        """Add packed integers of known bits, if what is left of their parts and the settings agrees with them."""
        inputs, groups = shape[1], parts.get("groups")
        scales = parts["scales"]
        whole = all(parts[role].dtype.name == "I32" for role in ("codes", "zeros") if role in parts)
        if groups is not None:
            whole &= groups.dtype.name in ("I32", "I64") and groups.shape == (inputs,)
        if not whole or not scales.dtype.arithmetic:
            raise self._unfit(parts)
        schemes = [scheme for scheme in self.settings.schemes if scheme.allows(bits, inputs, count)]
        if self.settings.schemes and not schemes:
            raise InputError(
                f"the settings of the model say {' or '.join(map(str, self.settings.schemes))}, and the shapes of"
                f" {shown(parts['codes'].name)} and {shown(scales.name)} say {bits} bits in {count} groups of {inputs}"
                " inputs",
                where=self.where,
                hint="config.json and the weights are of two models; fetch them together",
            )
        sizes = {scheme.group for scheme in schemes if scheme.group and scheme.group > 0} or group_sizes(inputs, count)
        if groups is None and len(sizes) != 1:
            raise InputError(
                f"{count} groups of scales in {shown(scales.name)} for {inputs} inputs may be of several sizes",
                where=self.where,
                hint="give the model's folder, with a config.json whose quantization_config names the group_size",
            )
        self._add(
            kind(
                name=name,
                shape=shape,
                dtype=self._dtype(scales),
                parts=parts,
                where=self.where,
                bits=bits,
                group=min(sizes),
            )
        )

    def _unfit(self, parts: Mapping[str, StoredTensor], more: str = "") -> InputError:
        listed = [f"{shown(part.name)} ({part.dtype}, {list(part.shape)})" for part in parts.values()]
        return InputError(
            f"these do not fit together as packed integers: {', '.join([*listed, *([more] if more else [])])}",
            where=self.where,
            hint="the model is not whole, or packed in a way that is not known; give the dequantized checkpoint",
        )

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
