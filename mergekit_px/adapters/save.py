"""LoRA factors -> files that other programs load: a PEFT folder, a kohya file, a diffusers file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergekit_px.adapters.components import COMPONENTS, kohya_prefix, stored_place
from mergekit_px.adapters.config import CONFIG_FILE
from mergekit_px.adapters.lora_modules import LoraModule
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.publish import new_folder
from mergekit_px.checkpoint.selection import ADAPTER_FILE
from mergekit_px.checkpoint.whole import write_tensors
from mergekit_px.errors import AdapterError, OutputError

if TYPE_CHECKING:
    import torch

Format = Literal["peft", "kohya", "diffusers"]

LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder with an adapter in one file."""


def save_peft(
    folder: Path,
    modules: Sequence[LoraModule],
    *,
    base_model_name: str | None = None,
    fan_in_fan_out: bool = False,
    fields: Mapping[str, Any] | None = None,
    whole: Mapping[str, torch.Tensor] | None = None,
    overwrite: bool = False,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, and a lock file that lists them.

    Args:
        fan_in_fan_out: the base stores its matrices (in, out).
        fields: further fields of the configuration, such as ``task_type``.
        whole: further tensors by their full name in the file.

    Raises OutputError where files are in the way, AdapterError for names that PEFT cannot have, WriteError.
    """
    tensors: dict[str, torch.Tensor] = dict(whole or {})
    components = sorted({module.component or "no part" for module in modules})
    if len(components) > 1:
        raise AdapterError(
            f"the modules are of {', '.join(components)}",
            hint="a PEFT adapter is of one part: name it with --component, or write kohya or diffusers",
        )
    for module in modules:
        _require_dots(module)
        prefix = f"base_model.model.{module.name}"
        if module.embedding:
            tensors |= {f"{prefix}.lora_embedding_A": module.a, f"{prefix}.lora_embedding_B": module.b}
        else:
            tensors |= {f"{prefix}.lora_A.weight": module.a, f"{prefix}.lora_B.weight": module.b}
        if module.magnitude is not None:
            tensors[f"{prefix}.lora_magnitude_vector"] = _peft_magnitude(module)
    config = peft_config(modules, base_model_name=base_model_name, fan_in_fan_out=fan_in_fan_out) | dict(fields or {})
    with new_folder(folder, overwrite=overwrite) as staged:
        write_tensors(staged / ADAPTER_FILE, tensors, {"format": "pt"})
        (staged / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def peft_config(
    modules: Sequence[LoraModule], *, base_model_name: str | None = None, fan_in_fan_out: bool = False
) -> dict[str, Any]:
    """The configuration: the commonest rank and alpha, and patterns for the modules that have others."""
    ranks, alphas = {m.name: m.rank for m in modules}, {m.name: _number(m.alpha) for m in modules}
    rank, alpha = _commonest(ranks.values(), 8), _commonest(alphas.values(), 8)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model_name,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "use_rslora": False,
        "use_dora": any(module.magnitude is not None for module in modules),
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def save_kohya(
    path: Path,
    modules: Sequence[LoraModule],
    *,
    component: str = "unet",
    described: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write one file with the names of kohya's programs, dots replaced by underscores.

    Args:
        component: of the modules that do not name theirs.
        described: what the header says of the model that it is for, beside ranks and alphas.

    Raises AdapterError for an embedding, or for modules whose names become one; OutputError, WriteError.
    """
    tensors: dict[str, torch.Tensor] = {}
    placed = [_in_component(module, component) for module in modules]
    has_more_encoders = any(module.component in ("text_encoder_2", "text_encoder_3") for module in placed)
    for module in placed:
        prefix = _kohya_name(module, has_more_encoders)
        if module.embedding:
            raise AdapterError(f"kohya's format has no embeddings: {shown(module.name)}")
        _refuse_wrapped(module)
        if f"{prefix}.alpha" in tensors:
            raise AdapterError(f"two modules would both be named {shown(prefix)}")
        tensors[f"{prefix}.lora_down.weight"] = module.a
        tensors[f"{prefix}.lora_up.weight"] = module.b
        tensors[f"{prefix}.alpha"] = _scalar(module.alpha)
        if module.magnitude is not None:
            tensors[f"{prefix}.dora_scale"] = module.magnitude.reshape(-1, *[1] * (module.a.dim() - 1))
    rank, alpha = _commonest((m.rank for m in modules), 0), _commonest((_number(m.alpha) for m in modules), 0)
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    _write(path, tensors, {**(described or {}), **metadata}, overwrite=overwrite)


def save_diffusers(
    path: Path,
    modules: Sequence[LoraModule],
    *,
    component: str = "unet",
    described: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write one file with the names of diffusers, ``<component>.<module>.lora_A.weight``, and ranks and alphas in its
    metadata. Arguments as of save_kohya.

    Raises AdapterError for an embedding or a name without dots; OutputError, WriteError.
    """
    tensors: dict[str, torch.Tensor] = {}
    groups: dict[str, list[LoraModule]] = {}
    for module in modules:
        _require_dots(module)
        if module.embedding:
            raise AdapterError(f"diffusers has no adapters on embeddings: {shown(module.name)}")
        _refuse_wrapped(module)
        place = stored_place(module.name)
        if place is not None and place[0].differs:
            raise AdapterError(
                f"{shown(module.name)} has another name in diffusers", hint="write it as kohya, or for peft as it is"
            )
        placed = _in_component(module, component)
        own = str(placed.component)
        groups.setdefault(own, []).append(placed)
        tensors[f"{own}.{placed.name}.lora_A.weight"] = placed.a
        tensors[f"{own}.{placed.name}.lora_B.weight"] = placed.b
        if placed.magnitude is not None:
            tensors[f"{own}.{placed.name}.lora_magnitude_vector"] = _peft_magnitude(placed)
    noted: dict[str, Any] = {}
    for own, group in groups.items():
        noted |= {f"{own}.{field}": value for field, value in peft_config(group).items() if field != "peft_type"}
    # Trainers' notes on the network are about the file as they wrote it.
    kept = {key: text for key, text in (described or {}).items() if not key.startswith("ss_network_")}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(noted, sort_keys=True)}
    _write(path, tensors, {**kept, **metadata}, overwrite=overwrite)


def _require_dots(module: LoraModule) -> None:
    if module.flat:
        raise AdapterError(
            f"{shown(module.name)} has underscores for dots",
            hint="give the base model with --base, to look its names up",
        )


def _refuse_wrapped(module: LoraModule) -> None:
    if "base_layer" in module.name.split("."):
        raise AdapterError(
            f"{shown(module.name)} is the output of an nn.MultiheadAttention, which PEFT adds twice; only PEFT's"
            " format says that"
        )


def _in_component(module: LoraModule, default: str) -> LoraModule:
    """A module with its component, which the name in a checkpoint of one file tells, and the name within."""
    component: str | None
    component, prefix, name = module.component or default, module.prefix, module.name
    if (stored := stored_place(name)) is not None:
        place, name = stored
        component, prefix = place.component, place.prefix
    if component is None:
        raise AdapterError(f"the format has no place for {shown(module.name)}", hint="leave it out, or write peft")
    if component not in COMPONENTS:
        raise AdapterError(f"unknown component {shown(component)}", hint=f"known are {', '.join(COMPONENTS)}")
    return replace(module, name=name, component=component, prefix=prefix)


def _kohya_name(module: LoraModule, has_more_encoders: bool) -> str:
    prefix = module.prefix or kohya_prefix(str(module.component), has_more_encoders=has_more_encoders)
    return f"{prefix}{module.name.replace('.', '_')}"


def _peft_magnitude(module: LoraModule) -> torch.Tensor:
    """PEFT keeps the magnitudes of a convolution as (1, out, 1, ...), others as a vector."""
    assert module.magnitude is not None
    kernel = module.a.dim() - 2
    return module.magnitude.reshape(1, -1, *[1] * kernel) if kernel else module.magnitude


def _scalar(value: float) -> torch.Tensor:
    """float32 as usual, float64 where that would change the number."""
    import torch

    narrow = torch.tensor(value, dtype=torch.float32)
    return narrow if float(narrow) == value else torch.tensor(value, dtype=torch.float64)


def _pattern(values: Mapping[str, float], common: float) -> dict[str, float]:
    """One key for each exception; longer names first, since a key matches the end of a name."""
    names = sorted((name for name, value in values.items() if value != common), key=lambda name: (-len(name), name))
    others = {name for name, value in values.items() if value == common}
    needed = {name for name in others if any(name.endswith(f".{exception}") for exception in names)}
    ordered = sorted([*names, *needed], key=lambda name: (-len(name), name))
    return {re.escape(name): values[name] for name in ordered}


def _commonest(values: Any, default: float) -> Any:
    counted = Counter(values)
    return min(counted, key=lambda value: (-counted[value], value)) if counted else default


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else float(value)


def _write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], *, overwrite: bool) -> None:
    """A safetensors file; equal contents give equal bytes."""
    if path.exists() and not overwrite:
        raise OutputError("there is such a file already", where=str(path), hint="give another, or --overwrite")
    write_tensors(path, tensors, metadata)
