"""Layers stacked anew: which tensors of which sources make each tensor of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import PlanError, RecipeError, TensorMismatchError
from mergekit_px.plan.config import layer_count, layer_kinds
from mergekit_px.plan.layers import is_embedding, position, split_layer, stack_sizes
from mergekit_px.plan.slots import Namespaces, Slot
from mergekit_px.plan.tied import is_head, tied_source
from mergekit_px.recipe.layer_range import parse_layers
from mergekit_px.recipe.model import Slice, Step, Value

_OTHER_STACKS = ("vision", "visual", "image", "audio", "mtp")


@dataclass(frozen=True, slots=True)
class Stacked:
    """The layers of a step with slices.

    Attributes:
        slots: embeddings first, then the layers, then the rest.
        layer_sources: for each output layer, its (source, layer) pairs.
        untied: heads that some sources tie to the embedding and that are written on their own.
    """

    slots: list[Slot]
    layer_sources: list[list[tuple[str, int]]]
    untied: list[str]


def slice_slots(step_name: str, step: Step, namespaces: Namespaces) -> Stacked:
    """The slots of a step with slices.

    Tensors outside the layers are made as in the first slice (embeddings, other stacks) or the last (everything else).

    Raises:
        PlanError, RecipeError: layers that a source does not have, or sources that cannot be stacked.
    """
    assert step.slices is not None
    where = namespaces.loaded.where("steps", step_name, "slices")
    if step.sources:
        raise RecipeError("a step has either sources or slices", where=where)
    if not step.slices:
        raise RecipeError("slices is empty", where=where)
    layers: list[Slot] = []
    sources_of_layers: list[list[tuple[str, int]]] = []
    for part, piece in enumerate(step.slices):
        here = namespaces.loaded.where("steps", step_name, "slices", part)
        stacked = [_stack(source.model, namespaces, here, step.stack) for source in piece.sources]
        numbers = []
        for source, (_, count) in zip(piece.sources, stacked, strict=True):
            chosen = parse_layers(source.layers).to_list(count)
            if source.layers != "none" and (not chosen or chosen[-1] >= count or chosen[0] < 0):
                raise PlanError(
                    f"layers {source.layers} of '{source.model}', which has {count} (0-{count - 1})", where=here
                )
            numbers.append(chosen)
        if len({len(chosen) for chosen in numbers}) > 1:
            counts = ", ".join(f"'{s.model}' {len(n)}" for s, n in zip(piece.sources, numbers, strict=True))
            raise PlanError(f"the sources of one slice must have as many layers each: {counts}", where=here)
        for index in range(len(numbers[0])):
            place = position(index, len(numbers[0]))
            own = [
                (source.model, stack, chosen[index])
                for source, (stack, _), chosen in zip(piece.sources, stacked, numbers, strict=True)
            ]
            sources_of_layers.append([origin for entry in own for origin in _origins(*entry, namespaces)])
            layers.extend(_layer_slots(step, piece, part, own, len(sources_of_layers) - 1, place, namespaces))
    if not sources_of_layers:
        raise PlanError("the slices have no layers at all", where=where)
    _refuse_other_names(layers, where)
    models = dict.fromkeys(model for own in sources_of_layers for model, _ in own)
    _refuse_other_sizes(models, step, where, namespaces)
    if step.stack:
        for model in models:
            _refuse_moved(sources_of_layers, _stack(model, namespaces, where, step.stack)[1], model, where)
    else:
        _refuse_shared_embedding(sources_of_layers, where, namespaces)
        for model in models:
            _refuse_moved_ends(model, sources_of_layers, where, namespaces)
    heads = _heads_apart(step, namespaces)
    before = _outside(step, 0, True, (), where, namespaces)
    after = _outside(step, len(step.slices) - 1, False, tuple(heads), where, namespaces)
    return Stacked([*before, *layers, *after], sources_of_layers, [head for head, stored in heads.items() if stored])


def _origins(model: str, stack: str, layer: int, namespaces: Namespaces) -> list[tuple[str, int]]:
    """Where a source's layer comes from: through a step that is itself made of slices, the layers of its sources."""
    inner = namespaces.layer_sources.get(model)
    return [(model, layer)] if inner is None else inner[layer]


def _stack(model: str, namespaces: Namespaces, where: str, within: Sequence[str] = ()) -> tuple[str, int]:
    """The stack of layers that slices of a model speak of, and its number of layers.

    A model may have stacks beside it (a vision tower, layers that predict further tokens), and layers after those
    that its config counts: none of these are stacked.

    Args:
        within: globs that name another stack.
    """
    sizes = stack_sizes(namespaces.namespace(model))
    if within:
        named = [stack for stack in sizes if any(fnmatchcase(f"{stack}0", glob) for glob in within)]
        if len(named) != 1:
            found = ", ".join(f"{stack}*" for stack in named or sizes) or "none"
            raise PlanError(f"'{' or '.join(within)}' names {len(named)} stacks of '{model}': {found}", where=where)
        return named[0], sizes[named[0]]
    source = namespaces.inputs.get(model)
    config = source.config if source is not None and source.config is not None else {}
    count = layer_count(config)
    counted = {stack for stack, size in sizes.items() if count in (size, size - _predicted_layers(config))}
    fitting = list(counted or sizes)
    if len(fitting) > 1:
        fitting = [stack for stack in fitting if not any(mark in stack for mark in _OTHER_STACKS)]
    if len(fitting) != 1 or (len(sizes) > 1 and not counted):
        found = ", ".join(f"{stack}* ({size})" for stack, size in sizes.items()) or "none"
        raise PlanError(f"slices need a model with one stack of layers; '{model}' has {found}", where=where)
    stack = fitting[0]
    return stack, count if count is not None and stack in counted else sizes[stack]


def _refuse_other_sizes(models: Iterable[str], step: Step, where: str, namespaces: Namespaces) -> None:
    """Layers of several models have one config in the result, so they are of one size.

    Sizes that change from layer to layer within a model are its config's own affair.
    """
    known: dict[str, tuple[str, tuple[int, ...]]] = {}
    for model in models:
        namespace = namespaces.namespace(model)
        stack, count = _stack(model, namespaces, where, step.stack)
        shapes: dict[str, set[tuple[int, ...]]] = {}
        for name, node in namespace.items():
            found = split_layer(name)
            if found is not None and found.stack == stack and found.layer < count:
                shapes.setdefault(found.suffix, set()).add(node.shape)
        for suffix, own in shapes.items():
            shape = next(iter(own))
            other, theirs = known.setdefault(suffix, (model, shape)) if len(own) == 1 else (model, shape)
            if theirs != shape:
                raise TensorMismatchError(
                    f"'{suffix[1:]}' is {list(theirs)} in the layers of '{other}' and {list(shape)} in those of "
                    f"'{model}', and one model has layers of one size",
                    where=where,
                    hint="stack models of one architecture and width",
                )


def _refuse_other_names(layers: Iterable[Slot], where: str) -> None:
    """All layers of a model have one name but for their number."""
    first: dict[str, Slot] = {}
    for slot in layers:
        found = split_layer(slot.name)
        first.setdefault(found.stack if found is not None else "", slot)
    if len(first) > 1:
        one, other, *_ = first.values()
        raise PlanError(
            f"layers are called {shown(one.name)} in '{one.models[0]}' and {shown(other.name)} in '{other.models[0]}'",
            where=where,
            hint="give one of the models the names of the other by 'rename'",
        )


def _refuse_moved(layers: list[list[tuple[str, int]]], count: int, model: str, where: str) -> None:
    """Layers of a stack that the config does not follow stay where they are, and as many."""
    moved = next((place for place, own in enumerate(layers) if any(layer != place for _, layer in own)), None)
    if moved is not None or len(layers) != count:
        what = f"layer {moved} comes from another place" if moved is not None else f"{len(layers)} layers of {count}"
        raise PlanError(f"{what}, and layers of this stack of '{model}' keep their places", where=where)


def _refuse_shared_embedding(layers: list[list[tuple[str, int]]], where: str, namespaces: Namespaces) -> None:
    """Some models have one embedding with columns for every layer; it cannot follow layers that move."""
    moved = [model for place, own in enumerate(layers) for model, layer in own if layer != place]
    for model in dict.fromkeys(name for own in layers for name, _ in own):
        names = namespaces.namespace(model)
        shared = next((name for name in names if split_layer(name) is None and "embed_tokens_per_layer" in name), None)
        if shared is not None and (moved or len(layers) != _stack(model, namespaces, where)[1]):
            raise PlanError(f"'{shared}' of '{model}' has columns for every layer, so layers cannot move", where=where)


def _refuse_moved_ends(model: str, layers: list[list[tuple[str, int]]], where: str, namespaces: Namespaces) -> None:
    """The first or last layer of some models has tensors of its own because of its place, and can have no other.

    It does if it stores other tensors than layers that are equal to it in all that the config says.
    """
    source = namespaces.inputs.get(model)
    if source is None or source.config is None or layer_count(source.config) is None:
        return
    stack, count = _stack(model, namespaces, where)
    stored: list[set[str]] = [set() for _ in range(count)]
    for name in namespaces.namespace(model):
        found = split_layer(name)
        if found is not None and found.stack == stack and found.layer < count:
            stored[found.layer].add(found.suffix)
    if all(names == stored[0] for names in stored):
        return
    kinds = layer_kinds(source.config, count)
    for end, place, word in ((0, 0, "first"), (count - 1, len(layers) - 1, "last")):
        alike = [names for layer, names in enumerate(stored) if layer != end and kinds[layer] == kinds[end]]
        if not alike or any(names != alike[0] for names in alike) or alike[0] == stored[end]:
            continue
        wrong = [at for at, own in enumerate(layers) for origin in own if origin[0] == model]
        wrong = [at for at in wrong if ((model, end) in layers[at]) != (at == place)]
        if wrong:
            suffix = min(stored[end] ^ alike[0])
            raise PlanError(
                f"the {word} layer of '{model}' differs from the others by '{suffix[1:]}', so it must stay the {word}",
                where=where,
            )


def _predicted_layers(config: Mapping[str, Any]) -> int:
    number = config.get("num_nextn_predict_layers")
    return number if isinstance(number, int) else 0


def _stands_before(name: str, stack: str, alone: bool) -> bool:
    """Whether a tensor outside the stack is made as in the first slice: embeddings, and all other stacks."""
    if alone:
        return is_embedding(name)
    home = stack[: stack.rstrip(".").rfind(".") + 1]
    if split_layer(name) is None and name.startswith(home):
        return is_embedding(name)
    return not is_head(name)


def _layer_slots(
    step: Step,
    piece: Slice,
    part: int,
    own: list[tuple[str, str, int]],
    layer: int,
    place: float,
    namespaces: Namespaces,
) -> list[Slot]:
    base_model = piece.base or step.base
    base_place = next((entry for entry in own if entry[0] == base_model), own[0])
    base_prefix = f"{base_place[1]}{base_place[2]}"
    members_and_base = [*own, (base_model, *base_place[1:])] if base_model is not None else own
    names: dict[str, None] = {}
    for model, stack, number in members_and_base:
        for name in namespaces.namespace(model):
            found = split_layer(name)
            if found is not None and found.stack == stack and found.layer == number:
                names[found.suffix] = None
    members = [(model, stack, number) for model, stack, number in own if model != base_model]
    params, weights = _values(step, piece, base_model)
    return [
        Slot(
            name=f"{own[0][1]}{layer}{suffix}",
            sources=tuple((model, f"{stack}{number}{suffix}") for model, stack, number in members),
            base=(base_model, f"{base_prefix}{suffix}") if base_model is not None else None,
            params=params,
            weights=weights,
            rules=(*step.rules, *piece.rules),
            position=place,
            part=part,
        )
        for suffix in names
    ]


def _outside(
    step: Step, part: int, before: bool, heads: tuple[str, ...], where: str, namespaces: Namespaces
) -> list[Slot]:
    assert step.slices is not None
    piece = step.slices[part]
    base_model = piece.base or step.base
    members = [source.model for source in piece.sources if source.model != base_model]
    names: dict[str, None] = {}
    for model in ([base_model] if base_model is not None else []) + members:
        namespace = namespaces.namespace(model)
        stack, _ = _stack(model, namespaces, where, step.stack)
        alone = len(stack_sizes(namespace)) == 1
        for name in namespace:
            found = split_layer(name)
            if (found is None or found.stack != stack) and _stands_before(name, stack, alone) == before:
                names[name] = None
    names.update(dict.fromkeys(heads))
    params, weights = _values(step, piece, base_model)
    return [
        Slot(
            name=name,
            sources=tuple((model, name) for model in members),
            base=(base_model, name) if base_model is not None else None,
            params=params,
            weights=weights,
            rules=(*step.rules, *piece.rules),
            position=0.0 if before else 1.0,
            part=part,
        )
        for name in names
    ]


def _heads_apart(step: Step, namespaces: Namespaces) -> dict[str, bool]:
    """Heads that some sources tie to the embedding and others store, and whether one of the last slice stores it.

    They stand on their own, and the config must say so: the embedding is that of the first slice, the head that of
    the last.
    """
    assert step.slices is not None
    pieces = [_models(step, piece) for piece in step.slices]
    members = dict.fromkeys(model for piece in pieces for model in piece)
    heads = dict.fromkeys(name for model in members for name in namespaces.namespace(model) if is_head(name))
    apart = {}
    for head in heads:
        tying = {m for m in members if m in namespaces.inputs and tied_source(head, namespaces.inputs[m])}
        storing = {model for model in pieces[-1] if head in namespaces.namespace(model)}
        stays_tied = set(pieces[0]) == set(pieces[-1]) and not storing
        if tying and not stays_tied and (storing or tying & set(pieces[-1])):
            apart[head] = bool(storing)
    return apart


def stacked_models(step: Step) -> list[str]:
    """The models and steps that a step with slices is made of, that of the first layers first."""
    pieces = step.slices or []
    sources = [source.model for piece in pieces for source in piece.sources]
    bases = [base for base in (step.base, *(piece.base for piece in pieces)) if base is not None]
    return list(dict.fromkeys([*sources, *bases]))


def _models(step: Step, piece: Slice) -> list[str]:
    base = piece.base or step.base
    return [*([base] if base is not None else []), *(source.model for source in piece.sources)]


def _values(step: Step, piece: Slice, base: str | None) -> tuple[dict[str, Value], tuple[Value, ...]]:
    """The parameters of a slice and the weights of its sources (the base has none)."""
    params: dict[str, Value] = {**step.params, **piece.params}
    members = [source for source in piece.sources if source.model != base]
    for name in {key for source in members for key in source.params}:
        shared = params.get(name)
        params[name] = {
            source.model: source.params.get(name, shared.get(source.model) if isinstance(shared, Mapping) else shared)
            for source in members
        }
    return params, tuple(source.weight for source in members)
