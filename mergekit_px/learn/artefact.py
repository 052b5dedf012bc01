"""Reports and recipes of what is learnt, as files written whole. Equal contents give equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_px.checkpoint.replacement import replacement


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document over the one before it, in one rename. Raises ``WriteError``."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text over the one before it, in one rename. Raises ``WriteError``."""
    with replacement(path) as file:
        file.write(text.encode())
