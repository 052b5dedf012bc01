"""The small files that parameters name: found, read and hashed while planning."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_px.methods.declare import ArtefactFile


@dataclass(frozen=True)
class Artefact:
    """A small file that the merge is made with.

    Attributes:
        reference: as the recipe names it.
        kind: what it holds, as ``coefficients``.
        path: where it was found.
        content: what the method gets.
        size: in bytes.
        sha256: of the bytes that ``content`` was read from.
    """

    reference: str
    kind: str
    path: Path
    content: Any = field(repr=False)
    size: int
    sha256: str


@dataclass
class Artefacts:
    """Reads each artefact of a recipe once.

    Attributes:
        recipe: the recipe's file, beside which a relative path is sought before it is in the current directory; None
            for a recipe that is in no file.
    """

    recipe: Path | None
    _read: dict[tuple[str, str], Artefact] = field(default_factory=dict)

    def read(self, declared: ArtefactFile, reference: str) -> Artefact:
        """What a parameter names. Raises ``InputError`` for a file that is missing or of another kind."""
        key = (declared.kind, reference)
        if key not in self._read:
            path = Path(reference).expanduser()
            if self.recipe is not None and (self.recipe.parent / path).exists():
                path = self.recipe.parent / path
            path, content, sha256 = declared.read(path)
            self._read[key] = Artefact(reference, declared.kind, path, content, path.stat().st_size, sha256)
        return self._read[key]

    def all(self) -> tuple[Artefact, ...]:
        """All that were read, in order of first use."""
        return tuple(self._read.values())
