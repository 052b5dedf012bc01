"""Object stores (``s3://bucket/key`` and the other schemes of fsspec): listing, ranges, and errors in words.

Credentials are found by the store's own package (environment, profile, role) and are named in no message: what a
store answers is told by its code and not in its words, which may hold keys and signed addresses.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mergekit_px.checkpoint.signed_ranges import SignedRanges
from mergekit_px.errors import InputError, InputNotFoundError, PxmergeError, UsageError

Result = TypeVar("Result")

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_OF_THE_HUB = ("hf", "http", "https")
_EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
"""Scheme -> the package of the extra ``remote`` that reads it."""

_SETTINGS = ("AWS_", "GOOGLE_", "GCLOUD_", "AZURE_", "FSSPEC_")
"""What the names of variables begin with from which the packages take credentials and endpoints."""

_WAITS = (0.3, 1.0, 2.0)
"""Seconds before each further try of what may go better: broken connections, answers cut short, 429 and 5xx."""
_PART, _PARTS_AT_ONCE, _MOST_PARTS = 16 << 20, 3, 9000
"""Bytes of a part of a large upload, how many are under way, and how many a file may have: S3 takes 10 000."""
_GONE = ("NoSuchKey", "NoSuchBucket", "404")
_REFUSED = ("AccessDenied", "403", "Forbidden")
_IDENTITY = ("ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "TokenRefreshRequired")
_BROKEN = ("HTTPClient", "Timeout", "Connection", "Payload", "Incomplete", "ReadError", "Protocol")
"""In the names of what packages raise for connections that break."""
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


class StoredObject(NamedTuple):
    """Size, and the mark that changes with every write (ETag or the like)."""

    size: int
    etag: str


class CutShortError(OSError):
    """A range came with fewer bytes than the object has there."""


def written_address(output: Path) -> str | None:
    """The address of a store that an output names, which a path spells with one slash; None for a path."""
    first = output.parts[0] if output.parts else ""
    if len(first) < 3 or not first.endswith(":"):  # C: is a drive
        return None
    return f"{first}//{'/'.join(output.parts[1:])}"


def store_scheme(reference: str) -> str | None:
    """The scheme of an address in a store; None for a path, and for addresses of the Hub."""
    match = _ADDRESS.match(reference)
    return match[1].lower() if match and match[1].lower() not in _OF_THE_HUB else None


class ObjectStore:
    """One place in a store: everything whose name begins with the address and a slash, or the object itself.

    Raises ``UsageError`` for a scheme that is not known or whose package is missing, and for credentials in an address.
    """

    def __init__(self, address: str) -> None:
        scheme = store_scheme(address)
        place = address.partition("://")[2]
        if "@" in place.partition("/")[0] or "?" in place:
            raise UsageError(
                "credentials and settings are not taken from an address",
                where=f"{scheme}://...",
                hint="the store's own package finds them in the environment or its profile; see docs/remote.md",
            )
        self.address = address.rstrip("/")
        self._files, self._signed = _file_system(scheme or "", address)
        self._path = str(self._files._strip_protocol(self.address))
        if not self._path.strip("/") or self._path.endswith(":"):
            raise UsageError("the address names no bucket", where=address, hint=f"write {scheme}://bucket/key")

    def list(self, depth: int = 1) -> dict[str, StoredObject]:
        """The objects up to so many folders deep, by name relative to the address; ``""`` for what it is itself.

        Raises ``InputNotFoundError``, ``InputError``.
        """
        objects, folders = self._listed(self._path)
        for _ in range(depth):
            below = [self._listed(f"{self._path}/{folder}") for folder in folders]
            folders = [folder for _, inside in below for folder in inside]
            for found, _ in below:
                objects |= found
        return dict(sorted(objects.items()))

    def _listed(self, folder: str) -> tuple[dict[str, StoredObject], Sequence[str]]:
        """Objects and folders directly in a folder, by name relative to the address."""
        objects: dict[str, StoredObject] = {}
        folders = []
        with self._told("listing it"):
            entries = patiently(functools.partial(self._files.ls, folder, detail=True))
        for info in entries:
            path = str(info["name"]).rstrip("/")
            name = path.removeprefix(self._path).strip("/")
            if info.get("type") == "file" and ".." not in name.split("/") and not path.endswith("/"):
                objects[name] = _described(self._files, path, info)
            elif info.get("type") == "directory" and not name.rpartition("/")[2].startswith("."):
                folders.append(name)
        return objects, folders

    def status(self, name: str) -> StoredObject:
        """What the store says of an object now. Raises ``InputNotFoundError``, ``InputError``."""
        path = self._at(name)
        with self._told("looking at it", name):
            info = patiently(lambda: self._files.info(path, refresh=True) if self._caches else self._files.info(path))
        return _described(self._files, path, info)

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``[start, stop)`` of an object. Raises ``InputNotFoundError``, ``InputError``."""
        if start == stop:
            return b""
        path = self._at(name)

        def range_of_bytes() -> bytes:
            data = self._signed.read(path, start, stop) if self._signed is not None else None
            if data is None:
                data = bytes(self._files.cat_file(path, start=start, end=stop))
            if len(data) != stop - start:
                raise CutShortError
            return data

        with self._told("reading it", name):
            return patiently(range_of_bytes)

    def put(self, name: str, data: bytes) -> StoredObject:
        """Write an object whole; what the store then says of it. Raises ``InputError``."""
        with self._told("writing it", name):
            patiently(lambda: self._files.pipe_file(self._at(name), data))
        return self._written(name, len(data))

    def put_file(self, path: Path, name: str) -> StoredObject:
        """Upload a file, a large one in parts; what the store then says of it. Raises ``InputError``."""
        size = path.stat().st_size
        # Its own way is ten parts of 50 MB at a time, all of them in memory.
        is_s3 = self._signed is not None
        parts = {"chunksize": max(_PART, size // _MOST_PARTS), "max_concurrency": _PARTS_AT_ONCE} if is_s3 else {}
        with self._told("writing it", name):
            patiently(lambda: self._files.put_file(str(path), self._at(name), **parts))
        return self._written(name, size)

    def remove(self, name: str) -> None:
        """Remove an object, if it is there. Raises ``InputError``."""
        with self._told("removing it", name), suppress(FileNotFoundError):
            patiently(lambda: self._files.rm_file(self._at(name)))

    def _written(self, name: str, size: int) -> StoredObject:
        status = self.status(name)
        if status.size != size:
            raise InputError(
                f"writing it failed: {size:,} bytes were sent and the store has {status.size:,}",
                where=self.where(name),
                hint="run it again",
            )
        return status

    def where(self, name: str) -> str:
        """An object's address, for messages."""
        return f"{self.address}/{name}" if name else self.address

    @property
    def _caches(self) -> bool:
        return hasattr(self._files, "dircache") and self._files.protocol not in ("memory", "file")

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    @contextmanager
    def _told(self, action: str, name: str = "") -> Iterator[None]:
        try:
            yield
        except PxmergeError:
            raise
        except Exception as error:
            raise store_error(error, action, self.where(name)) from error


def patiently(call: Callable[[], Result]) -> Result:
    """``call()``, repeated after what may go better the next time."""
    for wait in _WAITS:
        try:
            return call()
        except Exception as error:
            if isinstance(error, _LASTING) or not _is_transient(error):
                raise
        time.sleep(wait)
    return call()


def store_error(error: Exception, action: str, where: str) -> InputError:
    """What went wrong, in one line that holds nothing a store said but its code."""
    codes = [code for link in _chain(error) if (code := _code(link))]
    code = codes[-1] if codes else ""
    said = f" ({code})" if code else ""
    names = [type(link).__name__ for link in _chain(error)]
    if any("Credential" in name for name in names):
        return InputError(
            f"{action} failed: no usable credentials were found",
            where=where,
            hint="give them as the store's own tools take them, as AWS_PROFILE; see docs/remote.md",
        )
    if code in _IDENTITY:
        return InputError(
            f"{action} failed: the store does not accept the credentials{said}", where=where, hint="renew them"
        )
    if isinstance(error, PermissionError) or code in _REFUSED:
        return InputError(
            f"{action} failed: the store does not allow it{said}",
            where=where,
            hint="check the permissions of the credentials in use",
        )
    if isinstance(error, FileNotFoundError) or code in _GONE:
        return InputNotFoundError(
            f"{action} failed: no such object or bucket{said}", where=where, hint="check the address"
        )
    if isinstance(error, CutShortError):
        return InputError(
            f"{action} failed: the store sent fewer bytes than it lists", where=where, hint="run it again"
        )
    if isinstance(error, TimeoutError) or any("Timeout" in name for name in names):
        return InputError(f"{action} failed: the store did not answer in time", where=where, hint="run it again")
    if any("Connect" in name or "Endpoint" in name for name in names):
        return InputError(
            f"{action} failed: the store cannot be reached",
            where=where,
            hint="check the network, and the endpoint (AWS_ENDPOINT_URL for a store of one's own)",
        )
    return InputError(f"{action} failed: {names[0]}{said}", where=where, hint="run it again")


def _is_transient(error: Exception) -> bool:
    codes = [code for link in _chain(error) if (code := _code(link))]
    statuses = [status for link in _chain(error) if (status := _status(link))]
    if statuses:
        return statuses[-1] in (408, 429) or statuses[-1] >= 500
    if any(code in (*_GONE, *_REFUSED, *_IDENTITY) for code in codes):
        return False
    broken = any(word in type(link).__name__ for link in _chain(error) for word in _BROKEN)
    return broken or isinstance(error, OSError)


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    seen: list[BaseException] = []
    while link is not None and link not in seen:
        seen.append(link)
        yield link
        link = link.__cause__ or link.__context__


def _response(error: BaseException) -> dict[str, Any]:
    response = getattr(error, "response", None)
    return response if isinstance(response, dict) else {}


def _code(error: BaseException) -> str:
    """The store's word for what went wrong, as ``NoSuchKey``."""
    code = str(_response(error).get("Error", {}).get("Code", "") or getattr(error, "error_code", "") or "")
    return code if re.fullmatch(r"\w{1,40}", code, re.ASCII) else ""


def _status(error: BaseException) -> int:
    """Of HTTP."""
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode") or getattr(error, "status", 0)
    return status if isinstance(status, int) else 0


def _described(files: Any, path: str, info: dict[str, Any]) -> StoredObject:
    etag = info.get("ETag") or info.get("etag") or files.ukey(path)
    return StoredObject(int(info.get("size") or 0), str(etag).strip('"'))


@functools.cache
def _opened(scheme: str, settings: tuple[tuple[str, str], ...]) -> tuple[Any, SignedRanges | None]:
    """A file system of fsspec with the credentials that the environment names, and its way past it for S3."""
    # The tries are ours: with those of all layers below, one error would take minutes.
    settled = {"retries": {"total_max_attempts": 1}, "signature_version": "s3v4"}
    is_s3 = _EXTRAS.get(scheme) == "s3fs"
    options = {"config_kwargs": settled} if is_s3 else {}
    fsspec = importlib.import_module("fsspec")
    opened = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)
    if hasattr(opened, "retries"):
        opened.retries = 1
    return opened, SignedRanges(opened) if is_s3 else None


def _file_system(scheme: str, address: str) -> tuple[Any, SignedRanges | None]:
    known = importlib.import_module("fsspec.registry").known_implementations
    if scheme not in known or "::" in address:
        raise UsageError(
            f"{scheme}:// is no scheme of a store",
            where=address.partition("?")[0],
            hint=f"as s3://bucket/key; known are {', '.join(sorted(_EXTRAS))} and those of fsspec",
        )
    try:
        # One for each set of credentials: fsspec keeps it, and the sessions that it has open.
        settings = tuple(sorted(entry for entry in os.environ.items() if entry[0].startswith(_SETTINGS)))
        return _opened(scheme, settings)
    except ImportError as error:
        package = _EXTRAS.get(scheme)
        raise UsageError(
            f"{scheme}:// needs a package that is not installed",
            where=address,
            hint=f"pip install {package}, or 'pxmerge[remote]' for all stores"
            if package
            else str(known[scheme].get("err")),
        ) from error
    except Exception as error:
        raise store_error(error, "setting it up", address) from error
