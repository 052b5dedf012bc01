"""What a training run must keep to go on as if it had not been stopped: one safetensors file, replaced in one rename.

Random numbers need nothing here: each use draws from (seed, purpose, step).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.tensor_file import write_tensors
from mergekit_px.errors import InputError, OutputError
from mergekit_px.learn.models import read_tensors

FORMAT = "pxmerge_training_state"

Tensors = dict[str, Tensor]


def save_state(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write a state over the one before it.

    Raises:
        WriteError: the disk refuses.
    """
    write_tensors(path, tensors, {FORMAT: json.dumps(info)})


def load_state(path: Path, plan_hash: str) -> tuple[Tensors, dict[str, Any]]:
    """A saved state, and what was noted with it.

    Raises:
        InputError: not a state, or damaged.
        OutputError: it belongs to another plan.
    """
    checkpoint = open_checkpoint(path)
    try:
        info = json.loads(checkpoint.metadata[FORMAT])
        found = info["plan_hash"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise InputError(
            "not the state of a run that was stopped", where=str(path), hint="start over with --overwrite"
        ) from None
    if found != plan_hash:
        raise other_plan(path)
    return read_tensors(checkpoint), info


def other_plan(path: Path) -> OutputError:
    """The error for what an earlier run of another plan left."""
    return OutputError(
        "the unfinished run there has another plan: the plan, the inputs or the options changed since",
        where=str(path),
        hint="go back to them, or start over with --overwrite",
    )


def under(state: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The entries whose names begin so, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
