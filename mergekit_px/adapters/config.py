"""``adapter_config.json``: what an adapter says of itself, as far as it changes the arithmetic.

The file comes from strangers and from many releases of PEFT: a missing field has its default, an unknown field is
ignored unless it looks like the switch of a variant that this program does not know.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_px.checkpoint.json_text import read_object, shown
from mergekit_px.errors import AdapterError, InputError, InputNotFoundError

CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class AdapterConfig:
    """The configuration of one adapter.

    Attributes:
        kind: ``peft_type``, or the family of a file that has no configuration (``KOHYA``, ``DIFFUSERS``).
        values: all fields as parsed.
        where: for messages.
    """

    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def base_model_name(self) -> str | None:
        """The base model that the adapter was trained on, as its author's machine knew it."""
        name = self.values.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def peft_version(self) -> tuple[int, ...] | None:
        """The release of PEFT that wrote the file (recorded since 0.18), as numbers."""
        text = self.values.get("peft_version")
        found = re.match(r"\d+(\.\d+)*", text) if isinstance(text, str) else None
        return tuple(int(part) for part in found.group().split(".")) if found else None

    @property
    def digest(self) -> str:
        """sha256, in hex, over the kind and all fields."""
        text = json.dumps([self.kind, self.values], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def error(self, what: str, hint: str | None = None) -> AdapterError:
        return AdapterError(what, where=self.where, hint=hint)

    def flag(self, name: str) -> bool:
        """A boolean field, False by default. Raises AdapterError for a text, which would be true whatever it says."""
        value = self.values.get(name)
        if isinstance(value, str):
            raise self.error(f"'{name}' is {shown(repr(value))}, not true or false")
        return bool(value)

    def number(self, name: str, default: float) -> float:
        """A numeric field, the default where it is left out. Raises AdapterError for anything else; ``null`` is not
        left out, and PEFT loads no such file."""
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            text = "null" if value is None else shown(repr(value))
            raise self.error(f"'{name}' is {text}, not a number")
        return value

    def names(self, name: str) -> list[str]:
        """A field that is a list of strings, or one; empty by default."""
        value = self.values.get(name)
        if isinstance(value, str):
            return [value]
        return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []

    def pattern(self, name: str, path: str) -> float | None:
        """The value that ``rank_pattern`` or ``alpha_pattern`` has for a module: the first key that matches the
        end of its path as a regular expression, whole components only."""
        table = self.values.get(name) or {}
        if not isinstance(table, dict):
            raise self.error(f"'{name}' is not an object")
        for key, value in table.items():
            try:
                matches = re.match(rf"(.*\.)?({key})$", path)
            except re.error as error:
                raise self.error(f"'{name}' has the key {shown(key)}, not a regular expression: {error}") from None
            if matches:
                if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    raise self.error(f"'{name}' has no number for {shown(key)}")
                return value
        return None


def read_config(folder: Path, where: str) -> AdapterConfig:
    """Read the configuration of a PEFT folder.

    Raises InputNotFoundError where there is none, AdapterError where it is not one.
    """
    path = folder / CONFIG_FILE
    where = f"{where}/{CONFIG_FILE}"
    try:
        values = read_object(path, where, strict=False, folder=folder)
    except InputNotFoundError:
        raise InputNotFoundError(
            "no adapter configuration", where=where, hint="a PEFT adapter is a folder with this file in it"
        ) from None
    except InputError as error:
        raise AdapterError(error.what, where=where, hint=error.hint) from None
    kind = values.get("peft_type")
    if not isinstance(kind, str) or not kind:
        raise AdapterError("there is no 'peft_type'", where=where, hint="is this the folder of a PEFT adapter?")
    return AdapterConfig(kind.upper(), values, where)
