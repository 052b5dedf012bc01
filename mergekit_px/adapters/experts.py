"""LoRA on the stacked parameters of mixture-of-experts layers (``target_parameters`` of PEFT).

A parameter P has the shape (E, d1, d2). A has r E rows, the experts one after another; B has r E columns, the
experts interleaved (expert fastest). What the last two axes mean changed between releases of PEFT: up to 0.18 they
were read as (in, out), dP_e = A_e^T B_e^T; since 0.19 as (out, in), dP_e = B_e A_e, but for modules that are marked
``is_transposed``. The shapes decide; for square experts the release that wrote the adapter.

Transformers stacks the experts in memory while many files hold each expert by itself; then the share of each
expert, and of each half of a fused gate and up projection, goes to the tensor that the file has.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mergekit_px.adapters.binder import Binder, only, roles
from mergekit_px.adapters.config import AdapterConfig
from mergekit_px.adapters.patch import AdditivePatch, Factors, Patch, get, onto, taken
from mergekit_px.adapters.peft_keys import Module
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import StoredTensor

if TYPE_CHECKING:
    import torch

Layout = Literal["out_in", "in_out"]
"""How P's last two axes were read when the adapter was trained."""

ScaleOf = Callable[[AdapterConfig, str, int], float]

_TRANSPOSED_MODELS = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
"""Model types whose experts transformers marks ``is_transposed``."""

_GATE, _UP, _DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertsPatch(AdditivePatch):
    """A stacked parameter (E, d1, d2), or one of a single matrix (d1, d2): P_e + s dP_e for each expert."""

    experts: int
    layout: Layout

    def delta(self, factors: Factors, rows: slice | None, like: torch.Tensor) -> torch.Tensor:
        left, right = expert_pairs(factors, self.experts, self.layout, like)
        if len(self.out_shape) == 2:
            return (taken(left[0], rows) @ right[0]).mul_(self.scaling(factors))
        return (taken(left, rows) @ taken(right, rows)).mul_(self.scaling(factors))


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertSlicePatch(AdditivePatch):
    """The matrix of one expert, stored by itself: rows [start, start + out) of dP_e.

    Attributes:
        expert: e.
        start: 0, or where the up projection begins in the fused gate and up projection.
    """

    experts: int
    layout: Layout
    expert: int
    start: int = 0

    def pair(self, factors: Factors, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(left, right)`` without the scale."""
        left, right = expert_pairs(factors, self.experts, self.layout, like)
        return left[self.expert, self.start : self.start + self.out_shape[0]], right[self.expert]

    def delta(self, factors: Factors, rows: slice | None, like: torch.Tensor) -> torch.Tensor:
        left, right = self.pair(factors, like)
        return (taken(left, rows) @ right).mul_(self.scaling(factors))

    def low_rank(self, factors: Factors) -> tuple[torch.Tensor, torch.Tensor] | None:
        import torch

        left, right = self.pair(factors, torch.empty(0, dtype=torch.float32, device=factors["A"].device))
        return left * self.scaling(factors), right.contiguous()


def expert_pairs(factors: Factors, experts: int, layout: Layout, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``(left, right)`` of shapes (E, d1, r) and (E, r, d2): dP_e = left_e right_e."""
    down, up = get(factors, "A", like), get(factors, "B", like)
    a = down.reshape(experts, -1, down.shape[1])
    b = up.reshape(up.shape[0], -1, experts).permute(2, 0, 1)
    return (b, a) if layout == "out_in" else (a.transpose(1, 2), b.transpose(1, 2))


@dataclass(frozen=True)
class _Parameter:
    """A stacked parameter that may have been adapted: one tensor of the base, or the experts' own tensors.

    ``parts``: for each expert the tensors that its matrix is made of, one below the other; empty if stacked.
    """

    name: str
    shape: tuple[int, int, int]
    stacked: StoredTensor | None = None
    parts: tuple[tuple[StoredTensor, ...], ...] = ()


def is_expert_module(module: Module, binder: Binder) -> bool:
    """Whether an adapted module is one of bare parameters, not a layer with a ``weight``."""
    if module.inner or binder.names.find(module.name) is None:
        return bool(module.inner) or _expert_place(module.name, binder) is not None
    place = binder.names.module(module.name)
    weight = binder.base.tensors.get(f"{place}.weight")
    if weight is not None:
        return len(weight.shape) == 3 and len(module.tensors["lora_A"].shape) == 2
    return f"{place}.in_proj_weight" not in binder.base.tensors and binder.packed(place) is None


def bind_experts(module: Module, binder: Binder, scale_of: ScaleOf) -> list[Patch]:
    """The patches of a module of stacked parameters. Raises AdapterError where the factors do not settle which
    parameter, or which layout, they belong to."""
    levels = [module, *module.inner]
    parameters = list(_parameters(module, binder))
    chosen: list[tuple[Module, _Parameter, Layout]] | None = None
    for order in itertools.permutations(parameters, len(levels)):
        fits = [_layout(level, parameter, binder) for level, parameter in zip(levels, order, strict=True)]
        if all(fits):
            if chosen is not None:
                raise binder.error(f"which parameters of {shown(module.name)} the factors belong to cannot be told")
            chosen = [
                (level, parameter, layout)
                for level, parameter, layout in zip(levels, order, fits, strict=True)
                if layout is not None
            ]
    if chosen is None:
        shapes = ", ".join(f"{parameter.name} {list(parameter.shape)}" for parameter in parameters) or "none"
        raise binder.error(
            f"the factors of {shown(module.name)} fit no parameter of the base ({shapes})",
            hint="is this the right base model?",
        )
    return [patch for choice in chosen for patch in _patches(*choice, binder, scale_of)]


def _patches(
    level: Module, parameter: _Parameter, layout: Layout, binder: Binder, scale_of: ScaleOf
) -> Iterator[Patch]:
    only(Module(level.path, level.tensors), binder.config, {"lora_A", "lora_B"})
    pair = roles(level, binder.config, {"A": "lora_A", "B": "lora_B"}, (2, 2))
    experts = parameter.shape[0]
    rank = pair["A"].shape[0] // experts
    scale = scale_of(binder.config, f"{level.name}.{parameter.name}", rank)
    if parameter.stacked is not None:
        yield ExpertsPatch(
            target=parameter.stacked.name,
            source=parameter.stacked.name,
            out_shape=parameter.stacked.shape,
            factors=pair,
            scale=scale,
            rank=rank,
            experts=experts,
            layout=layout,
        )
    for expert, parts in enumerate(parameter.parts):
        start = 0
        for part in parts:
            yield ExpertSlicePatch(
                **onto(part),
                factors=pair,
                scale=scale,
                rank=rank,
                experts=experts,
                layout=layout,
                expert=expert,
                start=start,
            )
            start += part.shape[0]


def _layout(level: Module, parameter: _Parameter, binder: Binder) -> Layout | None:
    """How the axes of a parameter were read, or None where the factors do not fit it."""
    pair = roles(level, binder.config, {"A": "lora_A", "B": "lora_B"}, (2, 2))
    experts, first, second = parameter.shape
    down, up = pair["A"].shape, pair["B"].shape
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or down[0] % experts:
        return None
    out_in, in_out = (up[0], down[1]) == (first, second), (down[1], up[0]) == (first, second)
    if out_in and in_out:
        return _square_layout(level, parameter, binder)
    return "out_in" if out_in else "in_out" if in_out else None


def _square_layout(level: Module, parameter: _Parameter, binder: Binder) -> Layout:
    if parameter.stacked is not None and len(parameter.stacked.shape) == 2:
        return "out_in"
    version = binder.config.peft_version
    if version is None or version < (0, 19):
        return "in_out"
    model_type = (binder.base.config or {}).get("model_type")
    if model_type is None:
        raise binder.error(
            f"the experts of {shown(level.name)} are square, so their layout depends on the model, which the base"
            " does not name",
            hint="give the base with its config.json",
        )
    return "in_out" if model_type in _TRANSPOSED_MODELS else "out_in"


def _parameters(module: Module, binder: Binder) -> Iterator[_Parameter]:
    place = binder.names.find(module.name) or _expert_place(module.name, binder)
    if place is None:
        raise binder.names.unmatched([module.name])
    wanted = binder.config.names("target_parameters")
    found = False
    for name in binder.base.tensors:
        parent, _, leaf = name.rpartition(".")
        if parent != place or (wanted and not any(_ends(f"{module.name}.{leaf}", target) for target in wanted)):
            continue
        tensor = binder.tensor(name)
        if tensor is not None and len(tensor.shape) in (2, 3):
            found = True
            lead = tensor.shape if len(tensor.shape) == 3 else (1, *tensor.shape)
            yield _Parameter(leaf, (lead[0], lead[1], lead[2]), tensor)
    if not found:
        yield from _separate_parameters(place, binder)


def _separate_parameters(place: str, binder: Binder) -> Iterator[_Parameter]:
    table: dict[int, dict[str, str]] = {}
    pattern = re.compile(rf"{re.escape(place)}\.(\d+)\.(\w+)\.weight")
    for name in binder.base.tensors:
        match = pattern.fullmatch(name) if name.startswith(place) else None
        if match:
            table.setdefault(int(match[1]), {})[match[2]] = name
    if not table or sorted(table) != list(range(len(table))):
        return
    for parameter, halves in (("gate_up_proj", (_GATE, _UP)), ("down_proj", (_DOWN,))):
        parts = []
        for expert in range(len(table)):
            names = [next((table[expert][leaf] for leaf in half if leaf in table[expert]), None) for half in halves]
            tensors = [tensor for name in names if name is not None and (tensor := binder.tensor(name)) is not None]
            parts.append(tuple(tensors) if len(tensors) == len(halves) else ())
        if all(parts) and len({part[0].shape[1] for part in parts}) == 1:
            rows = sum(tensor.shape[0] for tensor in parts[0])
            yield _Parameter(parameter, (len(parts), rows, parts[0][0].shape[1]), None, tuple(parts))


def _expert_place(path: str, binder: Binder) -> str | None:
    """The base's module of separate experts, whose block may bear another name in the file than in the class:
    ``layers.0.mlp.experts`` for ``layers.0.block_sparse_moe.experts``."""
    parts = path.split(".")
    if parts[-1] != "experts" or len(parts) < 3:
        return None
    block = binder.names.find(".".join(parts[:-2]))
    if block is None:
        return None
    pattern = re.compile(rf"{re.escape(block)}\.\w+\.experts")
    found = [module for module in binder.names.modules if pattern.fullmatch(module)]
    return found[0] if len(found) == 1 else None


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
