"""What a mergekit config says of the result: dtype and chat template."""

from __future__ import annotations

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for
from mergekit_px.located.validate import shown
from mergekit_px.located.yaml_text import Node, Place

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
        raise RecipeError(f"'{key}' cannot be {shown(node.value)}", where=str(node.place), hint=hint)
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
