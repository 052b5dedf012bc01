"""Names for models, and weights by them, in a recipe that is made from references alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from mergekit_px.errors import UsageError

_GENERIC = {"model", "pytorch_model", "adapter_model", "checkpoint"}


def model_names(references: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """A name for each reference, taken from its last part; unique among themselves and with ``taken``.

    ``./math-ft`` -> ``math-ft``, ``org/Code-FT@main`` -> ``Code-FT``, ``runs/a/model.safetensors`` -> ``a``.
    """
    used = set(taken)
    names = []
    for reference in references:
        stem = _stem(reference)
        name, count = stem, 1
        while name in used:
            count += 1
            name = f"{stem}-{count}"
        used.add(name)
        names.append(name)
    return names


def named_weights(weights: Sequence[Any] | Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A weight for each source, from weights in order or by name; None, the method's default, where there is none.

    Raises:
        UsageError: another number of weights than of sources, or a weight for what is no source.
    """
    if not isinstance(weights, Mapping):
        if len(weights) != len(names):
            raise UsageError(f"{len(weights)} weights for {len(names)} sources")
        return dict(zip(names, weights, strict=True))
    if unknown := weights.keys() - set(names):
        raise UsageError(f"a weight is given for '{sorted(unknown)[0]}'", hint=f"sources are {', '.join(names)}")
    return {name: weights.get(name) for name in names}


def _stem(reference: str) -> str:
    parts = PurePath(reference.rstrip("/\\").partition("@")[0].replace("\\", "/")).parts
    last = parts[-1] if parts else ""
    stem = re.sub(r"\.(safetensors|bin|pt|pth)$", "", last)
    if stem != last and stem in _GENERIC and len(parts) > 1:
        stem = parts[-2]
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "model"
