"""Names for models in a recipe that is made from references alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

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


def _stem(reference: str) -> str:
    parts = PurePath(reference.rstrip("/\\").partition("@")[0].replace("\\", "/")).parts
    last = parts[-1] if parts else ""
    stem = re.sub(r"\.(safetensors|bin|pt|pth)$", "", last)
    if stem != last and stem in _GENERIC and len(parts) > 1:
        stem = parts[-2]
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "model"
