"""What an input offers: its stored tensors under their names, and encoded ones as the values that they stand for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import Checkpoint, StoredTensor
from mergekit_px.checkpoint.whole import read_bytes
from mergekit_px.errors import InputError, PlanError
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.model import WorkItem
from mergekit_px.plan.nodes import Decoded, Kind, Node, Read, Rows
from mergekit_px.plan.tokenizers import side_file
from mergekit_px.small_files import LARGEST_SMALL_FILE
from mergekit_px.storage.integer_settings import SETTINGS_FILES
from mergekit_px.storage.recognise import QuantisedTensors, quantised_tensors

_PLAIN_BITS = 16
_QUANTISATION_KEYS = ("quantization_config", "compression_config")
QUANTISATION_FILES = (*SETTINGS_FILES, "hf_quant_config.json")
"""Side files that hold for quantised weights alone: AutoGPTQ's, AutoAWQ's and ModelOpt's."""


@dataclass(frozen=True)
class StoredView:
    """The tensors of an input before adapters and names come in.

    Attributes:
        nodes: by name, in file order.
        checkpoint: described as if its tensors were stored plainly, for what fits adapters to names and shapes.
        encoded: whether some tensors are stored in encoded form.
        markers: stored tensors that say of the whole that it is encoded.
        notes: what was decoded.
    """

    nodes: dict[str, Node]
    checkpoint: Checkpoint
    encoded: bool = False
    markers: tuple[StoredTensor, ...] = ()
    notes: tuple[str, ...] = ()


def stored_view(source: ResolvedInput) -> StoredView:
    """What a checkpoint offers.

    Raises:
        InputError: scales that do not fit their codes.
        PlanError: tensors that are known to be encoded and cannot be decoded.
    """
    kind: Kind = "delta" if source.is_task_vector else "weights"
    checkpoint = source.checkpoint
    reads = {name: Read(source.name, tensor, tensor.shape, kind) for name, tensor in checkpoint.tensors.items()}
    quantised = quantised_tensors(checkpoint, _byte_reader(source), partial(side_file, source))
    _refuse_undecoded(source, quantised)
    if not quantised.encodings:
        return StoredView(dict(reads), checkpoint)
    nodes: dict[str, Node] = {}
    described: dict[str, StoredTensor] = {}
    places = {encoding.parts["codes"].name: encoding for encoding in quantised.encodings.values()}
    for name, read in reads.items():
        encoding = places.get(name)
        if encoding is not None:
            parts = tuple(reads[part.name] for part in encoding.parts.values())
            nodes[encoding.name] = Decoded(encoding, parts, kind)
            described[encoding.name] = replace(
                read.tensor, name=encoding.name, dtype=encoding.dtype, shape=encoding.shape
            )
        elif name not in quantised.parts:
            nodes[name] = read
            described[name] = read.tensor
    return StoredView(
        nodes,
        replace(checkpoint, tensors=described),
        encoded=True,
        markers=tuple(checkpoint.tensors[name] for name in quantised.markers),
        notes=(_note(source, quantised),),
    )


def first_rows(node: Node, count: int) -> Node:
    """The first rows of a node; a stored tensor is read no further."""
    if isinstance(node, Read):
        return replace(node, shape=(count, *node.shape[1:]))
    return Rows(node, np.arange(count))


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what it says of quantised storage, at the top and in the sections of a model's parts."""
    return {
        key: plain_config(value) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _QUANTISATION_KEYS
    }


def quantisation_sections(config: Mapping[str, Any]) -> list[Any]:
    """What a config says of quantised storage, at the top and in the sections of a model's parts."""
    inner = [value for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]
    own = [config[key] for key in _QUANTISATION_KEYS if key in config]
    return [*own, *(found for part in inner if part not in own for found in quantisation_sections(part))]


def has_decoded(items: Iterable[WorkItem]) -> bool:
    """Whether anything that is written was decoded on reading."""
    return any(isinstance(node, Decoded) for item in items for node in item.nodes)


def refuse_quantised_by_config(items: Iterable[WorkItem], inputs: Mapping[str, ResolvedInput]) -> None:
    """Refuse to compute with tensors that a config calls quantised where none of them was recognised.

    Raises:
        PlanError
    """
    packed = {
        name: config["quantization_config"].get("quant_method", "unknown")
        for name, source in inputs.items()
        for config in source.checkpoint.configs.values()
        if isinstance(config.get("quantization_config"), dict)
    }
    if not packed:
        return
    listed = list(items)
    decoded = {node.parts[0].model for item in listed if item.views for node in item.nodes if isinstance(node, Decoded)}
    for item in listed:
        if item.action == "copy":
            continue
        for read in item.reads:
            if read.model in packed and read.model not in decoded:
                source = inputs[read.model]
                codes = [name for name, tensor in source.checkpoint.tensors.items() if tensor.dtype.bits < _PLAIN_BITS]
                raise PlanError(
                    f"the config of '{read.model}' says that it is stored quantized ({packed[read.model]}), and "
                    + (f"{shown(codes[0])} has no scales" if codes else "none of its tensors is stored so"),
                    where=source.reference,
                    hint="fetch the model again, or give the dequantized checkpoint"
                    if codes
                    else "take quantization_config out of its config.json if the weights are plain",
                )


def plain_float8(items: Iterable[WorkItem], inputs: Mapping[str, ResolvedInput]) -> list[str]:
    """What to say of tensors of 8-bit floats without scales, which are taken as numbers.

    Raises:
        PlanError: a tensor is merged with one that has scales; the two cannot both be whole.
    """
    plain: dict[str, list[str]] = {}
    for item in items:
        decoded = [node for node in item.nodes if isinstance(node, Decoded)]
        parts = {part for node in decoded for part in node.parts}
        scaled = next((node.parts[0] for node in decoded if node.parts[0].dtype.name.startswith("F8_")), None)
        for read in item.reads if item.action != "copy" else ():
            if read in parts or not read.dtype.name.startswith("F8_") or len(read.shape) < 2:
                continue
            if scaled is not None:
                raise PlanError(
                    f"{shown(read.tensor.name)} is {read.dtype} without scales in '{read.model}' and with scales in"
                    f" '{scaled.model}'; the scales of the first are lost, or kept under a name that is not known",
                    where=inputs[read.model].reference,
                    hint="fetch the model again, or give the dequantized checkpoint",
                )
            plain.setdefault(read.model, []).append(read.tensor.name)
    return [
        f"{len(set(names))} tensors of '{model}' are 8-bit floats without scales, as {shown(names[0])}, and are taken"
        " as the numbers that they are"
        for model, names in plain.items()
    ]


def _byte_reader(source: ResolvedInput) -> Any:
    def read(tensor: StoredTensor) -> bytes:
        if source.state is None and source.checkpoint.directory is None:
            if source.repo is not None and tensor.nbytes <= LARGEST_SMALL_FILE:
                from mergekit_px.hub.ranges import read_range

                return read_range(source.repo, tensor.file, tensor.offset, tensor.nbytes)
            raise InputError(
                f"{shown(tensor.name)} says how the model is quantised, and is not on this machine",
                where=source.reference,
                hint=f"fetch it first: pxmerge pull {source.reference}",
            )
        with closing(source.open_reader()) as reader:
            return bytes(read_bytes(reader, tensor))

    return read


def _refuse_undecoded(source: ResolvedInput, quantised: QuantisedTensors) -> None:
    if not quantised.refused:
        return
    name, what = next(iter(quantised.refused.items()))
    more = len(quantised.refused) - 1
    raise PlanError(
        f"{shown(name)} of '{source.name}'" + (f" and {more} more" if more else "") + f": {what}, which are not decoded"
        " here; merging them as numbers would make noise",
        where=source.reference,
        hint="give the dequantized checkpoint",
    )


def _note(source: ResolvedInput, quantised: QuantisedTensors) -> str:
    counts = Counter((encoding.title, encoding.dtype.name) for encoding in quantised.encodings.values())
    listed = ", ".join(f"{count} of {title} as {dtype}" for (title, dtype), count in counts.items())
    return f"'{source.name}' is stored quantised and decoded on reading: {listed}"
