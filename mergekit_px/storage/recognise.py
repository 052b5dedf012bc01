"""Which tensors of a checkpoint are encodings of others: told from names, dtypes and shapes, never from one alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from mergekit_px.checkpoint.dtypes import DTYPES, DType
from mergekit_px.checkpoint.json_text import parse_object, shown
from mergekit_px.checkpoint.open import Checkpoint, StoredTensor
from mergekit_px.errors import InputError, MalformedCheckpointError
from mergekit_px.small_files import LARGEST_SMALL_FILE, read_small_file
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
from mergekit_px.storage.scaled import Mxfp8, Scaled, ScaledFromZeros, block_sides
from mergekit_px.storage.unknown import unknown_codes

ReadBytes = Callable[[StoredTensor], bytes]
"""Gives the bytes of a small stored tensor."""

ReadFile = Callable[[str], bytes | None]
"""Gives a file beside the weights, by its place in the model's folder; None where there is none."""

_FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_POWERS_OF_TWO = ("U8", "F8_E8M0")
"""How e8m0 scales are kept; not every writer knows the second."""
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
"""Behind the name of the tensor of codes: DeepSeek's and transformers' fp8; compressed-tensors and ModelOpt."""
_COMFY_SCALE = "scale_weight"
_COMFY_MARKER = "scaled_fp8"
_STATE = ".quant_state."
_OF_ACTIVATIONS = (
    *("input_scale", "scale_input", "input_scale_ub", "output_scale", "weight_format", "input_global_scale"),
    *("input_zero_point", "output_zero_point", "comfy_quant"),
)
"""Beside a weight, and of no meaning for its values: scales of activations, a tag of its layout."""
_COMFY_TAG = "comfy_quant"
"""Which of ComfyUI's formats a layer is in; of codes of four bits it keeps the scales in the order of tiles."""
_COMFY_METADATA = "_quantization_metadata"
"""In a header: the same of all layers."""
_OF_CACHES = ("k_scale", "v_scale", "q_scale", "kv_scale")
"""Scales of the keys and values that a server keeps, which go with a quantised model."""


@dataclass
class QuantisedTensors:
    """What of a checkpoint is stored in encoded form.

    Attributes:
        encodings: by the name of the decoded tensor.
        parts: name of every stored tensor that belongs to one, or to all.
        markers: those that belong to all.
        refused: name of a stored tensor -> what it is, where it is known to be encoded and cannot be decoded.
    """

    encodings: dict[str, Encoding] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)
    markers: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)


def quantised_tensors(
    checkpoint: Checkpoint, read_bytes: ReadBytes, read_file: ReadFile | None = None
) -> QuantisedTensors:
    """Recognise the encoded tensors of a checkpoint, each part of it by its own config and settings.

    Args:
        read_bytes: for the few bytes in which some formats keep shapes and settings.
        read_file: for files of settings beside the weights; None stands for those on this machine.

    Raises:
        InputError: scales or settings that do not fit their codes.
    """
    found = QuantisedTensors()
    for folder in checkpoint.parts or ("",):
        _Recognition(checkpoint, folder, read_bytes, read_file or partial(_file_here, checkpoint), found).add()
    return found


def _file_here(checkpoint: Checkpoint, name: str) -> bytes | None:
    if checkpoint.directory is None or name not in checkpoint.side_files:
        return None
    return read_small_file(checkpoint.directory / name, f"{checkpoint.label}/{name}", folder=checkpoint.directory)


class _Recognition:
    """Looks at one folder of a checkpoint."""

    def __init__(
        self, checkpoint: Checkpoint, folder: str, read_bytes: ReadBytes, read_file: ReadFile, found: QuantisedTensors
    ) -> None:
        own = {name: each for name, each in checkpoint.tensors.items() if checkpoint.part_of(name) == folder}
        self.tensors: Mapping[str, StoredTensor] = own if checkpoint.parts else checkpoint.tensors
        self.start = f"{folder}/" if folder else ""
        self.where = checkpoint.label
        self.read_bytes, self.read_file = read_bytes, read_file
        self.metadata = (checkpoint.parts.get(folder) or checkpoint).metadata
        self.config = checkpoint.configs.get(folder)
        self.compute = _compute_dtype(self.config)
        self.block = _declared_block(self.config)
        self.found = found
        self.states = {name.partition(_STATE)[0]: name for name in self.tensors if _STATE in name}
        """Name of bitsandbytes' 4-bit codes -> name of the tensor with their settings."""

    def add(self) -> None:
        """Add what is found."""
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
        ends = (_COMFY_MARKER, *_OF_CACHES)
        markers = [name for name in self.tensors if name.removeprefix(self.start).rpartition(".")[2] in ends]
        if self.found.encodings:
            self.found.parts.update(markers)
            self.found.markers += tuple(markers)
        rest = [name for name in self.tensors if name not in self.found.parts and name not in self.found.refused]
        self.found.refused.update(unknown_codes(self.tensors, rest))
        if any(encoding.parts["codes"].dtype.name in _FLOAT8 for encoding in self.found.encodings.values()):
            codes = [name for name in rest if self.tensors[name].dtype.name in _FLOAT8 and self.tensors[name].shape[1:]]
            self.found.refused.update(dict.fromkeys(codes, "fp8 codes without scales, which others of the model have"))

    @cached_property
    def settings(self) -> IntegerSettings:
        return integer_settings(_sections(self.config), lambda name: self.read_file(self.start + name), self.where)

    def _add(self, encoding: Encoding, *settings: StoredTensor) -> None:
        codes = encoding.parts["codes"].name
        if encoding.name != codes and encoding.name in self.tensors:
            raise InputError(
                f"{shown(encoding.name)} is there plainly and encoded, as {shown(codes)}",
                where=self.where,
                hint="keep one of the two",
            )
        activations = (self._beside(encoding.name, leaf) for leaf in _OF_ACTIVATIONS)
        encoding = replace(encoding, beside=(*settings, *(part for part in activations if part is not None)))
        self.found.encodings[encoding.name] = encoding
        self.found.parts.update(part.name for part in encoding.stored)

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
        parts: dict[str, StoredTensor] = {"codes": codes, "scales": scales}
        kind: type[Scaled | ScaledFromZeros | Mxfp8] = Scaled
        if (zeros := self.tensors.get(f"{name}_zero_point")) is not None:
            if codes.dtype.name != "I8" or zeros.dtype.kind != "integer" or zeros.shape != scales.shape:
                raise self._misfit(name, codes, zeros)
            parts["zeros"], kind = zeros, ScaledFromZeros
        elif scales.dtype.name == "U8" and codes.dtype.name in _FLOAT8:
            scales = parts["scales"] = replace(scales, dtype=DTYPES["F8_E8M0"])
            kind = Mxfp8
        if scales.dtype.name == "F8_E8M0" and self._tiled(name, codes):
            return
        sides = block_sides(codes.shape, scales.shape, self.block)
        if divisor != 1.0 and scales.shape != codes.shape[:1]:
            sides = None
        if not scales.dtype.arithmetic and scales.dtype.name != "F8_E8M0":
            sides = None
        if sides is None or 0 in codes.shape or not codes.shape:
            raise self._misfit(name, codes, scales)
        self._add(
            kind(
                name=name,
                shape=codes.shape,
                dtype=self._dtype(scales),
                parts=parts,
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
            shape = (*codes.shape[:-1], 2 * codes.shape[-1]) if codes.shape else ()
            if block_scales is not None and block_scales.dtype.name in _POWERS_OF_TWO and name != plain:
                if shape[-1:] and block_scales.shape == (*shape[:-1], shape[-1] // 32) and shape[-1] % 32 == 0:
                    self._add_mxfp4(plain, shape, codes, block_scales, swapped=False)
                else:
                    raise self._misfit(name, codes, block_scales)

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
        self._add_integers(CompressedIntegers, name.removesuffix("_packed"), shape, parts, bits, count, sizes)

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
        *settings: StoredTensor,
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
            ),
            *settings,
        )

    def _unfit(self, parts: Mapping[str, StoredTensor], more: str = "") -> InputError:
        listed = [f"{shown(part.name)} ({part.dtype}, {list(part.shape)})" for part in parts.values()]
        return InputError(
            f"these do not fit together as packed integers: {', '.join([*listed, *([more] if more else [])])}",
            where=self.where,
            hint="the model is not whole, or packed in a way that is not known; give the dequantized checkpoint",
        )

    def _mxfp4(self, name: str, codes: StoredTensor, scales: StoredTensor) -> None:
        if codes.shape != (*scales.shape, 16) or len(scales.shape) != 3 or scales.dtype.name not in _POWERS_OF_TWO:
            raise self._misfit(name, codes, scales)
        experts, out, blocks = scales.shape
        self._add_mxfp4(name, (experts, blocks * 32, out), codes, scales, swapped=True)

    def _add_mxfp4(
        self, name: str, shape: tuple[int, ...], codes: StoredTensor, scales: StoredTensor, *, swapped: bool
    ) -> None:
        parts = {"codes": codes, "scales": scales}
        dtype = self.compute or DTYPES["BF16"]
        self._add(Mxfp4(name=name, shape=shape, dtype=dtype, parts=parts, where=self.where, swapped=swapped))

    def _tiled(self, name: str, codes: StoredTensor) -> bool:
        """Whether the scales are in the order of ComfyUI's kernels, which is refused then."""
        tagged = self._beside(name, _COMFY_TAG) is not None or _COMFY_METADATA in self.metadata
        if tagged:
            self.found.refused[codes.name] = "blocks of ComfyUI, whose scales are in the order of tiles"
        return tagged

    def _nvfp4(self, name: str, codes: StoredTensor, scales: StoredTensor, whole: StoredTensor, divides: bool) -> None:
        if self._tiled(name, codes):
            return
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
            ),
            self.tensors[state],
        )


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
