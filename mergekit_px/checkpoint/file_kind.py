"""What a file that is no safetensors file is, by its first bytes, and the way to weights that can be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit_px.escaping import escaped_line

_FIRST_BYTES = 512
_AGAIN = "the download went wrong; fetch the file again"
_UNPACK = "unpack it, and give what is inside"


@dataclass(frozen=True)
class FileKind:
    """``name`` in words; ``hint``: what to do. ``pickled``: a save of PyTorch, to be read where that is allowed."""

    name: str
    hint: str
    pickled: bool = False


LFS_POINTER = FileKind("a git-lfs pointer, not the file itself", "fetch the file with `git lfs pull` in its repository")
_PICKLE = FileKind(
    "a PyTorch pickle, which is not read unless asked for",
    "allow it with --allow-pickle, or convert it to safetensors",
    pickled=True,
)
_WEB_PAGE = FileKind(
    "a web page (HTML), not weights", "what was saved is a notice or a login page; download the file itself"
)

_GGML = FileKind("a GGML file", "give the safetensors checkpoint that it was made from")
"""Kept in numbers, whose bytes are turned round in the file."""
_TAR = FileKind("a tar archive", _UNPACK)
_ANNEX = FileKind("a git-annex pointer, not the file itself", "fetch the file with `git annex get` in its repository")

# First bytes as the formats' own descriptions give them; pickles begin with their protocol.
_SIGNATURES: Mapping[bytes, FileKind] = {
    b"version https://git-lfs": LFS_POINTER,
    b"version https://hawser": LFS_POINTER,  # as it was called first
    b"GGUF": FileKind("a GGUF file", "give the safetensors checkpoint that it was made from"),
    **dict.fromkeys((b"ggml", b"lmgg", b"tjgg", b"fmgg", b"algg"), _GGML),
    b"\x89HDF\r\n": FileKind("an HDF5 file (Keras)", "give the model's safetensors checkpoint"),
    b"\x93NUMPY": FileKind("a NumPy array", "give the model's safetensors checkpoint"),
    b"\x1f\x8b": FileKind("a gzip archive", _UNPACK),
    b"7z\xbc\xaf": FileKind("a 7z archive", _UNPACK),
    b"\x28\xb5\x2f\xfd": FileKind("a Zstandard archive", _UNPACK),
    b"\xfd7zXZ\x00": FileKind("an xz archive", _UNPACK),
    b"BZh": FileKind("a bzip2 archive", _UNPACK),
    b"Rar!": FileKind("a RAR archive", _UNPACK),
    **{bytes([0x80, protocol]): _PICKLE for protocol in (2, 3, 4, 5)},
}


def file_kind(path: Path) -> FileKind | None:
    """The kind of a file; None for one that may be a safetensors file, and for what cannot be read at all."""
    try:
        # Opening a FIFO would wait for ever.
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return kind_of_bytes(file.read(_FIRST_BYTES))
    except OSError:
        return None


def kind_of_bytes(first: bytes) -> FileKind | None:
    """The kind by the first bytes of a file, all of them where it is shorter than 512."""
    if not first:
        return FileKind("an empty file", _AGAIN)
    start = first.removeprefix(b"\xef\xbb\xbf")
    for signature, kind in _SIGNATURES.items():
        if start.startswith(signature):
            return kind
    if first[257:262] == b"ustar":
        return _TAR
    if b"/annex/objects/" in start.partition(b"\n")[0]:
        return _ANNEX
    if first.startswith(b"PK\x03\x04"):
        # PyTorch writes a zip archive whose first entry is its pickle.
        return _PICKLE if b"data.pkl" in first else FileKind("a zip archive", _UNPACK)
    text = first.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return _WEB_PAGE
    if not first.strip(b"\0"):
        return FileKind("a file that begins with zeros: space was made for it and not filled", _AGAIN)
    if text and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in first):
        return FileKind(f"a text file ({escaped_line(first[:60].decode('ascii'))})", _AGAIN)
    return None
