"""The kinds of PEFT adapters: those that can be merged, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from mergekit_px.adapters import (
    hra,
    ia3,
    loha,
    lokr,
    lora,
    miss,
    oft,
    replaced,
    shira,
    vera,
)
from mergekit_px.adapters.binder import Binder, BindOptions
from mergekit_px.adapters.config import AdapterConfig
from mergekit_px.adapters.patch import Patch
from mergekit_px.adapters.peft_keys import Module
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.plug_ins import load_plug_ins


@dataclass(frozen=True)
class Family:
    """One kind of adapter.

    Attributes:
        parameters: the names of its factors in files.
        bind: the patches of one adapted module.
        check: refuses configurations that cannot be merged.
    """

    parameters: frozenset[str]
    bind: Callable[[Module, Binder], list[Patch]]
    check: Callable[[AdapterConfig, BindOptions], None] = lambda config, options: None


def _no_modules(module: Module, binder: Binder) -> list[Patch]:
    raise binder.error(f"{shown(module.keys[0])} has no meaning for {binder.config.kind}")


FAMILIES: dict[str, Family] = {
    "LORA": Family(lora.PARAMETERS, lora.bind, lora.check),
    "ADALORA": Family(lora.ADALORA_PARAMETERS, lora.bind_adalora),
    "LOHA": Family(loha.PARAMETERS, loha.bind),
    "LOKR": Family(lokr.PARAMETERS, lokr.bind),
    "IA3": Family(ia3.PARAMETERS, ia3.bind),
    "OFT": Family(oft.PARAMETERS, oft.bind, oft.check),
    "VERA": Family(vera.PARAMETERS, vera.bind),
    "HRA": Family(hra.PARAMETERS, hra.bind),
    "HIRA": Family(lora.HIRA_PARAMETERS, lora.bind_hira),
    "LN_TUNING": Family(replaced.PARAMETERS, replaced.bind),
    "SHIRA": Family(shira.PARAMETERS, shira.bind),
    "MISS": Family(miss.PARAMETERS, miss.bind),
    "TRAINABLE_TOKENS": Family(frozenset(), _no_modules),
}

_PROMPTS = "it adds learned tokens to the input of the model, not numbers to its weights"

REFUSED: dict[str, str] = {
    "PROMPT_TUNING": _PROMPTS,
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "PREFIX_TUNING": "it adds learned keys and values to the attention, not numbers to the weights",
    "CPT": _PROMPTS,
    "CARTRIDGE": "it adds learned keys and values to the attention, not numbers to the weights",
    "ADAPTION_PROMPT": "it adds gated attention to learned tokens, not numbers to the weights",
    "POLY": "which adapters act depends on the task at run time",
    "XLORA": "which adapters act depends on each token at run time",
    "SHADOW": "it runs a second network beside the model",
}


@cache
def families() -> Mapping[str, Family]:
    """The kinds that can be merged, by ``peft_type``: those above, and those of other packages.

    Other packages name a :class:`Family` under the entry-point group ``pxmerge.adapters``, by its ``peft_type``.
    """
    known = dict(FAMILIES)

    def take(name: str, loaded: object) -> None:
        if not isinstance(loaded, Family):
            raise TypeError("it is no Family")
        if name in known:
            raise ValueError("there is such a kind already")
        known[name] = loaded

    load_plug_ins("pxmerge.adapters", take)
    return known


def family(config: AdapterConfig) -> Family:
    """The family of a configuration. Raises AdapterError with the reason where it cannot be merged."""
    if config.kind in REFUSED:
        raise config.error(f"{config.kind} cannot be merged: {REFUSED[config.kind]}")
    known = families()
    if config.kind not in known:
        raise config.error(
            f"unknown peft_type {shown(config.kind)}; known are {', '.join(sorted(known))}",
            hint="let PEFT put it into its base (merge_and_unload), and give the model that it saves",
        )
    return known[config.kind]
