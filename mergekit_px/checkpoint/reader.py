"""Byte ranges of tensors into buffers that the caller owns and reuses. No mmap, no allocation per read."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from mergekit_px.checkpoint.contents import Checkpoint, StoredTensor
from mergekit_px.checkpoint.file_pool import FilePool
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.pieces import read_pieces
from mergekit_px.checkpoint.ranged import RangedFile, address_of, changed, check_unchanged, open_ranged
from mergekit_px.checkpoint.state_dict import MemoryReader, checkpoint_from_state_dict
from mergekit_px.errors import InputError, InputNotFoundError
from mergekit_px.stages import timed

__all__ = [
    "Ahead",
    "FileReader",
    "MemoryReader",
    "PickleReader",
    "TensorReader",
    "checkpoint_from_state_dict",
    "open_reader",
]


class TensorReader(Protocol):
    """Where the bytes of tensors come from; safe to share between threads."""

    def read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with bytes ``[start, start + len(buffer))`` of ``tensor``.

        ``buffer``: contiguous, of bytes, writable. Raises ``InputError`` naming file and tensor.
        """

    def close(self) -> None:
        """Release what is held open; a second call does nothing."""


def open_reader(checkpoint: Checkpoint, *, portable: bool = False, direct: bool = False) -> TensorReader:
    """The reader for a checkpoint on this machine; ``direct``: past the page cache where that is known to work.

    Raises ``InputError`` where its bytes are elsewhere.
    """
    if checkpoint.directory is None:
        if checkpoint.kind == "memory":
            raise InputError("its tensors are in memory", where=checkpoint.label, hint="read them by MemoryReader")
        raise InputError("its files are not on this machine", where=checkpoint.label, hint="fetch them first")
    if checkpoint.kind == "pickle":
        return PartsReader(checkpoint) if checkpoint.parts else PickleReader(checkpoint)
    return FileReader(checkpoint, portable=portable, direct=direct)


class FileReader:
    """Reads safetensors files by ``preadv``, or by seek and read with ``portable``.

    Files are opened when they are first needed and stay open; beyond a few dozen, the one that was idle the
    longest is closed. A file that changed since its header was read is refused.
    """

    def __init__(self, checkpoint: Checkpoint, *, portable: bool = False, direct: bool = False) -> None:
        if checkpoint.directory is None:
            raise InputError("its files are not on this machine", where=checkpoint.label)
        self._checkpoint = checkpoint
        self._directory = checkpoint.directory
        self._portable = portable
        self.direct = direct
        self._pool = FilePool(self._open)
        self.bytes_read: Counter[str] = Counter()
        """Of each file, about: threads may count at once."""
        self.passing: Callable[[str, int, memoryview], None] | None = None
        """Told of what is read past the page cache: file, place, bytes."""

    def read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        wanted = buffer.nbytes
        if start < 0 or start + wanted > tensor.nbytes:
            raise InputError(f"bytes {start} to {start + wanted} asked of {tensor.nbytes}", where=self._where(tensor))
        if wanted == 0:
            return
        fill = partial(self._fill, tensor)
        if tensor.pieces:
            width = tensor.dtype.bits // 8
            read_pieces(tensor.pieces, tensor.shape, width, start, buffer.cast("B"), fill)
        else:
            fill(tensor.file, tensor.offset + start, buffer.cast("B"))

    @contextmanager
    def located(self, tensor: StoredTensor) -> Iterator[tuple[int, int] | None]:
        """The descriptor of a tensor's file, open as long as the context, and the tensor's place in it; None where its
        bytes are to be had from :meth:`read_into` alone. Who reads them tells :meth:`count`."""
        with ExitStack() as stack:
            place = None
            if not tensor.pieces and self.passing is None:
                with suppress(OSError):  # which reading words
                    file = stack.enter_context(self._pool.use(tensor.file))
                    place = None if file.descriptor is None else (file.descriptor, tensor.offset)
            yield place

    def count(self, name: str, nbytes: int) -> None:
        """Add to the bytes that were read of a file."""
        self.bytes_read[name] += nbytes

    def _fill(self, tensor: StoredTensor, name: str, offset: int, buffer: memoryview) -> None:
        wanted = buffer.nbytes
        try:
            with timed("read"), self._pool.use(name) as file:
                count = file.read_into(offset, buffer)
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror or error}", where=self._where(tensor)) from error
        self.count(name, count)
        if self.passing is not None:
            self.passing(name, offset, buffer[:count])
        if count != wanted:
            raise InputError(
                f"the file ends {wanted - count} bytes early; it changed while it was read",
                where=self._where(tensor),
            )

    def close(self) -> None:
        self._pool.close()

    def _open(self, name: str) -> RangedFile:
        path = self._directory / name
        try:
            file = open_ranged(path, portable=self._portable, direct=self.direct)
        except FileNotFoundError:
            raise InputNotFoundError("the file is gone since its header was read", where=address_of(path)) from None
        expected = self._checkpoint.files[name].identity
        if expected is not None and file.identity() != expected:
            file.close()
            raise changed(path)
        return file

    def _where(self, tensor: StoredTensor) -> str:
        return f"{address_of(self._directory / tensor.file)}: {shown(tensor.name)}"


class Ahead:
    """Takes small pieces out of large reads, which a file wants that the system does not read ahead of.

    Args:
        read: fills a buffer from a byte on.
        stop: the last byte that may be read, exclusive.
        buffer: where it reads to.
    """

    def __init__(self, read: Callable[[int, memoryview], None], stop: int, buffer: memoryview) -> None:
        self._read = read
        self._stop = stop
        self._buffer = buffer
        self._begin = self._end = 0

    def __call__(self, offset: int, piece: memoryview) -> None:
        if offset < self._begin or offset + len(piece) > self._end:
            self._begin, self._end = offset, min(offset + len(self._buffer), self._stop)
            self._read(offset, self._buffer[: self._end - offset])
        place = offset - self._begin
        piece[:] = self._buffer[place : place + len(piece)]


class PickleReader:
    """Reads the tensors of PyTorch pickles; each file is mapped when it is first needed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        if checkpoint.directory is None:
            raise InputError("its files are not on this machine", where=checkpoint.label)
        self._checkpoint = checkpoint
        self._directory: Path = checkpoint.directory
        self._readers: dict[str, MemoryReader] = {}
        self._lock = threading.Lock()

    def read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        from mergekit_px.checkpoint.pickled import load_pickle

        with self._lock:
            if tensor.file not in self._readers:
                path = self._directory / tensor.file
                check_unchanged([self._checkpoint])
                self._readers[tensor.file] = MemoryReader(load_pickle(path, str(path)))
            reader = self._readers[tensor.file]
        reader.read_into(tensor, start, buffer)

    def close(self) -> None:
        with self._lock:
            self._readers.clear()


class PartsReader:
    """Reads a model in several folders of which some hold pickles, each by a reader of its own."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._readers = {folder: open_reader(part) for folder, part in checkpoint.parts.items()}

    def read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        folder = self._checkpoint.part_of(tensor.name)
        stored = self._checkpoint.parts[folder].tensors[tensor.name[len(folder) + 1 :] if folder else tensor.name]
        self._readers[folder].read_into(stored, start, buffer)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
