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


@cache
def keep_freed_memory() -> bool:
    """Set the allocator up, once for the process; whether that was possible."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_REUSED) and mallopt(_TRIM_THRESHOLD, _KEPT))
