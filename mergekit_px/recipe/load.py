"""From a file, a text or Python data to a checked recipe, in pxmerge's own form or in mergekit's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_px.errors import RecipeError
from mergekit_px.located.overrides import apply_overrides
from mergekit_px.located.places import Places
from mergekit_px.located.validate import shown, validate, wanted
from mergekit_px.located.yaml_text import Node, mapping, node_of, parse_documents, read_text, sequence
from mergekit_px.python_values import check_kind, given_path
from mergekit_px.recipe.catalog import MethodCatalog
from mergekit_px.recipe.check import check_recipe
from mergekit_px.recipe.dump import dump_recipe
from mergekit_px.recipe.loaded import Dialect, LoadedRecipe
from mergekit_px.recipe.model import Recipe

_MERGEKIT_KEYS = frozenset(
    {"merge_method", "slices", "modules", "base_model", "experts", "gate_mode", "tokenizer_source", "out_dtype"}
)
_OWN_KEYS = frozenset({"pxmerge", "steps", "merge"})
_OTHER_PROGRAMS = {
    "genome": (
        "a genome of mergekit-evolve",
        "`pxmerge search` takes a config that merges, and what is searched by --over KEY=LOW:HIGH",
    ),
    "layer_slices": ("a config of bakllama", "write a merge_method: passthrough with slices"),
}
"""Keys that only files of mergekit's other programs have -> what the file is, and what serves instead."""

_AFTER_TRANSLATION = ("output", "seed", "steps", "tokenizer.from", "tokenizer.base")
"""First keys of overrides that a mergekit config has no place for; they change its translation."""


def load_recipe(
    path: str | Path, *, overrides: Sequence[str] = (), methods: MethodCatalog | None = None
) -> LoadedRecipe:
    """Read a recipe file of either dialect. Paths of models in it are relative to the current directory.

    Args:
        path: the file.
        overrides: ``key=value`` changes, see :mod:`mergekit_px.located.overrides`.
        methods: the merge methods; without them their names and parameters are not checked.

    Raises:
        RecipeError: there is no such file, or it holds no recipe that can be meant.
    """
    path = Path(given_path(path, "a recipe", "run_recipe and plan_recipe take a mapping too"))
    return parse_recipe(read_text(path, "recipe"), name=str(path), overrides=overrides, methods=methods, path=path)


def parse_recipe(
    text: str,
    *,
    name: str = "recipe",
    overrides: Sequence[str] = (),
    methods: MethodCatalog | None = None,
    path: Path | None = None,
) -> LoadedRecipe:
    """Read a recipe from text; ``name`` begins the places of errors. See :func:`load_recipe`.

    Raises:
        RecipeError: it is no recipe that can be meant.
    """
    check_kind("a recipe", text, str, "a text")
    roots = [root for root in parse_documents(text, name) if root.value is not None]
    if not roots:
        raise RecipeError("the recipe is empty", where=name)
    return replace(_build(roots, text, overrides, methods), path=path)


def recipe_from_mapping(
    data: Mapping[str, Any],
    methods: MethodCatalog | None = None,
    *,
    name: str = "recipe",
    overrides: Sequence[str] = (),
) -> LoadedRecipe:
    """A recipe from Python data of the same form as the YAML. See :func:`load_recipe`.

    Raises:
        RecipeError: it is no recipe that can be meant.
    """
    return _build([node_of(data, name)], None, overrides, methods)


def _build(
    roots: Sequence[Node], text: str | None, overrides: Sequence[str], methods: MethodCatalog | None
) -> LoadedRecipe:
    root = roots[0]
    dialects: list[Dialect] = []
    for document in roots:
        if not isinstance(document.value, dict):
            raise RecipeError("a recipe is a mapping with models and steps", where=str(document.place))
        for key in _OTHER_PROGRAMS.keys() & document.value.keys():
            what, hint = _OTHER_PROGRAMS[key]
            raise RecipeError(f"this is {what}", where=str(document.keys[key]), hint=hint)
        dialects.append("mergekit" if _is_mergekit(document.value) else "pxmerge")
    dialect = dialects[0]
    if len(roots) > 1 and "pxmerge" in dialects:
        raise RecipeError(
            "a recipe is one document, and another one begins here",
            where=str(roots[1].place),
            hint="give it several steps; only mergekit's configs may be several documents",
        )
    differences: tuple[str, ...] = ()
    idle: tuple[tuple[str, str], ...] = ()
    if dialect == "mergekit":
        from mergekit_px.recipe.mergekit.translate import translate

        # Of several documents an override cannot say which it means, but each is a step of the translation.
        several = len(roots) > 1
        later = [override for override in overrides if several or override.strip().startswith(_AFTER_TRANSLATION)]
        earlier = [override for override in overrides if override not in later]
        translation = translate([apply_overrides(document, earlier) for document in roots])
        root = apply_overrides(translation.recipe, later)
        differences = tuple(translation.differences)
        idle = tuple((sentence, str(place)) for sentence, place in translation.idle.items())
    else:
        root = _written_out(apply_overrides(root, overrides))
    places = Places(root)
    if isinstance(version := root.data().get("pxmerge"), (bool, float)):  # equal to 1 for Python and for pydantic
        what = f"'pxmerge' must be {wanted(Recipe, 'pxmerge').words}, not {shown(version)}"
        raise RecipeError(what, where=places.value(("pxmerge",)))
    recipe = validate(Recipe, root.data(), places, "the recipe")
    check_recipe(recipe, places, methods)
    if text is None:
        text = dump_recipe(recipe)
    elif overrides:
        notes = "".join(f"# --set {' '.join(override.split())}\n" for override in overrides)
        text = f"{notes}{dump_recipe(recipe)}"
    return LoadedRecipe(recipe, text, None, differences, idle, dialect, places)


def _written_out(root: Node) -> Node:
    """The tree with its short forms written out: ``merge:`` for one step, a path for a model, a model for a token."""
    assert isinstance(root.value, dict)
    entries: dict[str, Node | None] = dict(root.value)
    keys = dict(root.keys)
    if (step := entries.pop("merge", None)) is not None:
        if "steps" in entries:
            raise RecipeError("a recipe has either merge or steps", where=str(root.keys["merge"]))
        entries["steps"] = mapping(root.keys["merge"], {"merge": step}, {"merge": root.keys["merge"]})
        keys["steps"] = root.keys["merge"]
    entries["models"] = _with_models_written_out(entries.get("models"))
    entries["steps"] = _with_mixtures_written_out(entries.get("steps"))
    tokenizer = entries.get("tokenizer")
    if tokenizer is not None and isinstance(tokenizer.value, dict):
        section = {**tokenizer.value, "tokens": _with_models_written_out(tokenizer.value.get("tokens"))}
        entries["tokenizer"] = mapping(tokenizer.place, section, tokenizer.keys)
    return mapping(root.place, entries, keys)


def _with_models_written_out(entries: Node | None) -> Node | None:
    """Entries of which text alone stands for ``{model: text}``."""
    if entries is None or not isinstance(entries.value, dict):
        return entries
    written: dict[str, Node | None] = {name: _under("model", entry) for name, entry in entries.value.items()}
    return mapping(entries.place, written, entries.keys)


def _under(key: str, entry: Node) -> Node:
    """An entry, where it is text alone as the mapping that it stands for."""
    return mapping(entry.place, {key: entry}) if isinstance(entry.value, str) else entry


def _with_mixtures_written_out(steps: Node | None) -> Node | None:
    """Steps with the short forms of their mixtures written out: a model for an expert, a kind for a router."""
    if steps is None or not isinstance(steps.value, dict):
        return steps
    written: dict[str, Node | None] = {}
    for name, step in steps.value.items():
        mixture = step.value.get("mixture") if isinstance(step.value, dict) else None
        if mixture is not None and isinstance(step.value, dict) and isinstance(mixture.value, dict):
            parts: dict[str, Node | None] = dict(mixture.value)
            experts = mixture.value.get("experts")
            if experts is not None and isinstance(experts.value, list):
                parts["experts"] = sequence(experts.place, [_under("model", entry) for entry in experts.value])
            for key, inner in (("shared", "model"), ("router", "kind")):
                if key in mixture.value:
                    parts[key] = _under(inner, mixture.value[key])
            step = mapping(
                step.place, {**step.value, "mixture": mapping(mixture.place, parts, mixture.keys)}, step.keys
            )
        written[name] = step
    return mapping(steps.place, written, steps.keys)


def _is_mergekit(entries: Mapping[str, Node]) -> bool:
    if _OWN_KEYS & entries.keys():
        return False
    models = entries.get("models")
    return bool(_MERGEKIT_KEYS & entries.keys()) or (models is not None and isinstance(models.value, list))
