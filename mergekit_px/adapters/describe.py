"""What an adapter holds, module by module: ranks, scales, norms, shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mergekit_px.adapters.adapter import Adapter
from mergekit_px.adapters.binder import BindOptions
from mergekit_px.adapters.lora_modules import LoraModule, LoraSource
from mergekit_px.errors import AdapterError


@dataclass(frozen=True)
class ModuleSummary:
    """One adapted module.

    Attributes:
        shapes: of its tensors, by parameter.
        rank, scale: of a LoRA; None for other kinds.
        norm: Frobenius norm of the update, its scale within; None where it depends on the base, or was not asked.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    rank: int | None = None
    scale: float | None = None
    norm: float | None = None


@dataclass(frozen=True)
class AdapterSummary:
    """An adapter at a glance.

    Attributes:
        parameters: numbers stored.
        whole: names of tensors that replace the base's.
        tokens: rows of embeddings that are replaced, by module.
        refusal: why it cannot be merged into a base; None where it can.
    """

    label: str
    kind: str
    base_model_name: str | None
    parameters: int
    modules: tuple[ModuleSummary, ...]
    whole: tuple[str, ...]
    tokens: Mapping[str, int]
    refusal: str | None


def describe_adapter(adapter: Adapter, options: BindOptions | None = None, *, norms: bool = True) -> AdapterSummary:
    """Summarise an adapter; with ``norms`` its factors are read, one module at a time, else headers only.

    Args:
        options: choices that its files leave open.
    """
    options = options or BindOptions()
    return AdapterSummary(
        label=adapter.label,
        kind=adapter.kind,
        base_model_name=adapter.base_model_name,
        parameters=sum(tensor.elements for tensor in adapter.checkpoint.tensors.values()),
        modules=tuple(_summaries(adapter, options, norms)),
        whole=tuple(adapter.keys.whole),
        tokens={path: rows.shape[0] for path, rows in adapter.keys.tokens.items() if rows.shape},
        refusal=_refusal(adapter, options),
    )


def _summaries(adapter: Adapter, options: BindOptions, norms: bool) -> list[ModuleSummary]:
    modules, _ = adapter.of_component(options.component)
    plain = [
        ModuleSummary(module.name, {role: tensor.shape for role, tensor in module.tensors.items()})
        for module in modules.values()
    ]
    try:
        source = LoraSource(adapter, options=options) if norms else None
    except AdapterError:
        return plain
    if source is None:
        return plain
    try:
        return [_measured(summary, source.load(key)) for summary, key in zip(plain, modules, strict=True)]
    except AdapterError:
        return plain
    finally:
        source.close()


def _measured(summary: ModuleSummary, module: LoraModule) -> ModuleSummary:
    from mergekit_px.kernels.low_rank import LowRank

    norm = None
    if module.magnitude is None:
        norm = LowRank.from_adapter(module.b.flatten(1).double(), module.a.flatten(1).double(), module.scale).norm()
    return ModuleSummary(summary.name, summary.shapes, module.rank, module.scale, norm)


def _refusal(adapter: Adapter, options: BindOptions) -> str | None:
    try:
        adapter.check(options)
    except AdapterError as error:
        return str(error)
    return None
