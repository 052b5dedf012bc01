"""The files of mergekit-moe: a mixture of experts of dense models."""

from __future__ import annotations

from collections.abc import Callable

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for
from mergekit_px.located.validate import shown
from mergekit_px.located.yaml_text import Node, mapping, sequence
from mergekit_px.recipe.mergekit.entries import IdleKeys, entries_of
from mergekit_px.recipe.mergekit.output import read_dtype
from mergekit_px.recipe.mergekit.references import Reference, read_reference

KEYS = ("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts", "architecture")
MARKS = frozenset({"experts", "gate_mode", "shared_experts", "experts_per_token"})
"""Keys that only files of mergekit-moe have."""

_EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
_RENAMED = (
    ("positive_prompts", "prompts"),
    ("negative_prompts", "negative_prompts"),
    ("noise_scale", "noise"),
    ("residual_scale", "scale"),
)
_FAMILIES = {"mixtral": "mixtral", "deepseek": "deepseek", "qwen": "qwen2_moe", "qwen3": "qwen3_moe"}
_ROUTERS: dict[str, dict[str, str | float]] = {
    "hidden": {"kind": "hidden", "pooling": "last"},
    "hidden_last": {"kind": "hidden", "pooling": "last"},
    "hidden_avg": {"kind": "hidden", "pooling": "mean"},
    "cheap_embed": {"kind": "embedding"},
    "random": {"kind": "random", "scale": 1.0},
    "uniform_random": {"kind": "uniform"},
}
_DIFFERENCES = {
    "hidden": "Prompts are read one by one in float32; mergekit reads them in bfloat16 and padded to one length, so "
    "that of shorter prompts it takes the states of padding.",
    "random": "Random rows and noise are other numbers than mergekit's, and the same on every run.",
}

Named = Callable[[Reference, Node], str]


def translate_mixture(root: Node, named: Named, idle: IdleKeys) -> tuple[Node, Node, list[str]]:
    """The step, the output and the differences in meaning of a file of mergekit-moe.

    Raises:
        RecipeError: the file is wrong.
    """
    entries = entries_of(root, "the config", KEYS, idle)
    for key in ("base_model", "experts"):
        if key not in entries:
            raise RecipeError(f"'{key}' is missing", where=str(root.place))
    base = Node(named(read_reference(entries["base_model"]), entries["base_model"]), entries["base_model"].place)
    experts = [_expert(entry, named, idle) for entry in _list(entries["experts"], "experts")]
    shared = (
        [_expert(entry, named, idle) for entry in _list(entries["shared_experts"], "shared_experts")]
        if ("shared_experts" in entries)
        else []
    )
    if len(shared) > 1:
        what = "more than one shared expert, which no kind of mixture has"
        raise RecipeError(what, where=str(entries["shared_experts"].place), hint="merge them in a step first")
    router, kind = _router(entries.get("gate_mode"), root)
    differences = [_DIFFERENCES["hidden" if kind == "hidden" else "random"]] if kind != "embedding" else []
    if shared and "architecture" not in entries:
        differences.append(
            "With a shared expert Llama models become qwen2_moe, which transformers loads; mergekit writes the first "
            "DeepSeek layout (`architecture: deepseek`)."
        )
    place = root.place
    mixture = mapping(
        place,
        {
            "family": _family(entries.get("architecture")),
            "experts": sequence(entries["experts"].place, experts),
            "shared": shared[0] if shared else None,
            "experts_per_token": entries.get("experts_per_token"),
            "router": router,
        },
    )
    step = {"method": Node("passthrough", place), "sources": sequence(place, [base]), "mixture": mixture}
    return mapping(place, {**step}), mapping(place, {"dtype": read_dtype(entries.get("dtype"), "dtype")}), differences


def _list(node: Node, key: str) -> list[Node]:
    if not isinstance(node.value, list) or not node.value:
        raise RecipeError(f"'{key}' must be a list of experts, not {shown(node.data())}", where=str(node.place))
    return node.value


def _expert(node: Node, named: Named, idle: IdleKeys) -> Node:
    entries = entries_of(node, "an expert", _EXPERT_KEYS, idle)
    if "source_model" not in entries:
        raise RecipeError("'source_model' is missing", where=str(node.place))
    source = entries["source_model"]
    found: dict[str, Node | None] = {"model": Node(named(read_reference(source), source), source.place)}
    found |= {own: entries[theirs] for theirs, own in _RENAMED if theirs in entries}
    return mapping(node.place, found)


def _router(node: Node | None, root: Node) -> tuple[Node, str]:
    name = "hidden" if node is None else node.value
    place = root.place if node is None else node.place
    if not isinstance(name, str) or name not in _ROUTERS:
        hint = hint_for(name, list(_ROUTERS)) if isinstance(name, str) else None
        raise RecipeError(f"'gate_mode' cannot be {shown(name)}", where=str(place), hint=hint)
    parts: dict[str, Node | None] = {key: Node(value, place) for key, value in _ROUTERS[name].items()}
    return mapping(place, parts), str(_ROUTERS[name]["kind"])


def _family(node: Node | None) -> Node | None:
    if node is None:
        return None
    name = node.value.lower() if isinstance(node.value, str) else None
    if name not in _FAMILIES:
        hint = hint_for(name, list(_FAMILIES)) if name is not None else None
        raise RecipeError(f"'architecture' cannot be {shown(node.data())}", where=str(node.place), hint=hint)
    return Node(_FAMILIES[name], node.place)
