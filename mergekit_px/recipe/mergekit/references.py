"""The names of models in mergekit configs, and short names for them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for
from mergekit_px.located.validate import shown
from mergekit_px.located.yaml_text import Node


@dataclass(frozen=True, slots=True)
class Reference:
    """A model as mergekit names it: ``path[@revision][+adapter[@revision]]``."""

    model: str
    adapter: str | None = None

    def __str__(self) -> str:
        return self.model if self.adapter is None else f"{self.model}+{self.adapter}"


def read_reference(node: Node) -> Reference:
    """A reference given as text, or as a mapping ``{model, lora}`` of texts or of ``{path, revision}``.

    Raises:
        RecipeError: it is neither.
    """
    if isinstance(node.value, str):
        return split_reference(node.value, str(node.place))
    if not isinstance(node.value, dict):
        raise RecipeError(f"a model is a path or org/name, not {shown(node.data())}", where=str(node.place))
    known = ("model", "lora", "override_architecture")
    for key in node.value:
        if key not in known:
            raise RecipeError(f"unknown key '{key[:80]}'", where=str(node.keys[key]), hint=hint_for(key, known))
    if "model" not in node.value:
        raise RecipeError("'model' is missing", where=str(node.place))
    lora = node.value.get("lora")
    return Reference(_read_path(node.value["model"]), None if lora is None or lora.value is None else _read_path(lora))


def split_reference(text: str, where: str) -> Reference:
    """Split a model from its adapter at the ``+``; a path that exists as it stands is not split.

    Raises:
        RecipeError: empty, or with more than one ``+`` or ``@`` in a place.
    """
    if "+" in text and not _exists(text):
        model, *adapters = text.split("+")
        if len(adapters) > 1:
            raise RecipeError(f"'{text}' has more than one '+'", where=where, hint="write model+adapter")
        return Reference(_checked(model, where), _checked(adapters[0], where))
    return Reference(_checked(text, where))


def _checked(path: str, where: str) -> str:
    if not path.strip():
        raise RecipeError("a model without a path", where=where)
    if path.count("@") > 1 and not _exists(path):
        raise RecipeError(f"'{path}' has more than one '@'", where=where, hint="write org/name@revision")
    return path.strip()


def _read_path(node: Node) -> str:
    if isinstance(node.value, str):
        return _checked(node.value, str(node.place))
    if isinstance(node.value, dict) and "path" in node.value and not node.value.keys() - {"path", "revision"}:
        path, revision = node.value["path"], node.value.get("revision")
        if isinstance(path.value, str) and (revision is None or isinstance(revision.value, (str, type(None)))):
            tail = f"@{revision.value}" if revision is not None and revision.value else ""
            return _checked(path.value + tail, str(node.place))
    raise RecipeError("a path is text, or {path: text, revision: text}", where=str(node.place))


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def short_name(reference: Reference, taken: Collection[str]) -> str:
    """A name for ``models:`` made of the last part of the path, different from all that are taken."""
    parts = [part for part in (reference.model, reference.adapter) if part is not None]
    pieces = [re.split(r"[/\\]", part.split("@")[0].rstrip("/\\"))[-1] for part in parts]
    name = re.sub(r"[^A-Za-z0-9_]+", "-", "-".join(pieces)).strip("-")[:80] or "model"
    if name not in taken:
        return name
    return next(f"{name}-{count}" for count in range(2, len(taken) + 3) if f"{name}-{count}" not in taken)
