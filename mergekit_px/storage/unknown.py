"""Stored tensors that are codes of something, and of no format that is decoded here: they must not pass for numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import StoredTensor

_WITHOUT_THE_REST = {
    "qweight": "packed integers of GPTQ or AWQ without their scales or zero points",
    "qzeros": "zero points of GPTQ or AWQ without their codes",
    "SCB": "bitsandbytes 8-bit scales",
    "weight_packed": "packed codes of compressed-tensors without their scales or shape",
    "weight_shape": "packed codes of compressed-tensors without their scales or shape",
    "weight_zero_point": "zero points of integers without their codes",
    "absmax": "bitsandbytes 4-bit scales",
    "quant_map": "bitsandbytes 4-bit tables",
    "scale_weight": "scales of quantised weights",
    "weight_scale": "scales of quantised weights",
    "weight_scale_inv": "scales of quantised weights",
    "weight_scale_2": "scales of quantised weights",
    "weight_global_scale": "scales of quantised weights",
}
"""Last part of a name -> what only quantised storage has under it."""

_FORMATS = {
    "W_q": "HQQ",
    "q_weight": "EXL2",
    "trellis": "EXL3",
    "Qidxs": "QuIP#",
    "codes": "AQLM",
    "indices": "VPTQ",
    "_weight_qdata": "torchao",
    "_data": "quanto",
    "B": "Marlin",
    "bitmask": "sparse storage of compressed-tensors",
}
"""Last part of a name of codes -> the format that calls them so."""

_FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_NARROW = ("U8", "I8", "I16", "U16", "I32", "U32", "F4", "F6_E2M3", "F6_E3M2")
"""What codes are kept in. Tables of positions and masks, which models have too, are of 64 bits or booleans."""

_WEIGHT = re.compile(r"(^|_)(weight|proj|blocks|scales|w\d|fc\d)$")
"""Names of matrices, and of their codes and scales in MXFP4."""

_TABLE = re.compile(r"position|relative|mask|token|tid2eid|num_batches|index$")
_OTHER_SCALE = re.compile(
    r"(^|_)(input|output|activation|act|logit|logits|softmax|q|k|v|kv|prob|attn)_?scale|scale_input"
)
"""Scales that are no part of a weight's values."""


def unknown_codes(tensors: Mapping[str, StoredTensor], names: Iterable[str]) -> dict[str, str]:
    """Those of some tensors that are known to be encoded -> what they are.

    Args:
        tensors: all of the model, among which the rest of an encoding lies.
        names: the tensors that no known encoding has taken.
    """
    found: dict[str, str] = {}
    rest = list(names)
    for leaf, what in _WITHOUT_THE_REST.items():
        found.update({name: what for name in rest if name.rpartition(".")[2] == leaf})
    modules: dict[str, list[str]] = {}
    for name in tensors:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    for name in rest:
        module, _, leaf = name.rpartition(".")
        tensor = tensors[name]
        if name in found or len(tensor.shape) < 2 or not (_is_narrow(tensor) or tensor.dtype.name in _FLOAT8):
            continue
        others = [other for other in modules[module] if other != name]
        companion = _companion(tensor, others, tensors)
        if companion is not None and (leaf in _FORMATS or not _TABLE.search(leaf)):
            of = f"of {_FORMATS[leaf]}" if leaf in _FORMATS else f"that go with {shown(companion)}"
            found[name] = f"codes ({tensor.dtype}) {of}"
        elif _WEIGHT.search(leaf) and tensor.dtype.name not in _FLOAT8:
            found[name] = f"packed codes ({tensor.dtype}) of no known format"
    return found


def _is_narrow(tensor: StoredTensor) -> bool:
    return tensor.dtype.name in _NARROW or (tensor.dtype.kind == "integer" and tensor.name.endswith(".weight"))


def _companion(tensor: StoredTensor, others: Iterable[str], tensors: Mapping[str, StoredTensor]) -> str | None:
    """What beside some codes turns them into values: numbers in a module that has no weight of numbers."""
    floats = {other.rpartition(".")[2]: other for other in others if tensors[other].dtype.kind == "float"}
    if tensor.dtype.name in _FLOAT8:
        return next(
            (name for leaf, name in floats.items() if "scale" in leaf and not _OTHER_SCALE.search(leaf)),
            None,
        )
    if "weight" in floats:
        return None
    return next((name for leaf, name in floats.items() if leaf != "bias" and not _TABLE.search(leaf)), None)
