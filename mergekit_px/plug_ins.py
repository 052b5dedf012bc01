"""What other packages bring: methods, learners and kinds of adapters, found by their entry points."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any


def load_plug_ins(group: str, take: Callable[[str, Any], None] = lambda name, loaded: None) -> None:
    """Load all that other packages name under an entry-point group; what cannot be had is left out with a warning.

    Args:
        take: gets the name of each and what it loads to, and raises to refuse it. Nothing is needed where an import
            is what declares something.
    """
    for entry in entry_points(group=group):
        try:
            take(entry.name, entry.load())
        except Exception as error:  # a plug-in may fail in any way, and must not take the rest with it
            reason = " ".join(str(error).split())
            warnings.warn(f"plug-in '{entry.name}' ({entry.value}) is left out: {reason}", stacklevel=3)
