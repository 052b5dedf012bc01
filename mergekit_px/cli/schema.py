"""``pxmerge schema``: the JSON Schema of recipes, and of what commands print with ``--json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Union

import typer

from mergekit_px.cli._output import Output
from mergekit_px.errors import UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel, TypeAdapter

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_DESCRIPTION = "What each command of pxmerge prints with --json, by its name."

Of = Annotated[
    str | None,
    typer.Option("--of", metavar="COMMAND", help="The schema of what this command prints with --json."),
]


def schema(of: Of = None) -> int:
    """Print the JSON Schema of recipes, or of what a command prints with --json, for editors and other programs.

    An editor with the YAML language server completes and checks a recipe whose first line is
    "# yaml-language-server: $schema=./pxmerge-recipe.schema.json".

    \b
    Examples:
      pxmerge schema > pxmerge-recipe.schema.json
      pxmerge schema --of compare
      pxmerge schema --of "adapter merge"
    """
    from mergekit_px.plan.method_catalog import method_catalog
    from mergekit_px.recipe.schema import recipe_schema

    document = recipe_schema(method_catalog()) if of is None else json_schema(of)
    Output().raw(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return 0


def json_schema(command: str) -> dict[str, Any]:
    """The schema of a command's documents. Raises ``UsageError`` for a command that has none."""
    from mergekit_px.cli._commands import METHODS, all_commands, find_command
    from mergekit_px.cli._documents import DOCUMENTS, document_types
    from mergekit_px.located.nearest import hint_for

    found = find_command(command)
    if found is None:
        raise UsageError(f"there is no command '{command}'", hint=hint_for(command, all_commands()))
    types = document_types(found.name, is_method=found.group == METHODS)
    if not types:
        known = ", ".join(DOCUMENTS)
        raise UsageError(f"'{found.name}' prints no JSON", hint=f"those that do: {known}")
    return {"$schema": DIALECT, **_adapter(types).json_schema(mode="serialization")}


def json_schemas() -> dict[str, Any]:
    """The schemas of all commands in one document: ``#/properties/run`` is that of ``run``."""
    from pydantic import TypeAdapter

    from mergekit_px.cli._commands import METHODS, all_commands
    from mergekit_px.cli._documents import document_types

    types = {name: document_types(name, is_method=one.group == METHODS) for name, one in all_commands().items()}
    adapters = [(name, "serialization", _adapter(each)) for name, each in types.items() if each]
    schemas, shared = TypeAdapter.json_schemas(adapters)  # type: ignore[arg-type]
    properties = {name: schema for (name, _), schema in schemas.items()}
    return {"$schema": DIALECT, "description": _DESCRIPTION, "properties": properties, **shared}


def _adapter(types: Sequence[type[BaseModel]]) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    members: Any = Union[tuple(types)]  # noqa: UP007  # known only now
    return TypeAdapter(members)
