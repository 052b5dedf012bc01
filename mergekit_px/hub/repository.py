"""A model repository on the Hub, pinned to one commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RemoteFile:
    """Size in bytes, and the sha256 that the Hub records for large (LFS) files."""

    size: int
    sha256: str | None


@dataclass(frozen=True)
class ResolvedRepo:
    """What a reference meant at the moment it was resolved.

    Attributes:
        repo: ``org/name``.
        revision: the revision asked for; None means the default branch.
        commit: the 40-digit commit that every later read is pinned to.
        files: every file of the commit by its path in ``folder``. Offline: every file in the cache.
        license: from the model card; a licence without a Hub id reads ``other (its name)``.
        base_models: from the model card.
        folder: of the repository that is meant; empty for all of it.
    """

    repo: str
    revision: str | None
    commit: str
    files: Mapping[str, RemoteFile]
    license: str | None
    base_models: tuple[str, ...]
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:12]}" + (f"/{self.folder}" if self.folder else "")

    def path(self, name: str) -> str:
        """Where a file is in the repository."""
        return f"{self.folder}/{name}" if self.folder else name

    def within(self, folder: str) -> ResolvedRepo:
        """One of its folders; ``""`` is the whole again."""
        if not folder:
            return self
        files = {
            name.removeprefix(f"{folder}/"): file for name, file in self.files.items() if name.startswith(f"{folder}/")
        }
        return replace(self, files=files, folder=self.path(folder))
