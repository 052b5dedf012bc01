"""From a reference as typed to an opened checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.hub.reference import parse_reference

if TYPE_CHECKING:
    from mergekit_px.hub.repository import ResolvedRepo


@dataclass(frozen=True)
class Source:
    """A checkpoint by its headers, and the pinned repository that it comes from (None for local files)."""

    reference: str
    checkpoint: Checkpoint
    repo: ResolvedRepo | None = None


def open_source(reference: str, *, allow_pickle: bool = False) -> Source:
    """Open a folder, a file, or a Hub repository of which only the headers are read.

    Raises:
        InputError: missing, unreachable or malformed.
    """
    hub_reference = parse_reference(reference)
    if hub_reference is None:
        return Source(reference, open_checkpoint(reference, allow_pickle=allow_pickle))
    from mergekit_px.hub.resolve import remote_checkpoint, resolve

    repo = resolve(hub_reference)
    return Source(reference, remote_checkpoint(repo), repo)


def fetch_source(source: Source, progress: Callable[[int, int], None] | None = None) -> Source:
    """The same checkpoint with its bytes on this machine; ``progress`` gets bytes done and bytes in all.

    Raises:
        InputError: the Hub says no, or cannot be reached.
    """
    if source.repo is None or source.checkpoint.directory is not None:
        return source
    from mergekit_px.hub.fetch import fetch

    folder = fetch(source.repo, progress=progress)
    return Source(source.reference, open_checkpoint(folder, label=source.reference), source.repo)
