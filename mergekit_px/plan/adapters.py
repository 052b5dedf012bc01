"""Adapters in expressions: models with adapters on top, and adapters alone as task vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mergekit_px.errors import PlanError
from mergekit_px.plan.nodes import Adapted, Kind, Node, Read

if TYPE_CHECKING:
    from mergekit_px.adapters.adapter import Binding
    from mergekit_px.adapters.patch import Patch
    from mergekit_px.checkpoint.contents import Checkpoint
    from mergekit_px.plan.inputs import ResolvedInput


@dataclass(slots=True)
class AdaptedModel:
    """A model with its adapters applied.

    Attributes:
        nodes: its tensors, by name.
        config_updates: what the adapters change in its config; None where they leave it as it is.
        notes: what was decided, for people.
    """

    nodes: dict[str, Node]
    config_updates: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def adapted_model(source: ResolvedInput, stored: Mapping[str, Node], checkpoint: Checkpoint) -> AdaptedModel:
    """The tensors of a model with its adapters applied in order.

    Args:
        stored: the tensors of the model itself.
        checkpoint: where names and shapes of these are read from.

    Raises:
        AdapterError: an adapter does not fit the model.
    """
    from mergekit_px.adapters.patch import KeepPatch

    model = AdaptedModel(dict(stored))
    nodes = model.nodes
    for number, adapter in enumerate(source.adapters):
        binding = adapter.bind(checkpoint, source.bind_options)
        # A head that is untied is made of the embedding as it was before this adapter.
        before = dict(nodes)
        still_tied: list[str] = []
        for target, patch in binding.items():
            # An earlier adapter has untied this head already; the embedding may have changed since.
            if isinstance(patch, KeepPatch) and target in nodes:
                continue
            if isinstance(patch, KeepPatch) and _resizes(binding.get(patch.source or ""), patch.out_shape):
                still_tied.append(target)
                continue
            nodes[target] = _patched(source.name, number, patch, before)
        if binding.config_updates:
            updates = dict(binding.config_updates)
            if still_tied:
                parts = (updates, updates.get("text_config", {}))
                for part in parts:
                    part.pop("tie_word_embeddings", None)
                model.notes.append(
                    f"{adapter.label}: it resizes the embedding and holds nothing for the head that is tied to it; "
                    f"{still_tied[0]} stays tied, so the head changes with the embedding"
                )
            model.config_updates = updates
        model.notes += _told(adapter.label, binding)
    return model


def adapter_changes(
    source: ResolvedInput, model: Mapping[str, Node] | None, checkpoint: Checkpoint | None
) -> AdaptedModel:
    """An adapter alone: its change of every tensor of the base, zero where it changes nothing.

    Args:
        model: the tensors of the base; None where there is no base model to read names and shapes from.
        checkpoint: where the base's are read from.

    Raises:
        PlanError: there is no base model, or the adapter is no task vector of it.
        AdapterError: the adapter does not fit the base.
    """
    if model is None or checkpoint is None:
        raise PlanError(
            f"adapter '{source.name}' needs a base model, not a step or nothing",
            where=source.reference,
            hint="give the model that it was trained on as base",
        )
    binding = source.adapters[0].bind(checkpoint, source.bind_options)
    changes: dict[str, Node] = {}
    for name, node in model.items():
        patch = binding.get(name)
        if not node.dtype.arithmetic:
            continue
        if patch is not None and patch.out_shape != node.shape:
            raise PlanError(
                f"the adapter resizes '{name}' from {list(node.shape)} to {list(patch.out_shape)}, "
                "so it is no task vector",
                where=source.reference,
                hint="give it as {model: ..., adapter: ...}",
            )
        changes[name] = Adapted(source.name, 0, patch, node, "delta", node.shape, node.dtype)
    if new := [name for name in binding if name not in model]:
        raise PlanError(
            f"the adapter adds '{new[0]}', which the base does not have, so it is no task vector",
            where=source.reference,
            hint="give it as {model: ..., adapter: ...}",
        )
    return AdaptedModel(changes, notes=_told(source.adapters[0].label, binding))


def _told(adapter: str, binding: Binding) -> list[str]:
    """What binding an adapter decided, one sentence for all tensors alike, of which there may be hundreds."""
    notes = []
    if names := binding.left_out:
        many = f"{len(names)} tensors belong to another component and are left out, {names[0]} among them"
        notes.append(f"{names[0]} belongs to another component and is left out" if len(names) == 1 else many)
    if names := binding.unfilled:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        notes.append(
            f"'target_modules' names {names[0]}{more}, and the file has nothing for {'them' if more else 'it'}"
        )
    return [f"{adapter}: {note}" for note in notes]


def as_kind(node: Node | None, kind: Kind, name: str) -> Node | None:
    """An adapter alone as its method wants it: as its change, or as the base with the change."""
    if kind == "weights" and isinstance(node, Adapted) and node.kind == "delta":
        return node.base if node.patch is None else replace(node, kind="weights")
    return node


def is_unchanged(node: Node | None) -> bool:
    """Whether a value is the zero change of an adapter."""
    return isinstance(node, Adapted) and node.patch is None


def _resizes(patch: Patch | None, shape: tuple[int, ...]) -> bool:
    return patch is not None and patch.out_shape[0] != shape[0]


def _patched(source: str, number: int, patch: Patch, nodes: Mapping[str, Node]) -> Node:
    known = nodes.get(patch.target)
    # An earlier adapter may have given the head that is made of the embedding a tensor of its own.
    base = None if patch.source is None else known or nodes[patch.source]
    if patch.copied is not None:
        stored = patch.copied
        if patch.out_dtype is not None or known is None:
            return Read(f"{source}#{number}", stored, patch.out_shape, "weights")
    dtype = patch.out_dtype or (known or base or _no_dtype(patch)).dtype
    return Adapted(source, number, patch, base, "weights", patch.out_shape, dtype)


def _no_dtype(patch: Patch) -> Node:
    raise PlanError(f"an adapter adds '{patch.target}' and says nothing of its dtype")
