"""How wide help texts are."""

from __future__ import annotations

import shutil


def terminal_width() -> int:
    """Columns to write in: those of the terminal, but neither too few to read nor too many."""
    return min(max(shutil.get_terminal_size().columns, 40), 100)
