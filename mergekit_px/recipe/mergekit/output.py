"""What a mergekit config says of the result: dtype, chat template, tokenizer."""

from __future__ import annotations

from collections.abc import Callable

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for
from mergekit_px.located.validate import shown
from mergekit_px.located.yaml_text import Node, Place, mapping
from mergekit_px.recipe.mergekit.entries import IdleKeys, entries_of
from mergekit_px.recipe.mergekit.references import Reference, read_reference
from mergekit_px.recipe.model import UNION

DTYPES = ("bfloat16", "float16", "float32", "float64")


def read_dtype(node: Node | None, key: str) -> Node | None:
    """A dtype by its name in torch.

    Raises:
        RecipeError: it is none that mergekit computes in.
    """
    if node is None:
        return None
    name = node.value.removeprefix("torch.") if isinstance(node.value, str) else None
    if name not in DTYPES:
        hint = hint_for(name, DTYPES) if name is not None else None
        raise RecipeError(f"'{key}' cannot be {shown(node.data())}", where=str(node.place), hint=hint)
    return Node(name, node.place)


def precision_differences(exact: bool, dtype: Node | None, out_dtype: Node | None) -> list[str]:
    """How arithmetic differs, given ``dtype`` (in which mergekit computes, unless ``exact``) and ``out_dtype``."""
    told: list[str] = []
    if dtype is None and not exact:
        told.append("Everything is computed in float32 and rounded once; mergekit computes in the inputs' dtype.")
    if dtype is None and out_dtype is None:
        told.append(
            "Without dtype the result has the dtype of the base model, or else of the first model; in mergekit it has "
            "the widest of the inputs' dtypes."
        )
    if dtype is not None and dtype.value == "float64":
        told.append("Everything is computed in float32 (in float64 where inputs are stored so); mergekit uses float64.")
    elif dtype is not None and dtype.value != "float32":
        told.append(
            f"Inputs are read as they are stored; mergekit rounds them to {dtype.value} first."
            if exact
            else "Inputs are read as they are stored, everything is computed in float32, and the result is rounded "
            f"once; mergekit rounds the inputs to {dtype.value} first and computes in {dtype.value}."
        )
    return told


def read_chat_template(node: Node | None) -> Node | None:
    """The chat template by its name or as Jinja text; ``auto`` stands for mergekit's choice, and nothing for none."""
    return None if node is None or node.value == "" else node


def not_yet(what: str, place: Place, hint: str | None = None) -> RecipeError:
    """The error for what mergekit has and pxmerge does not."""
    return RecipeError(f"not supported yet: {what}", where=str(place), hint=hint)


TOKENIZER_DIFFERENCE = (
    "A token that none of the models has gets the mean of the rows, where mergekit leaves zeros; tokenizers of "
    "different kinds are refused, as are unions of tokenizers whose normalisers disagree, where mergekit takes equal "
    "tokens for equal text."
)

Named = Callable[[Reference, Node], str]
"""Gives a model its name in the recipe."""


def read_tokenizer(
    source: Node | None,
    tokenizer: Node | None,
    base: Reference | None,
    base_name: str | None,
    named: Named,
    idle: IdleKeys,
) -> Node | None:
    """The section of a recipe that says the same; None where the config says nothing.

    Args:
        source: the older key, ``tokenizer_source``.
        base: the ``base_model``.
        base_name: its name in the recipe, where it is merged.

    Raises:
        RecipeError: both keys are given, or something invalid.
    """
    if source is not None and tokenizer is not None:
        raise RecipeError("either tokenizer_source or tokenizer, not both", where=str(tokenizer.place))
    entries: dict[str, Node] = {}
    if tokenizer is not None:
        entries = entries_of(tokenizer, "'tokenizer'", ("source", "tokens", "pad_to_multiple_of"), idle)
        source = entries.get("source") or Node(UNION, tokenizer.place)
    if source is None:
        return None
    place = source.place
    if source.value == "base" and base is None:
        raise RecipeError("the tokenizer of the base is wanted, and there is no base_model", where=str(place))
    reference = base if source.value == "base" else None if source.value == UNION else read_reference(source)
    return mapping(
        place,
        {
            "from": Node(UNION if reference is None else named(reference, source), place),
            "base": Node(base_name, place) if base_name is not None else None,
            "tokens": _tokens(entries["tokens"], named, idle) if "tokens" in entries else None,
            # Rows without a token are cut there.
            "pad_to": entries.get("pad_to_multiple_of", Node(1, place)),
        },
    )


def _tokens(node: Node, named: Named, idle: IdleKeys) -> Node:
    read = {token: _token(token, entry, named, idle) for token, entry in entries_of(node, "'tokens'").items()}
    return mapping(node.place, {**read}, node.keys)


def _token(token: str, node: Node, named: Named, idle: IdleKeys) -> Node:
    entries = entries_of(node, f"the entry of '{token[:80]}'", ("source", "force"), idle)
    source = entries.get("source")
    if source is None:
        raise RecipeError(f"'source' is missing for '{token[:80]}'", where=str(node.place))
    row: dict[str, Node | None] = {"force": entries.get("force")}
    if not isinstance(source.value, dict) or "kind" not in source.value:
        row["model"] = Node(named(read_reference(source), source), source.place)
        return mapping(node.place, row)
    said = entries_of(source, "'source'", ("kind", "model", "token", "token_id"), idle)
    kind = said["kind"].value if "kind" in said else None
    if kind == "zero":
        row["kind"] = said["kind"]
    elif kind == "model_token" and "model" in said and ("token" in said) != ("token_id" in said):
        row |= {"token": said.get("token"), "id": said.get("token_id")}
        row["model"] = Node(named(read_reference(said["model"]), said["model"]), said["model"].place)
    else:
        what = "{kind: zero}, or {kind: model_token} with a model and either a token or a token_id"
        raise RecipeError(f"'source' of '{token[:80]}' must be {what}, not {shown(kind)}", where=str(source.place))
    return mapping(node.place, row)
