"""Whether a recipe can be meant: its names, its graph, its values, its output."""

from __future__ import annotations

import re

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for
from mergekit_px.located.places import Path, Places
from mergekit_px.recipe.catalog import MethodCatalog
from mergekit_px.recipe.chat_template import check_chat_template
from mergekit_px.recipe.check_methods import check_methods
from mergekit_px.recipe.check_step import check_step
from mergekit_px.recipe.graph import check_graph, check_reference
from mergekit_px.recipe.model import UNION, Output, Recipe, Tokenizer, TokenRow

HIGHEST_SEED = 2**63 - 1

_CODES = ("f64", "f32", "f16", "bf16", "f8_e4m3", "f8_e5m2", "f8_e4m3fnuz", "f8_e5m2fnuz")
_TORCH_NAMES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_MORE_NAMES = ("float8_e4m3fnuz", "float8_e5m2fnuz", "double", "float", "half", "fp64", "fp32", "fp16")
DTYPES = frozenset((*_CODES, *_TORCH_NAMES, *_MORE_NAMES))
"""Spellings of the dtypes in which merged tensors can be stored."""

_NAME = re.compile(r"\w[\w.-]{0,99}")
_SIZE = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?\s*([KMGT]I?)?B|[0-9]{1,18}", re.IGNORECASE)


def check_recipe(recipe: Recipe, places: Places, methods: MethodCatalog | None) -> None:
    """Refuse an invalid recipe. Without ``methods`` their names and parameters are not looked at.

    Raises:
        RecipeError: the first problem, at its place.
    """
    _check_names(recipe, places)
    _check_models(recipe, places)
    for name, step in recipe.steps.items():
        check_step(step, ("steps", name), places)
    check_graph(recipe, places)
    _check_output(recipe, recipe.output, places)
    if recipe.tokenizer is not None:
        _check_tokenizer(recipe, recipe.tokenizer, places)
    if not 0 <= recipe.seed <= HIGHEST_SEED:
        what = f"'seed' must be a whole number from 0 to {HIGHEST_SEED}, not {recipe.seed}"
        raise RecipeError(what, where=places.value(("seed",)))
    if methods is not None:
        check_methods(recipe, places, methods)


def _check_names(recipe: Recipe, places: Places) -> None:
    for part, entries in (("models", recipe.models), ("steps", recipe.steps)):
        if not entries:
            raise RecipeError(f"'{part}' is empty", where=places.key((part,)))
        for name in entries:
            if not _NAME.fullmatch(name):
                raise RecipeError(
                    f"'{name[:80]}' cannot be a name",
                    where=places.key((part, name)),
                    hint="names are letters, digits, '_', '-' and '.', and begin with a letter, a digit or '_'",
                )
    for name in recipe.steps:
        if name in recipe.models:
            where = places.key(("steps", name))
            raise RecipeError(f"step '{name}' has the name of a model", where=where, hint="rename one of them")


def _check_models(recipe: Recipe, places: Places) -> None:
    for name, entry in recipe.models.items():
        adapters = [entry.adapter] if isinstance(entry.adapter, str) else entry.adapter or []
        if entry.model is None and not adapters:
            where = places.key(("models", name))
            raise RecipeError(f"'models.{name}' names neither a model nor an adapter", where=where)
        if entry.model is not None and not entry.model.strip():
            raise RecipeError("a path cannot be empty", where=places.value(("models", name, "model")))
        if not all(adapter.strip() for adapter in adapters):
            raise RecipeError("a path cannot be empty", where=places.value(("models", name, "adapter")))
        if entry.component is not None and not entry.component.strip():
            raise RecipeError("a component cannot be empty", where=places.value(("models", name, "component")))


def _check_output(recipe: Recipe, output: Output, places: Places) -> None:
    if output.from_ is not None:
        check_reference(recipe, output.from_, ("output", "from"), places)
    for key in ("config_from", "tokenizer_from"):
        _check_model(recipe, getattr(output, key), ("output", key), places)
    if not output.path.strip():
        raise RecipeError("'output.path' is empty", where=places.value(("output", "path")))
    if output.dtype is not None and output.dtype.strip().lower().removeprefix("torch.") not in DTYPES:
        raise RecipeError(
            f"merged tensors cannot be stored as '{output.dtype[:80]}'",
            where=places.value(("output", "dtype")),
            hint=hint_for(output.dtype, _TORCH_NAMES),
        )
    if output.chat_template is not None:
        check_chat_template(output.chat_template, places.value(("output", "chat_template")))
    size = str(output.shard_size).strip()
    if not _SIZE.fullmatch(size) or not re.search("[1-9]", size):
        raise RecipeError(
            f"'{size[:80]}' is not a size",
            where=places.value(("output", "shard_size")),
            hint="write one such as 5GB, 512MiB or 1000000",
        )
    if output.push is not None and not output.push.repo.strip():
        raise RecipeError("'output.push.repo' is empty", where=places.value(("output", "push", "repo")))


def _check_tokenizer(recipe: Recipe, tokenizer: Tokenizer, places: Places) -> None:
    if tokenizer.from_ != UNION or UNION in recipe.models:
        _check_model(recipe, tokenizer.from_, ("tokenizer", "from"), places, besides=(UNION,))
    _check_model(recipe, tokenizer.base, ("tokenizer", "base"), places)
    if tokenizer.pad_to is not None and tokenizer.pad_to < 1:
        what = f"'pad_to' must be a whole number from 1 on, not {tokenizer.pad_to}"
        raise RecipeError(what, where=places.value(("tokenizer", "pad_to")), hint="leave it out to keep the rows")
    if recipe.output.tokenizer_from is not None:
        where = places.key(("output", "tokenizer_from"))
        raise RecipeError("either tokenizer or output.tokenizer_from, not both", where=where)
    for token, row in tokenizer.tokens.items():
        path: Path = ("tokenizer", "tokens", token)
        if not token:
            raise RecipeError("a token cannot be empty", where=places.key(path))
        _check_model(recipe, row.model, (*path, "model"), places)
        _check_token_row(token, row, places.key(path))


def _check_token_row(token: str, row: TokenRow, where: str) -> None:
    if row.kind == "model" and row.model is None:
        hint = "write {kind: model, model: name}, or another kind: zero, mean, random"
        raise RecipeError(f"it is not said which model gives the row of '{token[:80]}'", where=where, hint=hint)
    if row.kind in ("zero", "mean") and row.model is not None:
        raise RecipeError(f"'{token[:80]}' is of kind {row.kind}, which takes no model", where=where)
    if (row.token, row.id) != (None, None) and row.kind != "model":
        raise RecipeError(f"'{token[:80]}' is of kind {row.kind}, which takes no row of another token", where=where)
    if row.token is not None and row.id is not None:
        raise RecipeError(f"'{token[:80]}': either token or id, not both", where=where)
    if row.id is not None and row.id < 0:
        raise RecipeError(f"'{token[:80]}': ids begin at 0, and {row.id} is given", where=where)


def _check_model(recipe: Recipe, name: str | None, path: Path, places: Places, besides: tuple[str, ...] = ()) -> None:
    if name is None or name in recipe.models:
        return
    where = places.value(path)
    if name in recipe.steps:
        raise RecipeError(f"'{name}' is a step, and '{path[-1]}' takes a model", where=where)
    kinds = ("zero", "mean", "random")
    hint = f"write {{kind: {name}}}" if name in kinds and path[-1] == "model" else None
    hint = hint or hint_for(name, [*besides, *recipe.models])
    raise RecipeError(f"no model is named '{name[:80]}'", where=where, hint=hint)
