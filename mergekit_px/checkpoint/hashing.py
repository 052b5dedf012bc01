"""sha256 of files."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from mergekit_px.errors import InputError, InputNotFoundError

_SHA256 = re.compile(r"[0-9a-f]{64}")


def file_sha256(path: Path, *, trust_cache: bool = True) -> str:
    """Hex sha256 of the bytes of a file.

    The Hub's cache names the blob of a large file by its sha256 and links to it. With ``trust_cache`` such a
    name is taken at its word; without, the bytes are read. Raises ``InputNotFoundError``, ``InputError``.
    """
    try:
        if trust_cache and path.is_symlink() and _SHA256.fullmatch(path.readlink().name) and path.is_file():
            return path.readlink().name
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise InputNotFoundError("no such file", where=str(path)) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
