"""The finished passes of a mapping that was interrupted, beside the state: NAME.pending."""

from __future__ import annotations

import contextlib
from pathlib import Path

from torch import Tensor

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.whole import read_tensors, write_tensors
from mergekit_px.errors import InputError

_IDENTITY = "pxmerge.acmap_pending"


class Pending:
    """Class means by the number of the merged adapter that they were measured under.

    Args:
        identity: of everything that they follow from; what was kept for another one is not taken up.
        resume: take up what is there; else begin anew.
    """

    def __init__(self, state: Path, identity: str, *, resume: bool) -> None:
        self._path = _place(state)
        self._identity = identity
        self.means: dict[int, Tensor] = {}
        if resume:
            with contextlib.suppress(InputError):  # nothing there, or a file that a kill left half written
                checkpoint = open_checkpoint(self._path)
                if checkpoint.metadata.get(_IDENTITY) == identity:
                    self.means = {int(name): tensor for name, tensor in read_tensors(checkpoint).items()}

    def keep(self, number: int, means: Tensor) -> None:
        """Write down one more pass. Raises WriteError."""
        self.means[number] = means
        tensors = {str(one): tensor for one, tensor in self.means.items()}
        write_tensors(self._path, tensors, {_IDENTITY: self._identity})


def discard(state: Path) -> None:
    """Forget the passes: what follows from them is in the state."""
    _place(state).unlink(missing_ok=True)


def _place(state: Path) -> Path:
    return state.with_name(state.name + ".pending")
