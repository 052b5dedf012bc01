"""What a misspelt name may have meant."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like ``name``, if one is alike at all."""
    from difflib import get_close_matches

    names = list(known)
    by_folded = {folded(candidate): candidate for candidate in names}
    if folded(name) in by_folded:
        return by_folded[folded(name)]
    found = get_close_matches(name[:200], names, n=1)
    return found[0] if found else None


def folded(name: str) -> str:
    """The name without case and separators: ``out-dtype``, ``outDtype`` and ``out_dtype`` are one."""
    return name.replace("-", "").replace("_", "").lower()


def hint_for(name: str, known: Iterable[str]) -> str | None:
    """``did you mean 'density'?``, or the known names where none is like it."""
    names = list(known)
    near = nearest(name, names)
    if near is not None:
        return f"did you mean '{near}'?"
    if not names:
        return None
    shown = ", ".join(names[:12])
    return f"known are {shown}{' ...' if len(names) > 12 else ''}"
