"""What learners take task vectors from: fine-tunes, files of differences, and adapters, which are read as differences.

An adapter is described as the file of differences that it stands for. Its tensors are computed when they are read, one
at a time, so that nothing has to be merged first.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_px.adapters.adapter import Adapter, Binding
from mergekit_px.adapters.open import open_adapter
from mergekit_px.checkpoint.contents import Checkpoint, CheckpointFile, StoredTensor
from mergekit_px.checkpoint.dtypes import dtype_of
from mergekit_px.checkpoint.fingerprint import fingerprint
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.ranged import place_of
from mergekit_px.checkpoint.reader import TensorReader, open_reader
from mergekit_px.checkpoint.task_vector import is_task_vector, task_vector_metadata
from mergekit_px.checkpoint.whole import read_tensor
from mergekit_px.errors import NonFiniteError, PlanError
from mergekit_px.plan.inputs import ResolvedInput, fetch_reference, is_adapter
from mergekit_px.plan.tokenizers import Tokenizers

_FLOAT = dtype_of(torch.float32)
_FILE = "differences"


@dataclass(frozen=True)
class AdapterSource(Checkpoint):
    """An adapter on a base, described as the differences that it makes: float32, by the names of the base."""

    base: Checkpoint | None = None
    adapter: Adapter | None = None
    changes: Binding | None = None


def find_source(reference: str, base: Checkpoint, *, allow_pickle: bool = False) -> Checkpoint:
    """A fine-tune of ``base``, a file of differences or an adapter, here or on the Hub (which is fetched).

    Raises:
        InputError: missing, unreachable or malformed.
        AdapterError: an adapter that does not fit the base.
    """
    place, _ = fetch_reference(reference, allow_pickle=allow_pickle)
    if not is_adapter(str(place), allow_pickle):
        return open_checkpoint(place, label=reference, allow_pickle=allow_pickle)
    adapter = open_adapter(place_of(str(place), whole=True), label=reference, allow_pickle=allow_pickle)
    changes = adapter.bind(base)
    tensors = {}
    for name, stored in base.tensors.items():
        dtype = _FLOAT if stored.dtype.arithmetic else stored.dtype
        shape = changes[name].out_shape if name in changes else stored.shape
        nbytes = StoredTensor(name, dtype, shape, "", 0, 0).elements * dtype.bits // 8
        tensors[name] = StoredTensor(name, dtype, shape, _FILE, 0, nbytes)
    file = CheckpointFile(_FILE, 0, task_vector_metadata(None), "")
    return AdapterSource(reference, adapter.checkpoint.directory, {_FILE: file}, tensors, kind="memory", base=base,
                         adapter=adapter, changes=changes)  # fmt: skip


def require_same_tokens(base: Checkpoint, sources: Sequence[Checkpoint]) -> None:
    """Raise ``PlanError`` where a source's tokenizer has other tokens than the base's, so that it predicts other words.

    Sources without a tokenizer are taken to have the base's.
    """
    tokenizers = Tokenizers()
    own = tokenizers.of(ResolvedInput("base", base.label, base))
    for number, source in enumerate(sources):
        if own is None or isinstance(source, AdapterSource) or is_task_vector(source):
            continue
        other = tokenizers.of(ResolvedInput(f"source {number}", source.label, source))
        if other is None:
            continue
        ids = sorted(own.tokens.keys() & other.tokens.keys())
        differing = [number for number in ids if own.tokens[number] != other.tokens[number]]
        if differing:
            first = differing[0]
            raise PlanError(
                f"its vocabulary is another than that of {base.label}: {len(differing)} tokens differ, the first,"
                f" {first}, is {shown(other.tokens[first])} and {shown(own.tokens[first])} there",
                where=source.label,
                hint="predictions of other tokens cannot teach; use fine-tunes with the base's tokenizer",
            )


def open_source(source: Checkpoint) -> TensorReader:
    """The reader of what `find_source` gives."""
    return _AdapterReader(source) if isinstance(source, AdapterSource) else open_reader(source)


def stored_source(source: Checkpoint) -> Checkpoint:
    """The checkpoint whose files hold a source."""
    return source.adapter.checkpoint if isinstance(source, AdapterSource) and source.adapter is not None else source


class _AdapterReader:
    """Reads the differences that an adapter makes; the one that was read last is kept."""

    def __init__(self, source: AdapterSource) -> None:
        assert source.base is not None and source.adapter is not None and source.changes is not None
        self._base, self._adapter, self._changes = source.base, source.adapter, source.changes
        self._base_reader = open_reader(self._base)
        self._reader = open_reader(self._adapter.checkpoint)
        self._last: tuple[str, Tensor] | None = None

    def read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with bytes of a difference. Raises ``InputError`` where a file cannot be read."""
        if tensor.name not in self._changes:
            if tensor.dtype.arithmetic:
                buffer[:] = bytes(len(buffer))
            else:
                self._base_reader.read_into(self._base.tensors[tensor.name], start, buffer)
            return
        if self._last is None or self._last[0] != tensor.name:
            self._last = (tensor.name, self._difference(tensor.name))
        array: Any = self._last[1].reshape(-1).view(torch.uint8).numpy()
        buffer[:] = memoryview(array)[start : start + len(buffer)]

    def close(self) -> None:
        """Release the files."""
        self._base_reader.close()
        self._reader.close()

    def _difference(self, name: str) -> Tensor:
        patch = self._changes[name]
        factors = {role: read_tensor(self._reader, stored) for role, stored in patch.factors.items()}
        own = self._base_tensor(name)
        if patch.source == name:
            change = patch.change(own, factors)
        else:
            block = None if patch.source is None else self._base_tensor(patch.source)
            change = patch.merged(block, factors).float() - own
        if not bool(torch.isfinite(change).all()):
            raise NonFiniteError(f"{name}: the adapter's change is NaN or infinite", where=self._adapter.label)
        return change.float().contiguous()

    def _base_tensor(self, name: str) -> Tensor:
        return read_tensor(self._base_reader, self._base.tensors[name]).float()


def source_fingerprint(source: Checkpoint) -> str:
    """A short name for the weights or differences of a source."""
    with closing(open_source(source)) as reader:
        return fingerprint(source, reader)
