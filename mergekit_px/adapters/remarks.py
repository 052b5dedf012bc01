"""What a user should be told of an adapter before it is used: nothing is wrong with its file, and yet."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from mergekit_px.adapters.adapter import Adapter
from mergekit_px.adapters.lora import pattern_path
from mergekit_px.adapters.peft_keys import Module
from mergekit_px.adapters.targets import untargeted
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.reader import TensorReader, open_reader
from mergekit_px.checkpoint.whole import read_bytes

_FACTORS = frozenset(
    {"lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B", "A", "B", "mid", "vera_lambda_b"}
    | {"vera_lambda_d", "hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B", "miss_block", "shira_weight"}
    | {f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
    | {f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
    | {"oft_R", "oft_embedding_R", "oft_blocks", "diff", "diff_b", "w_norm", "b_norm"}
)
"""Tensors of which any that is zero makes the change of its module zero; no other tensor adds to it."""

_WITHOUT_CHANGE = frozenset({"alpha", "shira_indices", "ranknum"})

_ALPHAS = {"LORA": "lora_alpha", "ADALORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
"""Fields that scale all updates. In the formats without a configuration an alpha of zero means one."""


def remarks(adapter: Adapter) -> list[str]:
    """One sentence for each remark."""
    found = []
    if names := untargeted(adapter.config, adapter.keys.modules):
        found.append(
            f"{adapter.label}: 'target_modules' does not name {_listed(names)}; all that is in the file is applied,"
            " where PEFT would pass over these"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        if idle := _idle_keys(adapter, field):
            found.append(f"{adapter.label}: {_listed(idle)} in '{field}' fits no module of the file")
    if changes_nothing(adapter):
        found.append(f"{adapter.label}: it changes nothing, for each of its updates is zero; is it a trained adapter?")
    return found


def changes_nothing(adapter: Adapter) -> bool:
    """Whether every update is zero, by its scale or by its factors. They are read up to the first that is not."""
    modules = [module for outer in adapter.keys.modules.values() for module in (outer, *outer.inner) if module.path]
    if adapter.keys.whole or adapter.keys.tokens or not modules:
        return False
    with closing(open_reader(adapter.checkpoint)) as reader:
        return all(_is_zero(module, adapter, reader) for module in modules)


def _idle_keys(adapter: Adapter, field: str) -> list[str]:
    """The keys of a pattern that no module takes a value from."""
    table, paths = adapter.config.values.get(field), [pattern_path(each) for each in adapter.keys.modules.values()]
    if not isinstance(table, dict) or adapter.config.names("target_parameters"):
        return []
    alone = [(key, replace(adapter.config, values={field: {key: value}})) for key, value in table.items()]
    return [key for key, config in alone if all(config.pattern(field, path) is None for path in paths)]


def _is_zero(module: Module, adapter: Adapter, reader: TensorReader) -> bool:
    if not set(module.tensors) <= _FACTORS | _WITHOUT_CHANGE:
        return False
    field = _ALPHAS.get(adapter.kind)
    if field is not None:
        alpha = adapter.config.pattern("alpha_pattern", pattern_path(module))
        if (adapter.config.number(field, 8) if alpha is None else alpha) == 0:
            return True
    factors = sorted(set(module.tensors) & _FACTORS, key=lambda role: ("A" in role, role))
    return any(_all_zero(module, role, reader) for role in factors)


def _all_zero(module: Module, role: str, reader: TensorReader) -> bool:
    import numpy as np

    stored = module.tensors[role]
    if stored.dtype.bits < 8:
        return False
    words = np.frombuffer(read_bytes(reader, stored), dtype=f"u{stored.dtype.bits // 8}")
    return not (words << 1).any()  # without the sign: of zeros there are two


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(map(shown, names[:2])) + more
