"""Examples for whatever learns: read from a file, checked, split by a seed, cut into batches.

A data file is safetensors or npz. Its arrays are the keyword arguments of the model's forward pass, one example to a
row, and ``labels``.
"""

from __future__ import annotations

import hashlib
import inspect
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.whole import read_tensors
from mergekit_px.errors import InputError, InputNotFoundError, UsageError

UNREADABLE_NPZ = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile raise on damaged archives, odd versions and unknown compressions."""

LABELS = "labels"
IGNORED = -100
"""The label that losses leave out, as in ``torch.nn.functional.cross_entropy``."""
TARGETS = "targets of the predictions"
COUNTED = "predictions that count"
TASK = "number of the task"
TEACHER = "teacher log-probabilities"
TEACHER_CLASSES = "classes of the teacher"
_MASKED = frozenset(("input_ids", "attention_mask", "token_type_ids", LABELS))
"""Arrays of sequences, of which only what the attention mask holds counts."""
BESIDE = frozenset((LABELS, TARGETS, COUNTED, TASK, TEACHER, TEACHER_CLASSES))
"""Arrays that lie beside the inputs of a model. But for the labels, no forward pass has arguments of such names."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Examples:
    """Arrays with one example to a row, all of the same length.

    Attributes:
        arrays: by name; ``labels`` is int64 (classes) or floating-point (values), the others as in the file.
        where: the file, for messages.
    """

    arrays: Mapping[str, Tensor]
    where: str

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def take(self, rows: Tensor) -> Examples:
        """The examples of the given row numbers, in that order."""
        return Examples({name: array[rows] for name, array in self.arrays.items()}, self.where)

    def batches(self, size: int, order: Tensor | None = None, *, whole: bool = False) -> Iterator[Batch]:
        """Consecutive batches of ``size`` rows, in ``order`` if one is given.

        With ``whole`` a last batch that is not full is left out, unless it is the only one.
        """
        order = torch.arange(len(self)) if order is None else order
        count = len(order) // size * size if whole and len(order) >= size else len(order)
        for start in range(0, count, size):
            rows = order[start : min(start + size, count)]
            yield {name: array[rows] for name, array in self.arrays.items()}


def examples(arrays: Mapping[str, Tensor], where: str) -> Examples:
    """Checked examples from arrays in memory.

    Raises:
        InputError: no ``labels`` or nothing else, lengths that differ, no rows, values that are not finite, or
            labels that are all the same.
    """
    found = ", ".join(sorted(arrays)) or "nothing"
    if LABELS not in arrays:
        raise InputError(f"it has no array {LABELS!r}, it has {shown(found)}", where=where)
    if len(arrays) < 2:
        raise InputError(f"it has {LABELS!r} and no inputs", where=where, hint="name them as the forward pass does")
    scalars = [name for name, array in arrays.items() if array.ndim == 0]
    if scalars:
        raise InputError(f"{shown(scalars[0])} is a single value; arrays need a row for each example", where=where)
    rows = len(arrays[LABELS])
    for name, array in arrays.items():
        if len(array) != rows:
            raise InputError(f"{shown(name)} has {len(array)} rows and {LABELS} has {rows}", where=where)
        if array.is_floating_point() and not bool(torch.isfinite(array).all()):
            raise InputError(f"{shown(name)} holds a NaN or an infinity", where=where)
    if rows == 0:
        raise InputError("it holds no examples", where=where)
    labels = arrays[LABELS]
    kept = {**arrays, LABELS: labels if labels.is_floating_point() else labels.long()}
    _require_several_labels(kept[LABELS], where)
    return Examples(kept, where)


def joined(parts: Sequence[Examples]) -> Examples:
    """The examples of several files, one after another; sequences that are shorter are filled up at their ends.

    Raises:
        InputError: arrays that are not in all of them, or of other shapes.
    """
    first, *others = parts
    for part in others:
        for name in sorted(first.arrays.keys() ^ part.arrays.keys()):
            raise InputError(f"only one of it and {first.where} has the array {shown(name)}", where=part.where)
    arrays = {name: _stacked(name, parts) for name in first.arrays}
    return Examples(arrays, " ".join(part.where for part in parts))


def _stacked(name: str, parts: Sequence[Examples]) -> Tensor:
    arrays = [part.arrays[name] for part in parts]
    first = arrays[0]
    masked = first.ndim == 2 and name in _MASKED and "attention_mask" in parts[0].arrays
    for array, part in zip(arrays, parts, strict=True):
        if (array.dtype, array.ndim) != (first.dtype, first.ndim) or not (masked or array.shape[1:] == first.shape[1:]):
            rows = f"{array.dtype} {list(array.shape[1:])} in a row, and {first.dtype} {list(first.shape[1:])}"
            raise InputError(f"{shown(name)} is {rows} in {parts[0].where}", where=part.where)
    if masked:
        width, fill = max(array.shape[1] for array in arrays), IGNORED if name == LABELS else 0
        arrays = [nn.functional.pad(array, (0, width - array.shape[1]), value=fill) for array in arrays]
    return torch.cat(arrays)


def read_arrays(path: str | Path) -> dict[str, Tensor]:
    """The arrays of a ``.npz`` or safetensors file, by name, in the machine's byte order.

    Raises:
        InputError: no such file, not of these formats, or not numbers.
    """
    where = str(path)
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputNotFoundError("no such data file", where=where)
    if file.suffix == ".npz":
        return _read_npz(file, where)
    if file.suffix == ".safetensors":
        return read_tensors(open_checkpoint(file, label=where))
    raise InputError(
        "data comes as .jsonl, .csv or .parquet of texts, a folder of images, or arrays in .npz or .safetensors",
        where=where,
    )


def npz_problem(error: Exception) -> str:
    """What is wrong with an archive that numpy cannot read."""
    if "Object arrays" in str(error):
        return "it holds Python objects, which are not read"
    if "pickled" in str(error):  # numpy's guess about what is no archive
        return "not a readable .npz file: it is no zip archive"
    return f"not a readable .npz file: {shown(str(error))}"


def _read_npz(path: Path, where: str) -> dict[str, Tensor]:
    import numpy

    try:
        with path.open("rb") as file, numpy.load(file, allow_pickle=False) as archive:
            loaded = {name: archive[name] for name in archive.files}
    except UNREADABLE_NPZ as error:
        raise InputError(npz_problem(error), where=where) from error
    arrays = {}
    for name, array in loaded.items():
        try:
            native = array.astype(array.dtype.newbyteorder("="), order="C")
            arrays[name] = torch.from_numpy(native)
        except (TypeError, ValueError):
            raise InputError(f"{shown(name)} holds {array.dtype}, not numbers", where=where) from None
    return arrays


def _require_several_labels(labels: Tensor, where: str) -> None:
    counted = labels[labels != IGNORED] if not labels.is_floating_point() else labels
    if counted.numel() == 0:
        raise InputError(f"every label is {IGNORED}, which is left out", where=where)
    if bool((counted == counted.flatten()[0]).all()):
        value = counted.flatten()[0].item()
        raise InputError(f"every label is {value}: nothing can be learnt from one class", where=where)


class HasForward(Protocol):
    """A module, or what stands for one."""

    forward: Callable[..., Any]


def forward_names(module: HasForward) -> tuple[set[str], set[str], bool]:
    """Of a module's forward pass: all keyword arguments, those it must have, and whether it takes any others."""
    kinds = inspect.Parameter
    parameters = inspect.signature(module.forward).parameters.values()
    named = [one for one in parameters if one.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    required = {one.name for one in named if one.default is kinds.empty}
    return {one.name for one in named}, required, any(one.kind is kinds.VAR_KEYWORD for one in parameters)


def require_arguments(module: nn.Module, names: Iterable[str], where: str) -> None:
    """Raise ``InputError`` where data does not hold what the forward pass takes."""
    given = set(names) - BESIDE
    known, required, takes_any = forward_names(module)
    problems = []
    if missing := sorted(required - given - {LABELS}):
        problems.append(f"it needs {', '.join(missing)}")
    if not takes_any and (unknown := sorted(given - known)):
        problems.append(f"it takes no {', '.join(map(shown, unknown))}")
    if problems:
        expected = ", ".join(sorted(known - {LABELS}))
        raise InputError(
            f"the arrays ({', '.join(map(shown, sorted(given)))}) are not those of the model's forward pass:"
            f" {'; '.join(problems)}",
            where=where,
            hint=f"its arguments are {expected}",
        )


def require_classes(labels: Tensor, classes: int, where: str) -> None:
    """Raise ``InputError`` for integer labels outside 0 to ``classes`` - 1 (the ignored one aside)."""
    counted = labels[labels != IGNORED]
    lowest, highest = int(counted.min()), int(counted.max())
    if lowest < 0 or highest >= classes:
        raise InputError(
            f"labels go from {lowest} to {highest}, the model has classes 0 to {classes - 1}",
            where=where,
            hint="number the classes from 0, or use a model with more outputs",
        )


def split_rows(count: int, shares: Mapping[str, float], seed: int, where: str) -> dict[str, Tensor]:
    """Row numbers for ``train`` and for each named share, drawn by the seed; every row is in exactly one part.

    A share of a non-empty set is at least one row.

    Raises:
        UsageError: shares that leave nothing to train on.
    """
    sizes = {name: max(1, round(share * count)) for name, share in shares.items()}
    if sum(sizes.values()) >= count:
        raise UsageError(
            f"{count} examples do not suffice for {', '.join(f'{size} of {name}' for name, size in sizes.items())}"
            " and training",
            where=where,
            hint="give more data or smaller shares",
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(seed, "split")))
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = order[start : start + size]
        start += size
    return {"train": order[start:], **parts}


def drawn(data: Examples, count: int | None, seed: int) -> Examples:
    """So many of the examples, drawn by the seed; all where there are no more."""
    if count is None or count >= len(data):
        return data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(derived_seed(seed)))
    return data.take(order[:count])


def derived_seed(seed: int, *labels: object) -> int:
    """A seed of 63 bits for one purpose: the same for the same labels, unrelated for others."""
    text = "\0".join(map(str, (seed, *labels)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Inside, torch's own random numbers (dropout, initial weights) come from ``seed``; outside nothing changes."""
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed keeps a note for CUDA devices at every call
        if is_cuda:
            torch.cuda.manual_seed(seed)
        yield


class BatchStream:
    """Batches without end, epoch after epoch, from a place that can be noted and returned to.

    Args:
        epoch: makes the batches of the epoch with a given number; the same number gives the same batches.
        where: for messages.
    """

    def __init__(self, epoch: Callable[[int], Iterable[Batch]], where: str) -> None:
        self._make = epoch
        self._where = where
        self.place = (0, 0)
        """Number of the current epoch, and of the batch in it that comes next."""
        self._batches: Iterator[Batch] | None = None

    def next(self) -> Batch:
        """The next batch. Raises ``InputError`` for an epoch without any."""
        if self._batches is None:
            self._batches = iter(self._make(self.place[0]))
            for _ in range(self.place[1]):
                next(self._batches, None)
        batch = next(self._batches, None)
        if batch is None:
            if self.place[1] == 0:
                raise InputError("the data has no batches", where=self._where)
            self.seek((self.place[0] + 1, 0))
            return self.next()
        self.place = (self.place[0], self.place[1] + 1)
        return batch

    def seek(self, place: tuple[int, int]) -> None:
        """Go to an epoch and a batch in it."""
        self.place = place
        self._batches = None


def shuffled(data: Examples, size: int, seed: int, label: str) -> BatchStream:
    """Endless batches of ``size`` in an order drawn anew for each epoch from (seed, label, epoch)."""

    def epoch(number: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(derived_seed(seed, "order", label, number))
        return data.batches(size, torch.randperm(len(data), generator=generator), whole=True)

    return BatchStream(epoch, data.where)


def to_device(batch: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> Batch:
    """The batch on a device, its floating-point arrays in the dtype of the model."""
    return {
        name: array.to(device, dtype) if array.is_floating_point() else array.to(device)
        for name, array in batch.items()
    }
