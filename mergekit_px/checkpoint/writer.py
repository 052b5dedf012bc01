"""Planned bytes at planned offsets, by any number of threads in any order; resumable; published at the end.

Until ``publish`` nothing in the output folder has a name that a loader would take, so a run that dies, or is
killed, leaves either the old output or none.
"""

from __future__ import annotations

import errno
import shutil
import threading
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from mergekit_px.checkpoint.background import Flusher, Hasher
from mergekit_px.checkpoint.destination import (
    DIRECTORY_LOCK,
    INPUTS_FILE,
    JOURNAL_FILE,
    PARTS_FOLDER,
    PUBLISHING_FILE,
    STAGE_FOLDER,
    Mode,
    cannot_use,
    check_mode,
    check_space,
    destination,
    published_names,
    recorded_files,
    require_folder,
)
from mergekit_px.checkpoint.file_pool import FilePool
from mergekit_px.checkpoint.held import Held
from mergekit_px.checkpoint.journal import FinishedRange, Journal, RangeSet, read_head, read_ranges
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.layout import OutputLayout
from mergekit_px.checkpoint.lock import DirectoryLock
from mergekit_px.checkpoint.positional import open_positional
from mergekit_px.checkpoint.publish import (
    PublishedCheckpoint,
    PublishedFile,
    SideFile,
    folder_lock,
    put_in_place,
    stage,
    withdraw,
)
from mergekit_px.errors import MalformedCheckpointError, OutputError, RunError, WriteError
from mergekit_px.stages import timed

_VERIFY_PIECE = 8 << 20
_JOURNAL_LINE = 64
_RESUME = "mend that and continue with --resume"


class CheckpointWriter:
    """Writes one output as its layout says.

    Args:
        directory: the output: a folder, made if it is missing, or the name of one file.
        layout: what goes where.
        plan_hash: names the plan; a run is continued only by the same plan.
        mode: ``new`` wants an empty folder; ``resume`` continues an unfinished run, or begins in an empty
            folder; ``overwrite`` begins anew and replaces an older output when the new one is complete.
        portable: use seek and write instead of ``pwrite``.
        direct: go past the page cache, where the file system is known to do that well.

    Raises ``OutputLockedError`` while another run writes there, ``OutputError`` where the folder cannot be
    used in this mode, ``DiskSpaceError``.
    """

    def __init__(
        self,
        directory: Path,
        layout: OutputLayout,
        plan_hash: str,
        *,
        mode: Mode,
        portable: bool = False,
        direct: bool = False,
    ) -> None:
        self.directory = directory
        self._layout = layout
        self._place = destination(directory)
        self._state = self._place.state
        self._mutex = threading.Lock()
        self._finished = [RangeSet() for _ in layout.shards]
        self._written = 0
        self._dirty: set[int] = set()
        self._replaces: tuple[str, ...] = ()
        self._torn = False
        self._direct = direct
        self._held = Held()
        self._pool = FilePool(
            lambda file: open_positional(self._part(file), writable=True, portable=portable, direct=direct)
        )
        self._disposable = False
        self._journal: Journal | None = None
        self._hasher: Hasher | None = None
        self._flusher: Flusher | None = None
        if self._place.file is not None and {self._place.file} != {shard.file for shard in layout.shards}:
            require_folder(directory)
        folder = self._place.folder
        self._made_directory = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not self._state.exists():
                check_mode(directory, mode, plan_hash)  # before a lock leaves a trace in somebody's folder
            self._lock = DirectoryLock.take(self._state / DIRECTORY_LOCK, str(directory))
        except OSError as error:
            raise cannot_use(directory, error) from error
        try:
            self._begin(plan_hash, mode)
        except BaseException as error:
            # What an earlier run left stays; what this one made goes.
            self._end(discard=self._disposable)
            if isinstance(error, OSError):
                raise cannot_use(directory, error) from error
            raise

    def _begin(self, plan_hash: str, mode: Mode) -> None:
        journal_path = self._state / JOURNAL_FILE
        unfinished = check_mode(self.directory, mode, plan_hash)
        if mode == "overwrite":
            self._replaces = self._older_files()
            # Files that no lock lists are known from the state alone, so it stays until the new output is there.
            self._torn = bool(published_names(self.directory))
        if unfinished is None:
            self._disposable = True
            Journal.create(journal_path, plan_hash, replaces=self._replaces).close()
            self._discard_work()
        else:
            withdraw(self.directory, {shard.file for shard in self._layout.shards})
            self._remove_staged()
        self._check_space()
        if unfinished is None:
            self._journal = Journal.reopen(journal_path)
        self._prepare_parts()
        if unfinished is not None:
            self._replaces = unfinished.replaces
            self._verify(journal_path)
            self._journal = Journal.reopen(journal_path)
        shards = self._layout.shards
        self._hasher = Hasher(
            self._pool,
            [shard.file for shard in shards],
            [shard.size for shard in shards],
            self._finished_prefix,
            self._held,
        )
        self._flusher = Flusher(self._sync, lambda: self._written)

    def _older_files(self) -> tuple[str, ...]:
        """What a finished output, or a run that was killed while it published, left under final names."""
        with suppress(OutputError):
            head = read_head(self._state / JOURNAL_FILE)
            older = head.replaces if head is not None else ()
            return tuple(dict.fromkeys([*recorded_files(self.directory), *published_names(self.directory), *older]))
        return recorded_files(self.directory)

    def _check_space(self) -> None:
        need = sum(len(name) + _JOURNAL_LINE for name in self._layout.location)
        for shard in self._layout.shards:
            need += max(0, shard.size - _allocated_bytes(self._part(shard.file)))
        check_space(self.directory, need)

    def _prepare_parts(self) -> None:
        for number, shard in enumerate(self._layout.shards):
            self._part(shard.file).parent.mkdir(parents=True, exist_ok=True)
            file = open_positional(self._part(shard.file), create=True)
            try:
                with timed("write"):
                    file.allocate(shard.size)
                file.write(0, memoryview(shard.header_bytes))
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    check_space(self.directory, shard.size)
                raise
            finally:
                file.close()
            self._finished[number].add(0, len(shard.header_bytes))

    def _verify(self, journal_path: Path) -> None:
        buffer = memoryview(bytearray(_VERIFY_PIECE))
        for recorded in read_ranges(journal_path):
            if recorded.tensor not in self._layout.location:
                continue
            number, offset, nbytes = self._layout.location[recorded.tensor]
            start, stop = offset + recorded.start, offset + recorded.stop
            if not 0 <= recorded.start < recorded.stop <= nbytes or self._finished[number].covers(start, stop):
                continue
            if self._crc32(number, start, stop, buffer) == recorded.crc32:
                self._finished[number].add(start, stop)

    def _crc32(self, number: int, start: int, stop: int, buffer: memoryview) -> int:
        crc32 = 0
        with self._pool.use(self._layout.shards[number].file) as file:
            for place in range(start, stop, len(buffer)):
                piece = buffer[: min(len(buffer), stop - place)]
                file.read_into(place, piece)
                crc32 = zlib.crc32(piece, crc32)
        return crc32

    @property
    def finished_bytes(self) -> int:
        """Bytes of tensors that are written and journalled, by this run or the one it continues."""
        with self._mutex:
            headers = sum(len(shard.header_bytes) for shard in self._layout.shards)
            return sum(ranges.total for ranges in self._finished) - headers

    @property
    def remaining_bytes(self) -> int:
        """Bytes of tensors that are still to be written."""
        return sum(nbytes for _, _, nbytes in self._layout.location.values()) - self.finished_bytes

    @property
    def inputs_file(self) -> Path:
        """Where a run may note what it reads; kept as long as it is unfinished."""
        return self._state / INPUTS_FILE

    def done(self, name: str, start: int, stop: int) -> bool:
        """Whether bytes ``[start, stop)`` of a tensor are written already; ranges may be cut in any way."""
        number, offset, _ = self._layout.location[name]
        with self._mutex:
            return self._finished[number].covers(offset + start, offset + stop)

    def write(self, name: str, start: int, buffer: memoryview) -> None:
        """Write bytes ``[start, start + len(buffer))`` of a tensor; returns when they are in the file.

        Raises ``WriteError`` where the disk refuses, ``RunError`` for bytes outside the plan.
        """
        number, offset, nbytes = self._layout.location.get(name, (0, 0, -1))
        data = buffer.cast("B") if buffer.nbytes else memoryview(b"")
        if self._journal is None:
            raise RunError("the run has ended", where=str(self.directory), hint=_RESUME)
        if start < 0 or start + len(data) > nbytes:
            raise RunError(f"bytes {start} to {start + len(data)} are not planned", where=shown(name))
        if not len(data):
            return
        file = self._layout.shards[number].file
        try:
            if self._flusher is not None and self._flusher.error is not None:
                raise self._flusher.error
            if self._direct:
                self._held.put(number, offset + start, data)
            with timed("write"), self._pool.use(file) as opened:
                opened.write(offset + start, data)
            with timed("hash"):
                crc32 = zlib.crc32(data)
            with timed("write"):
                self._journal.append(FinishedRange(name, start, start + len(data), crc32))
        except OSError as error:
            raise self._refused(error, f"{self._part(file)}: {shown(name)}") from error
        with self._mutex:
            self._finished[number].add(offset + start, offset + start + len(data))
            self._written += len(data)
            self._dirty.add(number)
        if self._hasher is not None:
            try:
                self._hasher.catch_up(self._written)
            except OSError as error:
                raise self._refused(error, str(self._part(file))) from error

    def publish(self, files: Mapping[str, SideFile]) -> PublishedCheckpoint:
        """Give the complete output its names and end the run.

        Shards first, then ``files`` in their order, the index, ``config.json`` and ``pxmerge.lock.json`` last.

        Args:
            files: name -> its bytes, a path to copy byte for byte, or a function that makes the bytes from
                the files published before it (so the lock file can hold the sha256 of all others).

        Raises ``RunError`` if bytes of tensors are missing, ``UsageError`` for a name that leaves the folder,
        ``InputError`` for a path that cannot be read, ``WriteError`` where the disk refuses; the run can be
        resumed after each.
        """
        if self._journal is None or self._hasher is None or self._flusher is None:
            raise RunError("the run has ended", where=str(self.directory), hint=_RESUME)
        self._check_complete()
        try:
            self._flusher.stop()
            if self._flusher.error is not None:
                raise self._flusher.error
            hashes = self._hasher.result()
            self._dirty = set(range(len(hashes)))
            self._sync()
            self._pool.close()
            shards = {
                shard.file: PublishedFile(shard.size, digest)
                for shard, digest in zip(self._layout.shards, hashes, strict=True)
            }
            published = stage(self.directory, {self._place.lock_file: folder_lock, **files}, self._layout, shards)
            stage_folder = self._state / STAGE_FOLDER
            staged = {name: self._part(name) if name in shards else stage_folder / name for name in published}
            put_in_place(self.directory, staged, self._replaces)
        except OSError as error:
            raise self._refused(error, str(error.filename or self.directory)) from error
        self._torn = False
        self._end(discard=True)
        return PublishedCheckpoint(self._place.folder, published)

    def _check_complete(self) -> None:
        missing = self.remaining_bytes
        if missing:
            first = next(name for name, (_, _, size) in self._layout.location.items() if not self.done(name, 0, size))
            raise RunError(
                f"{missing:,} bytes of the output were not written, the first of them in {shown(first)}",
                where=str(self.directory),
                hint=_RESUME,
            )

    def close(self, *, hopeless: bool = False) -> None:
        """End the run and give the folder free. An unfinished run can be resumed; one without a finished byte, or that
        cannot end well over the inputs that it began with, leaves nothing behind. A second call does nothing."""
        if self._journal is not None:
            self._end(discard=self.finished_bytes == 0 or (self._disposable and hopeless))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(hopeless=isinstance(error, MalformedCheckpointError))

    def _end(self, *, discard: bool) -> None:
        for follower in (self._flusher, self._hasher):
            if follower is not None:
                follower.stop()
        self._pool.close()
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._remove_staged()  # made anew by the next attempt, and it takes room
        if discard and not self._torn:
            with suppress(OSError):
                self._discard()
        unfinished = (self._state / JOURNAL_FILE).exists()
        self._lock.release(remove=not unfinished)
        if not unfinished:
            with suppress(OSError):
                self._state.rmdir()
                if self._made_directory:
                    self._place.folder.rmdir()

    def _discard(self) -> None:
        """Remove what an unfinished run consists of; the journal first, so that none is seen without its files."""
        (self._state / JOURNAL_FILE).unlink(missing_ok=True)
        (self._state / PUBLISHING_FILE).unlink(missing_ok=True)
        self._discard_work()

    def _discard_work(self) -> None:
        (self._state / INPUTS_FILE).unlink(missing_ok=True)
        shutil.rmtree(self._state / PARTS_FOLDER, ignore_errors=True)
        self._remove_staged()

    def _remove_staged(self) -> None:
        shutil.rmtree(self._state / STAGE_FOLDER, ignore_errors=True)

    def _finished_prefix(self, number: int) -> int:
        with self._mutex:
            return self._finished[number].prefix()

    def _sync(self) -> None:
        with self._mutex:
            dirty, self._dirty = self._dirty, set()
        for number in sorted(dirty):
            with timed("sync"), self._pool.use(self._layout.shards[number].file) as file:
                file.sync()

    def _part(self, file: str) -> Path:
        return self._state / PARTS_FOLDER / file

    def _refused(self, error: OSError, where: str) -> WriteError:
        return WriteError(
            f"the disk refused: {error.strerror or error}; the output is not complete and nothing of it was published"
            if not (self._state / PUBLISHING_FILE).exists()
            else f"the disk refused: {error.strerror or error}; the output is not complete",
            where=where,
            hint=_RESUME,
        )


def _allocated_bytes(path: Path) -> int:
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0
    return found.st_blocks * 512 if hasattr(found, "st_blocks") else found.st_size
