"""A name is declared once, whether its declaration was imported already or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from mergekit_px.declare.built_in import Declared


class HasOrigin(Protocol):
    @property
    def origin(self) -> str:
        """The module that declares it."""


def require_new(
    kind: str, name: str, module: str, imported: Mapping[str, HasOrigin], built_in: Mapping[str, Declared]
) -> None:
    """Raise ``ValueError`` where another module declares that name too; the same module may be imported again."""
    known = imported[name].origin if name in imported else built_in[name].module if name in built_in else module
    if known != module:
        raise ValueError(f"{kind} '{name}' is declared by both {known} and {module}")
