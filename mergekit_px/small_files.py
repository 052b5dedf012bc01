"""The one reader of small files: configurations, indexes, records, recipes, cards. They come from strangers.

Only a regular file is opened, so that nothing waits for a pipe or reads a device without end; no more than a
declared size is read; and a file that belongs to a folder is not read through a link that leads out of it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mergekit_px.errors import InputError, InputNotFoundError, MalformedCheckpointError

LARGEST_SMALL_FILE = 16_000_000
"""Bytes. The largest configurations name some ten thousand classes in a megabyte; JSON takes about ten times its size
in memory."""

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def read_small_file(
    path: Path, where: str | None = None, *, folder: Path | None = None, limit: int = LARGEST_SMALL_FILE
) -> bytes:
    """All bytes of a file.

    Args:
        where: what to call it in messages; the path by default.
        folder: the folder that it belongs to; a link may not lead out of it. None for a file that the user named.
        limit: most bytes that it may have.

    Raises:
        InputNotFoundError: no such file.
        MalformedCheckpointError: not a regular file, a link that leads out, or too large.
        InputError: it cannot be read.
    """
    where = str(path) if where is None else where
    try:
        if folder is not None and leads_out(path, folder):
            raise MalformedCheckpointError(
                "a link that leads out of its folder, which is not followed",
                where=where,
                hint="put a copy of the file in its place",
            )
        with os.fdopen(open_regular(path, where), "rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        what = "a link to a file that is not there" if os.path.lexists(path) else "no such file"
        raise InputNotFoundError(what, where=where) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=where) from error
    if len(data) > limit:
        raise MalformedCheckpointError(f"it has more than the {limit} bytes that are read of such a file", where=where)
    return data


def open_regular(path: Path, where: str) -> int:
    """The descriptor of a regular file, open for reading.

    Raises ``MalformedCheckpointError`` for a folder, pipe, socket or device, ``OSError``.
    """
    # Looked at before it is opened, since opening some devices does something; and after, since it may have changed.
    _require_regular(path.stat(), where)
    descriptor = os.open(path, _FLAGS)
    try:
        _require_regular(os.fstat(descriptor), where)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path in ``folder`` leads out of it through links. Raises ``OSError``, ``RuntimeError`` for a loop.

    The Hub's cache keeps files in ``blobs`` and links to them from its ``snapshots``; such links stay inside.
    """
    target = path.resolve()
    if target.is_relative_to(folder.resolve()):
        return False
    return not (target.parent.name == "blobs" and (target.parent.parent / "snapshots").is_dir())


def _require_regular(status: os.stat_result, where: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise MalformedCheckpointError("not a regular file", where=where)
