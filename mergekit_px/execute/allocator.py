"""Keeps freed memory in the process while a run goes on.

Each block needs a few temporaries of a mebibyte. By default glibc gives such memory back to the system when it is
freed, and the page faults of getting it again cost four times what the arithmetic does. Larger pieces, of matrices that
are held whole, go back, since they would lie scattered in the heap. Elsewhere than on glibc nothing is changed.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST_REUSED = 5 << 20
_KEPT = 512 << 20
_LARGEST_SCATTERED = 1 << 20
"""Where weights come and go between activations that stay, all larger pieces go back: the heap would grow to more than
half as much again."""


@cache
def keep_freed_memory() -> bool:
    """Set the allocator up, once for the process; whether that was possible."""
    return _set(_MMAP_THRESHOLD, _LARGEST_REUSED) and _set(_TRIM_THRESHOLD, _KEPT)


def return_freed_memory() -> bool:
    """Set the allocator up for learning; whether that was possible."""
    return _set(_MMAP_THRESHOLD, _LARGEST_SCATTERED)


def _set(option: int, value: int) -> bool:
    if sys.platform != "linux":
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(option, value))
    except (AttributeError, OSError):
        return False
