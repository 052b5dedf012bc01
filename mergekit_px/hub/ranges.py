"""Reads a few bytes of a remote file, and the headers of safetensors files with nothing of their weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mergekit_px._version import __version__
from mergekit_px.checkpoint.header import Header, header_length, parse_header
from mergekit_px.errors import HubError
from mergekit_px.hub.client import LIBRARY, answer_timeout, patiently
from mergekit_px.hub.errors import hub_errors
from mergekit_px.hub.repository import ResolvedRepo

_LENGTH_BYTES = 8


def read_remote_header(resolved: ResolvedRepo, name: str) -> tuple[Header, str]:
    """The checked header of one weight file and the sha256 of its JSON bytes, in hex.

    Two ranged requests, for the first eight bytes and for the header; none if the file is in the cache.

    Raises:
        HubError: the bytes cannot be had.
        MalformedCheckpointError: they are no header of a file of the listed size.
    """
    where = f"{resolved}/{name}"
    size = resolved.files[name].size
    cached = _cached(resolved, name)
    if cached is not None:
        with cached.open("rb") as file:
            raw = file.read(header_length(file.read(_LENGTH_BYTES), size, where))
    else:
        length = header_length(read_range(resolved, name, 0, min(_LENGTH_BYTES, size)), size, where)
        raw = read_range(resolved, name, _LENGTH_BYTES, length)
    return parse_header(raw, size, where), hashlib.sha256(raw).hexdigest()


def read_range(resolved: ResolvedRepo, name: str, start: int, length: int) -> bytes:
    """Bytes ``start`` to ``start + length`` of a file of the pinned commit.

    A server that ignores the range is read no further than the last byte wanted.
    """
    if length == 0:
        return b""
    with hub_errors(resolved.repo, resolved.revision, f"reading the header of {name}"):
        return patiently(lambda: _request_range(resolved, name, start, length))


def _request_range(resolved: ResolvedRepo, name: str, start: int, length: int) -> bytes:
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = build_hf_headers(library_name=LIBRARY, library_version=__version__)
    headers |= {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
    address = hf_hub_url(resolved.repo, resolved.path(name), revision=resolved.commit)
    with get_session().stream("GET", address, headers=headers, timeout=answer_timeout()) as response:
        hf_raise_for_status(response)
        skip = 0 if response.status_code == 206 else start
        received = bytearray()
        for piece in response.iter_raw():
            received += piece
            if len(received) >= skip + length:
                break
    wanted = bytes(received[skip : skip + length])
    if len(wanted) < length:
        raise HubError(
            f"{name} ends at byte {start + len(wanted)} of {resolved.files[name].size}",
            where=str(resolved),
            hint="run it again",
        )
    return wanted


def _cached(resolved: ResolvedRepo, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(resolved.repo, resolved.path(name), revision=resolved.commit)
    if not isinstance(found, str) or Path(found).stat().st_size != resolved.files[name].size:
        return None
    return Path(found)
