"""Values that Python code gives where a command line would have words: what they are, or an error in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from typing import Any

from mergekit_px.errors import UsageError


def given_path(value: Any, what: str = "a model", hint: str | None = None) -> str:
    """A path or a reference as text. Raises ``UsageError`` for anything else."""
    if isinstance(value, (str, PathLike)):
        return str(fspath(value))
    wanted = "a path or a name on the Hub" if what == "a model" else "a path"
    raise UsageError(f"{what} is {wanted}, not {type(value).__name__}", hint=hint)


def given_paths(values: Any, what: str = "models") -> list[str]:
    """Each of several models. Raises ``UsageError`` for what is no list of them."""
    if isinstance(values, (str, PathLike, Mapping)) or not isinstance(values, Iterable):
        raise UsageError(f"{what} are a list of models, not {type(values).__name__}", hint="write ['a', 'b']")
    return [given_path(value) for value in values]


def check_kind(name: str, value: Any, kinds: type | tuple[type, ...], words: str) -> None:
    """Raise ``UsageError`` for a value, not None, that is of none of the types."""
    truth = isinstance(value, bool) and kinds is not bool
    if value is not None and (truth or not isinstance(value, kinds)):
        raise UsageError(f"{name} is {words}, not {type(value).__name__}")
