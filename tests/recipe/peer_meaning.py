"""Two evaluators that know nothing of each other: what a mergekit config means for each tensor, written from
mergekit's documentation and behaviour, and what a recipe means, written from the recipe format's.

Both give, for each output tensor, ``{"params": {...}, "sources": {model: (stored name, weight, density)}}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from mergekit_px.recipe.layer_range import parse_layers
from mergekit_px.recipe.model import Recipe, Step

LAYERS = 4
BEFORE = ["model.embed_tokens.weight"]
IN_LAYER = ["self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight"]
AFTER = ["model.norm.weight", "lm_head.weight"]

Meaning = dict[str, dict[str, Any]]


def layer_name(layer: int, suffix: str) -> str:
    return f"model.layers.{layer}.{suffix}"


def peer_meaning(config: Mapping[str, Any]) -> Meaning:
    """mergekit's meaning of a config for ``slerp`` or ``ties``."""
    base = config["base_model"]
    if "models" in config:
        sources = [{**entry, "layer_range": [0, LAYERS]} for entry in config["models"]]
        if all(entry["model"] != base for entry in sources):
            sources.append({"model": base, "layer_range": [0, LAYERS]})
        slices = [{"sources": sources}]
    else:
        slices = config["slices"]

    def value(piece: Any, source: Any, name: str, tensor: str, t: float, default: Any) -> Any:
        for holder in (source, piece, config):
            found = peer_setting((holder or {}).get("parameters", {}).get(name), tensor, t)
            if found is not None:
                return found
        return default

    def tensor(piece: Any, out: str, stored: Any, t: float) -> dict[str, Any]:
        merged = {}
        for source in piece["sources"]:
            if config["merge_method"] == "slerp":
                merged[source["model"]] = (stored(source), None, None)
            elif source["model"] != base:
                name = stored(source)
                weight = value(piece, source, "weight", name, t, None)
                merged[source["model"]] = (name, weight, value(piece, source, "density", name, t, 1.0))
        if config["merge_method"] == "slerp":
            return {"params": {"t": value(piece, None, "t", out, t, None)}, "sources": merged}
        return {"params": {"scale": value(piece, None, "lambda", out, t, 1.0)}, "sources": merged}

    meaning: Meaning = {name: tensor(slices[0], name, lambda source, name=name: name, 0.0) for name in BEFORE}
    number = 0
    for piece in slices:
        first, end = piece["sources"][0]["layer_range"]
        count = end - first
        for index in range(count):
            for suffix in IN_LAYER:
                out = layer_name(number, suffix)

                def stored(source: Any, index: int = index, suffix: str = suffix) -> str:
                    return layer_name(source["layer_range"][0] + index, suffix)

                meaning[out] = tensor(piece, out, stored, index / (count - 1) if count > 1 else 1.0)
            number += 1
    for name in AFTER:
        meaning[name] = tensor(slices[-1], name, lambda source, name=name: name, 0.0)
    return meaning


def peer_setting(setting: Any, tensor: str, t: float) -> float | None:
    if setting is None or isinstance(setting, (int, float)):
        return setting
    if isinstance(setting, dict):
        setting = [setting]
    if isinstance(setting[0], dict):
        for condition in setting:
            if condition.get("filter") in (None, "*") or condition["filter"] in tensor:
                return peer_setting(condition["value"], tensor, t)
        return None
    return between(setting, t)


def between(values: list[float], t: float) -> float:
    place = t * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return (1 - (place - low)) * values[low] + (place - low) * values[high]


def recipe_meaning(recipe: Recipe) -> Meaning:
    """The meaning of a recipe of one step over models of ``LAYERS`` layers; models go by their paths."""
    (step,) = recipe.steps.values()
    paths = {name: entry.model for name, entry in recipe.models.items()}
    meaning: Meaning = {}
    if step.slices is None:
        sources = [name for name in step.sources]
        weights = dict(step.sources) if isinstance(step.sources, dict) else dict.fromkeys(sources)
        for name in [*BEFORE, *(layer_name(n, s) for n in range(LAYERS) for s in IN_LAYER), *AFTER]:
            layer = int(name.split(".")[2]) if ".layers." in name else None
            depth = layer / (LAYERS - 1) if layer is not None else 0.0 if "embed" in name else 1.0
            stored = dict.fromkeys(sources, name)
            meaning[name] = resolve(step, step.params, weights, stored, step.rules, name, layer, depth, paths)
        return meaning

    def in_slice(number: int, name: str, layer: int | None, depth: float, index: int, suffix: str) -> None:
        assert step.slices is not None
        piece = step.slices[number]
        base = piece.base or step.base
        members = [source for source in piece.sources if source.model != base]
        params: dict[str, Any] = {**step.params, **piece.params}
        for source in members:
            for field, value in source.params.items():
                params[field] = {**params.get(field, {}), source.model: value}
        stored = {
            source.model: layer_name(parse_layers(source.layers).to_list(LAYERS)[index], suffix) if suffix else name
            for source in members
        }
        weights = {source.model: source.weight for source in members}
        rules = [*step.rules, *piece.rules]
        meaning[name] = resolve(step, params, weights, stored, rules, name, layer, depth, paths)

    for name in BEFORE:
        in_slice(0, name, None, 0.0, 0, "")
    out = 0
    for number, piece in enumerate(step.slices):
        count = len(parse_layers(piece.sources[0].layers).to_list(LAYERS))
        for index in range(count):
            for suffix in IN_LAYER:
                depth = index / (count - 1) if count > 1 else 1.0
                in_slice(number, layer_name(out, suffix), out, depth, index, suffix)
            out += 1
    for name in AFTER:
        in_slice(len(step.slices) - 1, name, None, 1.0, 0, "")
    return meaning


def resolve(
    step: Step,
    params: Mapping[str, Any],
    weights: Mapping[str, Any],
    stored: Mapping[str, str],
    rules: Any,
    name: str,
    layer: int | None,
    depth: float,
    paths: Mapping[str, Any],
) -> dict[str, Any]:
    params, weights = dict(params), dict(weights)
    for rule in rules:
        if rule.match is not None and not fnmatchcase(name, rule.match):
            continue
        if rule.layers is not None and not parse_layers(rule.layers).contains(layer):
            continue
        for field, value in rule.params.items():
            if isinstance(value, dict):
                old = params.get(field)
                value = {**(old if isinstance(old, dict) else dict.fromkeys(stored, old)), **value}
            params[field] = value
        weights.update(rule.weights or {})

    def at(value: Any) -> Any:
        return between(value, depth) if isinstance(value, list) else value

    densities = params.pop("density", 1.0)
    merged = {}
    for source, tensor in stored.items():
        density = densities[source] if isinstance(densities, dict) else densities
        slerp = step.method == "slerp"
        merged[paths[source]] = (tensor, None if slerp else at(weights[source]), None if slerp else at(density))
    given = {field: at(value) for field, value in params.items()}
    return {"params": given if step.method == "slerp" else {"scale": given.get("scale", 1.0)}, "sources": merged}
