"""Whether a file is still the one that was looked at, as far as the system's records of it can tell."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.ranged import address_of, identity_now
from mergekit_px.errors import InputError, InputNotFoundError


def check_unchanged(checkpoints: Iterable[Checkpoint]) -> None:
    """Raise ``InputError`` if a file of weights is not the one any more whose header was read."""
    for checkpoint in checkpoints:
        if checkpoint.directory is None:
            continue
        for file in checkpoint.files.values():
            if file.identity is None:
                continue
            path = checkpoint.directory / file.name
            try:
                identity = identity_now(path)
            except (OSError, InputNotFoundError):
                continue  # whoever needed it has read it, or was told
            if identity != file.identity:
                raise changed(path)


def changed(path: Path) -> InputError:
    """The error for an input that is not the file any more that it was."""
    return InputError(
        "the file changed since its header was read",
        where=address_of(path),
        hint="let no program write to inputs; run again",
    )
