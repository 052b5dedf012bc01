"""What is learnt, as files: tensors with a few strings, and a report. Equal contents give equal bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_px.checkpoint.dtypes import dtype_of
from mergekit_px.checkpoint.header import build_header
from mergekit_px.checkpoint.positional import sync
from mergekit_px.errors import WriteError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file over the one before it, in one rename; tensors go one by one, without a copy.

    Raises:
        WriteError: the disk refuses.
    """
    entries = [(name, dtype_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    start, header = build_header(entries, metadata)
    with _replaced(path) as part, part.open("wb") as file:
        file.write(start)
        for name in header.entries:
            array: Any = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(memoryview(array))
        file.flush()
        sync(file.fileno())


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document over the one before it, in one rename. Raises ``WriteError``."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text over the one before it, in one rename. Raises ``WriteError``."""
    with _replaced(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        sync(file.fileno())


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except OSError as error:
        raise WriteError(f"the disk refused: {error.strerror or error}", where=str(path)) from error
