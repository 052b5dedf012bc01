"""Threads that share out work piece by piece, torch in each of them on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """A pool of as many threads as torch has.

    Small operations gain nothing from several threads of torch, which on a busy machine mostly wait for one another.
    What is not begun when the block is left is not done.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(count)
