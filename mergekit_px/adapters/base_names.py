"""From the module names of an adapter to the tensor names of a base checkpoint.

The names in an adapter are those of the model class that was trained; a checkpoint may have been saved by another
one (with a head or without, inside a multimodal model). The names in the files decide, never a table of models.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import StoredTensor
from mergekit_px.errors import AdapterError

MAX_STRIPPED = 2
"""Leading components of an adapter's path that may be missing from the base."""

_MODALITIES = ("vision", "visual", "image", "audio", "speech", "decoder", "text_encoder", "unet")
"""Words that set apart the parts of one model: a prefix with one of them is never put in or left out."""


class BaseNames:
    """The modules and tensors of a base checkpoint, looked up by an adapter's names."""

    def __init__(self, tensors: Mapping[str, StoredTensor], where: str) -> None:
        self.tensors = tensors
        self.where = where
        modules = {""}
        for name in tensors:
            parts = name.split(".")[:-1]
            modules.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
        self.modules = modules
        self._by_last: dict[str, list[str]] = defaultdict(list)
        self._by_underscores: dict[str, list[str]] | None = None
        for module in modules:
            self._by_last[module.rpartition(".")[2]].append(module)

    def find(self, path: str) -> str | None:
        """The module of the base that ``path`` means, or None.

        Tried in turn: the path itself; with or without a leading ``model.``; the only module that ends in the
        path, or in the path less its first components. Layer numbers are never dropped.

        Raises AdapterError where several modules fit equally.
        """
        for candidate in (path, path.removeprefix("model."), f"model.{path}"):
            if candidate in self.modules:
                return candidate
        parts = path.split(".")
        for dropped in range(min(MAX_STRIPPED, len(parts) - 1) + 1):
            head, tail = parts[:dropped], ".".join(parts[dropped:])
            if any(part.isdecimal() for part in head) or _sets_apart(head):
                break
            found = [
                module
                for module in self._by_last[parts[-1]]
                if module == tail
                or (module.endswith(f".{tail}") and not _sets_apart(module.removesuffix(f".{tail}").split(".")))
            ]
            if len(found) > 1:
                raise AdapterError(
                    f"{shown(path)} could be any of {', '.join(sorted(map(shown, found))[:4])}", where=self.where
                )
            if found:
                return found[0]
        return None

    def module(self, path: str) -> str:
        """As ``find``. Raises AdapterError, with the nearest names, where nothing fits."""
        found = self.find(path)
        if found is None:
            raise self.unmatched([path])
        return found

    def find_underscored(self, flat: str) -> str | None:
        """The module whose dotted path becomes ``flat`` when the dots are replaced by underscores, as the kohya
        formats do. Such names cannot be split, so the base's names are flattened instead.

        Raises AdapterError where several modules fit equally.
        """
        if self._by_underscores is None:
            table = defaultdict(list)
            for module in self.modules:
                table[module.replace(".", "_")].append(module)
            self._by_underscores = table
        found = self._by_underscores.get(flat) or [
            module
            for key, modules in self._by_underscores.items()
            if key.endswith(f"_{flat}") and not _sets_apart(key.removesuffix(f"_{flat}").split("_"))
            for module in modules
            if module.replace(".", "_") == key and _ends_at_component(module, flat)
        ]
        if len(found) > 1:
            raise AdapterError(
                f"{shown(flat)} could be any of {', '.join(sorted(map(shown, found))[:4])}", where=self.where
            )
        return found[0] if found else None

    def unmatched(self, paths: Iterable[str]) -> AdapterError:
        """The error for adapter names that fit nothing: the first few, and what is nearest to the first."""
        listed = sorted(set(paths))
        near = difflib.get_close_matches(listed[0], self.modules, n=2, cutoff=0.5)
        more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
        return AdapterError(
            f"nothing in the base fits {', '.join(map(shown, listed[:3]))}{more}",
            where=self.where,
            hint=f"nearest are {', '.join(map(shown, near))}" if near else "is this the right base model?",
        )


def _sets_apart(components: Iterable[str]) -> bool:
    return any(word in component for component in components for word in _MODALITIES)


def _ends_at_component(module: str, flat: str) -> bool:
    """Whether ``flat`` begins at the beginning of a component of the module's path."""
    parts = module.split(".")
    return any("_".join(parts[start:]) == flat for start in range(len(parts)))
