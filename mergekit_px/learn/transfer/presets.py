"""Settings of the paper's experiments (arXiv 2404.13322, appendix), and the one place where defaults are filled in.

Explicit values come first, then the preset's, then the defaults. What the appendix does not give is left to the
defaults: the adapter's learning rate for cross-modal and cross-task transfer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from mergekit_px.learn.transfer.plan import Adapter, Model, Optimizer, Transfer

DEFAULT_LR = 1e-3
DEFAULT_WEIGHT_DECAY = 1e-2
DEFAULT_BATCH = 32
DEFAULT_CYCLE = 4
DEFAULT_LAYERS = 2
DEFAULT_HEADS = 4
DEFAULT_ADAPTER_LR = 1e-4
DEFAULT_ADAPTER_WEIGHT_DECAY = 1e-2


@dataclass(frozen=True, slots=True)
class Role:
    """How one of the two models learns."""

    batch: int
    lr: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class Preset:
    """The settings of one experiment."""

    summary: str
    target: Role
    source: Role
    cycle: int
    layers: int = 2
    heads: int = 8
    adapter_lr: float | None = None
    adapter_weight_decay: float | None = None


_VISION = Role(batch=128, lr=1e-2, weight_decay=1e-4)

PRESETS: Mapping[str, Preset] = {
    "cross-structure": Preset(
        "another architecture, the same data (ResNet50 to MobileNetV2, CIFAR-100; the other way with cycle 5)",
        _VISION,
        _VISION,
        cycle=4,
        adapter_lr=1e-3,
        adapter_weight_decay=1e-2,
    ),
    "cross-modal": Preset(
        "image-text retrieval and question answering (X-VLM; target retrieval, source answering)",
        Role(16, 1e-4, 1e-2),
        Role(16, 5e-4, 1e-2),
        cycle=2,
        heads=12,
    ),
    "cross-task": Preset(
        "classification from question answering (BERT, IMDb from SQuAD; the other way with cycle 2)",
        Role(6, 5e-5, 1e-2),
        Role(32, 5e-5, 1e-5),
        cycle=1,
        heads=12,
    ),
    "self": Preset(
        "between layers of one model",
        _VISION,
        _VISION,
        cycle=4,
        adapter_lr=1e-3,
        adapter_weight_decay=1e-2,
    ),
}


def filled_transfer(transfer: Transfer) -> Transfer:
    """The transfer with no value left open, but for ``save_every``."""
    preset = PRESETS[transfer.preset] if transfer.preset is not None else None
    adapter = transfer.adapter
    filled_adapter = _filled(
        adapter,
        {
            "layers": (preset and preset.layers, DEFAULT_LAYERS),
            "heads": (preset and preset.heads, DEFAULT_HEADS),
            "lr": (preset and preset.adapter_lr, DEFAULT_ADAPTER_LR),
            "weight_decay": (preset and preset.adapter_weight_decay, DEFAULT_ADAPTER_WEIGHT_DECAY),
        },
    )
    filled = _filled(
        transfer,
        {
            "cycle": (preset and preset.cycle, DEFAULT_CYCLE),
        },
    )
    return filled.model_copy(update={"adapter": filled_adapter})


def filled_model(model: Model, transfer: Transfer, *, is_source: bool) -> Model:
    """The model with no value left open, in its role in a transfer."""
    preset = PRESETS[transfer.preset] if transfer.preset is not None else None
    role = None if preset is None else preset.source if is_source else preset.target
    optimizer = _filled(
        model.optimizer,
        {
            "lr": (role and role.lr, DEFAULT_LR),
            "weight_decay": (role and role.weight_decay, DEFAULT_WEIGHT_DECAY),
        },
    )
    filled = _filled(
        model,
        {
            "batch": (role and role.batch, DEFAULT_BATCH),
            "goal": (None, "min" if model.metric == "loss" else "max"),
        },
    )
    return filled.model_copy(update={"optimizer": optimizer})


_Part = TypeVar("_Part", Adapter, Model, Optimizer, Transfer)


def _filled(part: _Part, values: Mapping[str, tuple[object, object]]) -> _Part:
    """The part with (preset's value, default) put in where it leaves a field open."""
    update = {
        name: preset if preset is not None else default
        for name, (preset, default) in values.items()
        if getattr(part, name) is None
    }
    return part.model_copy(update=update)
