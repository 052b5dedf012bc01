"""What a training run must keep to go on as if it had not been stopped: one safetensors file, replaced in one rename.

Random numbers need nothing here: each use draws from (seed, purpose, step).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.whole import read_tensors, write_tensors
from mergekit_px.errors import InputError, OutputError

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


_SHARE = 20.0
"""A state is replaced when so many times as long went by as writing it took: one of a gigabyte not after every look."""


class StateFile:
    """The state of a run, replaced as often as its size allows.

    Args:
        identity: of the run; a state of another is refused.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity
        self._next = 0.0

    @property
    def exists(self) -> bool:
        """Whether there is one to go on from."""
        return self._path.exists()

    @property
    def due(self) -> bool:
        """Whether it is time to write it again."""
        return time.monotonic() >= self._next

    def save(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Replace it; errors as `save_state`."""
        start = time.monotonic()
        save_state(self._path, tensors, {**info, "plan_hash": self._identity})
        end = time.monotonic()
        self._next = end + _SHARE * (end - start)

    def load(self) -> tuple[Tensors, dict[str, Any]]:
        """What was saved; errors as `load_state`."""
        return load_state(self._path, self._identity)


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
