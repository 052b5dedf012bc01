"""Adapters in one file without a configuration: kohya sd-scripts, LyCORIS, ComfyUI, diffusers in old and new style.

The tensor names tell the module and the role of each tensor; the scale is a stored ``alpha`` over the rank, or one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_px.adapters import lycoris
from mergekit_px.adapters.adapter import Adapter
from mergekit_px.adapters.components import DOTTED_PREFIXES, FLAT_PREFIXES
from mergekit_px.adapters.config import AdapterConfig
from mergekit_px.adapters.peft_keys import Module, ParsedKeys
from mergekit_px.adapters.registry import Family
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import StoredTensor, open_checkpoint
from mergekit_px.errors import AdapterError

ROLES: Mapping[str, str] = {
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "lora_mid.weight": "mid",
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_linear_layer.down.weight": "A",
    "lora_linear_layer.up.weight": "B",
    "lora.down.weight": "A",
    "lora.up.weight": "B",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
    **{name: name for name in ("oft_blocks", "rescale", "diff", "diff_b", "w_norm", "b_norm")},
    **{name: name for name in ("set_weight", "set_bias")},
}
"""What a tensor is, by the end of its name."""

_REFUSED = {
    "a1.weight": "GLoRA",
    "a2.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "b2.weight": "GLoRA",
    "bm.weight": "GLoRA",
    "on_input": "LyCORIS (IA)^3",
    "reshape_weight": "a padded weight",
}

_ADAPTER_NAME = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)[^.]+(\.weight|\.bias|)$")
_OLD_ATTENTION = re.compile(
    r"^(.+?)(\.processor)?\.(to_q|to_k|to_v|to_out|add_k_proj|add_v_proj)_lora\.(down|up)\.weight$"
)
_TELLING = re.compile(r"[._](lora[._]|hada_w|lokr_w|oft_blocks)")
_METADATA_KEY = "lora_adapter_metadata"


class Place(NamedTuple):
    """What the name of a module says: its component and path, and how they were written."""

    component: str | None
    path: str
    flat: bool
    prefix: str | None = None


def open_single_file(path: Path, label: str, *, allow_pickle: bool) -> Adapter:
    """Describe an adapter file.

    Raises AdapterError for names that no format has, and for PEFT names without the configuration they need.
    """
    checkpoint = open_checkpoint(path, label=label, allow_pickle=allow_pickle)
    modules = parse_names(checkpoint.tensors, label)
    if not modules:
        raise AdapterError("the file holds no tensor", where=label)
    styles = {"KOHYA" if module.flat else "DIFFUSERS" for module in modules.values()}
    kind = styles.pop() if len(styles) == 1 else "MIXED"
    if any(role.startswith(("hada_", "lokr_", "oft_", "diff")) for m in modules.values() for role in m.tensors):
        kind = "LYCORIS"
    config = AdapterConfig(kind, _metadata(checkpoint.metadata, label), label)
    family = Family(frozenset(ROLES.values()), lycoris.bind)
    return Adapter(label, checkpoint, config, family, ParsedKeys(modules))


def is_adapter_file(names: Collection[str]) -> bool:
    """Whether every tensor of a file has the name of an adapter's, and some have one that no model uses."""
    endings = tuple(f".{role}" for role in ROLES)
    telling = any(_TELLING.search(name) for name in names)
    return telling and all(
        _OLD_ATTENTION.match(name) or _ADAPTER_NAME.sub(r".\1\2", name).endswith(endings) for name in names
    )


def parse_names(tensors: Mapping[str, StoredTensor], where: str) -> dict[str, Module]:
    """The adapted modules, by component and name. Raises AdapterError."""
    found: dict[Place, dict[str, StoredTensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("base_model.model."):
            raise AdapterError(
                f"{shown(key)} is a name of PEFT, which needs its adapter_config.json", where=where,
                hint="give the folder with both files",
            )  # fmt: skip
        path, role = _split(key, where)
        place = _place(path)
        if role in found.setdefault(place, {}):
            other = found[place][role].name
            raise AdapterError(f"{shown(key)} and {shown(other)} are the same factor of one module", where=where)
        if role == "alpha" and tensor.elements != 1:
            raise AdapterError(f"{shown(key)} is {list(tensor.shape)}, not one number", where=where)
        found[place][role] = tensor
    prefixes: dict[tuple[str | None, str], str | None] = {}
    for place in found:
        first = prefixes.setdefault((place.component, place.path), place.prefix)
        if first != place.prefix:
            raise AdapterError(
                f"{shown(place.path)} is there as {first or 'a name with dots'} and as {place.prefix}",
                where=where,
                hint="both mean one module; keep one of them",
            )
    return {
        f"{place.component}:{place.path}" if place.component else place.path: Module(
            place.path, roles, component=place.component, flat=place.flat, prefix=place.prefix
        )
        for place, roles in found.items()
    }


def _split(key: str, where: str) -> tuple[str, str]:
    """A tensor's name -> its module's name as written, and its role."""
    old = _OLD_ATTENTION.match(key)
    if old:
        module, processor, projection, direction = old.groups()
        return f"{module}.{_attention_leaf(projection, in_processor=bool(processor), module=module)}", (
            "A" if direction == "down" else "B"
        )
    plain = _ADAPTER_NAME.sub(r".\1\2", key)
    parts = plain.split(".")
    for length in (3, 2, 1):
        suffix = ".".join(parts[-length:])
        if length < len(parts) and suffix in _REFUSED:
            raise AdapterError(f"{shown(key)} belongs to {_REFUSED[suffix]}, which cannot be merged here", where=where)
        if length < len(parts) and suffix in ROLES:
            return ".".join(parts[:-length]), ROLES[suffix]
    raise AdapterError(
        f"{shown(key)} is not the name of an adapter's tensor", where=where, hint="is this a model, and no adapter?"
    )


def _attention_leaf(projection: str, *, in_processor: bool, module: str) -> str:
    """The layer that diffusers' first style calls ``to_q_lora`` and the like; in text encoders it is ``q_proj``."""
    if not in_processor and module.endswith("self_attn"):
        return projection.removeprefix("to_") + "_proj"
    return "to_out.0" if projection == "to_out" else projection


def _place(path: str) -> Place:
    for prefix, component in FLAT_PREFIXES.items():
        if path.startswith(prefix) and "." not in path:
            return Place(component, path.removeprefix(prefix), True, prefix)
    for prefix, part in DOTTED_PREFIXES.items():
        if path.startswith(prefix):
            return Place(part, path.removeprefix(prefix), False)
    return Place(None, path, "." not in path and "_" in path)


def _metadata(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """What diffusers notes of the configuration: fields named ``<component>.<field>``."""
    text = metadata.get(_METADATA_KEY)
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"the metadata {_METADATA_KEY} is not JSON: {error}", where=where) from None
    return values if isinstance(values, dict) else {}
