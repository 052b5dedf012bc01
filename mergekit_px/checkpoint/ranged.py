"""Files of weights wherever they are: on this machine, or in a store of which a folder here holds the small files.

A reference into a store becomes a folder of this process with everything that describes the model, whole. Its weights
are not in it: they are opened here, by the path that they would have.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mergekit_px.checkpoint.contents import Checkpoint, FileIdentity
from mergekit_px.checkpoint.index import LARGEST_INDEX
from mergekit_px.checkpoint.object_store import ObjectStore, StoredObject, store_scheme
from mergekit_px.checkpoint.positional import open_positional
from mergekit_px.checkpoint.remote_file import BLOCK, Blocks, RemoteFile, identity_of_object
from mergekit_px.checkpoint.side_files import LARGEST_SIDE_FILE, SideFiles, is_weights, side_files, sort_files
from mergekit_px.errors import InputError, InputNotFoundError

if TYPE_CHECKING:
    from collections.abc import Collection
    from hashlib import _Hash


_MOST_SMALL_FILES = 2000
_AT_ONCE = 8


class RangedFile(Protocol):
    """A file that is read by ranges, from several threads; ``OSError`` and ``InputError`` pass through."""

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset`` on; return the bytes read, fewer only at the end of the file."""

    @property
    def descriptor(self) -> int | None:
        """The system's number of it, if ``pread`` of any place is how to read it."""

    def identity(self) -> FileIdentity:
        """Which file it is, now."""

    def hashed(self) -> tuple[_Hash, int]:
        """The sha256 of its first bytes, and how many they are: none, unless reading has computed it already."""

    def close(self) -> None:
        """Release what is held open."""


@dataclass(frozen=True)
class RemoteFolder:
    """A model in a store.

    Attributes:
        folder: on this machine, with the small files.
        objects: all its files, as the store lists them.
    """

    store: ObjectStore
    folder: Path
    objects: Mapping[str, StoredObject]
    blocks: Blocks
    opened: dict[str, RemoteFile] = field(default_factory=dict)

    def open(self, name: str) -> RemoteFile:
        if name not in self.objects:
            raise FileNotFoundError(name)
        return self.opened.setdefault(name, RemoteFile(self.store, name, self.objects[name], self.blocks))


_remote: dict[Path, RemoteFolder] = {}
_lock = threading.Lock()


def place_of(reference: str, *, whole: bool = False) -> Path:
    """Where a reference is on this machine: a path as it is, an address of a store as the folder (or the file in it)
    that stands for it, made now.

    Args:
        whole: fetch the weights too.

    Raises:
        UsageError: an address that cannot be one.
        InputNotFoundError, InputError: the store says no.
    """
    if store_scheme(reference) is None:
        return Path(reference).expanduser()
    store = ObjectStore(reference)
    objects = store.list()
    name = ""
    if not objects:
        raise InputNotFoundError("nothing is there", where=reference, hint="check the address")
    if "" in objects:
        address, _, name = store.address.rpartition("/")
        store, objects = ObjectStore(address), {name: objects[""]}
        if name.startswith("adapter_model."):  # which means nothing without its configuration
            objects = store.list()
    with _lock:
        remote = next((each for each in _remote.values() if each.store.address == store.address
                       and each.objects == objects), None)  # fmt: skip
        if remote is None:
            folder = Path(tempfile.mkdtemp(prefix="pxmerge-remote-")).resolve()
            remote = RemoteFolder(store, folder, objects, Blocks(store))
            _remote[folder] = remote
    _fetch(remote, [each for each in objects if whole or _is_small(each, objects[each].size)])
    return remote.folder / name


@atexit.register
def forget() -> None:
    """Remove the folders that stand for places in stores."""
    while _remote:
        folder, _ = _remote.popitem()
        shutil.rmtree(folder, ignore_errors=True)


def is_remote(path: Path) -> bool:
    """Whether a path stands for an object that is not on this machine."""
    return _find(path) is not None and not path.exists()


def address_of(path: Path) -> str:
    """What its owner calls a file, for messages."""
    found = _find(path)
    return str(path) if found is None else found[0].store.where(found[1])


def exists(path: Path) -> bool:
    """Whether there is such a file or folder, here or in the store that it stands for."""
    found = _find(path)
    return path.exists() or (found is not None and found[1] in found[0].objects)


def names_in(folder: Path) -> list[str]:
    """The names of files and folders in a folder, weights in a store included. Raises ``OSError``."""
    found = _find(folder)
    if found is None:
        return [entry.name for entry in folder.iterdir()]
    remote, inside = found
    start = f"{inside}/" if inside else ""
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    return sorted(names | {name.removeprefix(start).split("/")[0] for name in remote.objects if name.startswith(start)})


def files_beside(folder: Path, weights: Collection[str] = (), parts: Collection[str] = ()) -> SideFiles:
    """Which files of a folder travel with its weights, by name and size; see ``side_files``."""
    found = _find(folder)
    if found is None:
        return side_files(folder, weights, parts)
    remote, inside = found
    start = f"{inside}/" if inside else ""
    sizes = {name.removeprefix(start): entry.size for name, entry in remote.objects.items() if name.startswith(start)}
    return sort_files(sizes, weights, parts)


def open_ranged(path: Path, where: str | None = None, *, portable: bool = False, direct: bool = False) -> RangedFile:
    """Open a file of weights; ``where``: what to call it. Raises ``OSError``, ``InputError``."""
    found = _find(path)
    if found is not None and not path.exists():
        return found[0].open(found[1])
    return open_positional(path, portable=portable, direct=direct, where=where)


def identity_now(path: Path) -> FileIdentity:
    """Which file is there now. Raises ``OSError``, ``InputError``."""
    found = _find(path)
    if found is not None and not path.exists():
        return identity_of_object(found[0].store.status(found[1]))
    return FileIdentity.of(path.stat())


def _find(path: Path) -> tuple[RemoteFolder, str] | None:
    if not _remote:
        return None
    for folder in (path, *path.parents):
        if folder in _remote:
            inside = path.relative_to(folder).as_posix()
            return _remote[folder], "" if inside == "." else inside
    return None


def _is_small(name: str, size: int) -> bool:
    """Whether a file describes a model, or travels with it."""
    hidden = any(part.startswith(".") for part in name.split("/")) and not name.endswith(".metadata")
    index = name.endswith(".index.json")
    return not hidden and size <= (LARGEST_INDEX if index else LARGEST_SIDE_FILE) and (index or not is_weights(name))


def _fetch(remote: RemoteFolder, names: list[str]) -> None:
    """Copy files whole, those that are not here yet."""
    missing = [name for name in names if not (remote.folder / name).exists()]
    if len(missing) > _MOST_SMALL_FILES:
        raise InputError(
            f"{len(missing):,} small files lie there, too many for one model",
            where=remote.store.address,
            hint="give the folder of the model",
        )

    def copy(name: str) -> None:
        target = remote.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{threading.get_ident()}.part")
        size = remote.objects[name].size
        with part.open("wb") as out:
            for start in range(0, size, BLOCK):
                out.write(remote.store.read(name, start, min(start + BLOCK, size)))
        part.replace(target)

    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        list(pool.map(copy, missing))


def check_unchanged(checkpoints: Iterable[Checkpoint]) -> None:
    """Raise ``InputError`` if a file of weights is not the one any more whose header was read."""
    for checkpoint in checkpoints:
        if checkpoint.directory is None:
            continue
        for file in checkpoint.files.values():
            if file.identity is None:
                continue
            path = checkpoint.directory / file.name
            try:
                identity = identity_now(path)
            except (OSError, InputNotFoundError):
                continue  # whoever needed it has read it, or was told
            if identity != file.identity:
                raise changed(path)


def changed(path: Path) -> InputError:
    """The error for an input that is not the file any more that it was."""
    return InputError(
        "the file changed since its header was read",
        where=address_of(path),
        hint="let no program write to inputs; run again",
    )
