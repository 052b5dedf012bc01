"""Folders that tests write and compare."""

from __future__ import annotations

from pathlib import Path

import torch

from mergekit_px.testing import fine_tune, tiny_llama_config, tiny_llama_tensors, write_checkpoint


def write_llamas(folder: Path, *fine_tunes: str, layers: int = 2) -> dict[str, torch.Tensor]:
    """Write a tiny Llama, ``base``, and fine-tunes of it by these names; returns the base's tensors."""
    base = tiny_llama_tensors(layers=layers)
    tuned = {name: fine_tune(base, number) for number, name in enumerate(fine_tunes, start=1)}
    for name, tensors in {"base": base, **tuned}.items():
        write_checkpoint(folder / name, tensors, config=tiny_llama_config(layers=layers))
    return base


def contents(folder: str | Path) -> dict[str, bytes]:
    """The bytes of all files below a folder, by their paths in it."""
    home = Path(folder)
    return {path.relative_to(home).as_posix(): path.read_bytes() for path in home.rglob("*") if path.is_file()}
