"""Settings of the paper's experiments (arXiv 2404.13322, appendix), and the one place where defaults are filled in.

Explicit values come first, then the preset's, then the defaults. What the appendix does not give is left to the
defaults: the adapter's learning rate for cross-modal and cross-task transfer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from mergekit_px.learn.transfer.plan import Adapter, Model, Optimizer, Transfer


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
    adapter_lr: float = 1e-4
    adapter_weight_decay: float = 1e-2


_VISION = Role(batch=128, lr=1e-2, weight_decay=1e-4)

_DEFAULTS = Preset(
    "what no preset says",
    Role(batch=32, lr=1e-3, weight_decay=1e-2),
    Role(batch=32, lr=1e-3, weight_decay=1e-2),
    cycle=4,
    heads=4,
)

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
    preset = _preset(transfer)
    learning = {"lr": preset.adapter_lr, "weight_decay": preset.adapter_weight_decay}
    adapter = _filled(transfer.adapter, {"layers": preset.layers, "heads": preset.heads, **learning})
    return _filled(transfer, {"cycle": preset.cycle}).model_copy(update={"adapter": adapter})


def filled_model(model: Model, transfer: Transfer, *, is_source: bool) -> Model:
    """The model with no value left open, in its role in a transfer."""
    preset = _preset(transfer)
    role = preset.source if is_source else preset.target
    optimizer = _filled(model.optimizer, {"lr": role.lr, "weight_decay": role.weight_decay})
    filled = _filled(model, {"batch": role.batch, "goal": "min" if model.metric == "loss" else "max"})
    return filled.model_copy(update={"optimizer": optimizer})


def _preset(transfer: Transfer) -> Preset:
    return _DEFAULTS if transfer.preset is None else PRESETS[transfer.preset]


_Part = TypeVar("_Part", Adapter, Model, Optimizer, Transfer)


def _filled(part: _Part, values: Mapping[str, object]) -> _Part:
    """The part with these values where it leaves a field open."""
    return part.model_copy(update={name: value for name, value in values.items() if getattr(part, name) is None})
