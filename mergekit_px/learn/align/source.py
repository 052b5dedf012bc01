"""The task vector that is transported."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.task_vector import base_fingerprint, is_task_vector
from mergekit_px.checkpoint.whole import read_tensor
from mergekit_px.errors import PlanError, UsageError
from mergekit_px.learn.align.settings import AlignTask
from mergekit_px.learn.life import Run
from mergekit_px.learn.ofasd.blend import check_sources
from mergekit_px.learn.sources import open_source


class Differences(Mapping[str, Tensor]):
    """The floating-point differences that fine-tunes or files make, added up; read whenever one is asked for.

    Attributes:
        shapes: by name.
    """

    def __init__(self, sources: Sequence[Checkpoint], base: Checkpoint | None) -> None:
        full = [source for source in sources if not is_task_vector(source)]
        terms = [(source, 1) for source in sources] + ([(base, -len(full))] if base is not None and full else [])
        self._terms = [(checkpoint, open_source(checkpoint), factor) for checkpoint, factor in terms]
        self._device, self._dtype = torch.device("cpu"), torch.float32
        stored = {name: tensor for source in sources for name, tensor in source.tensors.items()}
        self.shapes = {name: tensor.shape for name, tensor in stored.items() if tensor.dtype.arithmetic}

    def __getitem__(self, name: str) -> Tensor:
        (_, first), *others = [
            (factor, read_tensor(reader, checkpoint.tensors[name]).to(self._device, self._dtype))
            for checkpoint, reader, factor in self._terms
            if name in checkpoint.tensors
        ]
        for factor, values in others:
            first.add_(values, alpha=factor)
        return first

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def only(self, names: Iterable[str]) -> Differences:
        """Some of them."""
        part = copy.copy(self)
        part.shapes = {name: self.shapes[name] for name in names}
        return part

    def on(self, device: torch.device, dtype: torch.dtype) -> Differences:
        """The same on a device, in another dtype."""
        moved = copy.copy(self)
        moved._device, moved._dtype = device, dtype
        return moved

    def close(self) -> None:
        """Release the files."""
        for _, reader, _ in self._terms:
            reader.close()


def in_heads(patterns: Sequence[str], name: str) -> bool:
    """Whether a tensor is of the heads that tasks keep."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def task_heads(run: Run[AlignTask], sites: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The heads of the tasks, by the names of the target's arrays; none where tasks have the target's own.

    Raises:
        UsageError: patterns that name no tensor of a fine-tune and the target.
    """
    patterns, found = run.settings.task_heads, []
    for tuned in run.checkpoints("source_model") if patterns else ():
        if is_task_vector(tuned):
            what = "it holds differences, and a head is that of a whole fine-tune"
            raise UsageError(what, where=tuned.label, hint="give the fine-tune, or leave out --task-heads")
        names = [name for name in tuned.tensors if in_heads(patterns, name)]
        unknown = [name for name in names if name not in sites]
        if unknown or not names:
            what = f"{shown(unknown[0])} is no tensor of the target" if unknown else "it names no tensor"
            raise UsageError(f"{what} ({tuned.label})", where="--task-heads")
        with closing(open_source(tuned)) as reader:
            tensors = {name: read_tensor(reader, tuned.tensors[name]) for name in names}
        found.append({name: one.to(run.device, sites[name].dtype) for name, one in tensors.items()})
    return found


def open_deltas(run: Run[AlignTask]) -> Differences:
    """The task vector that is transported: that of one task, or the sum of several.

    Raises:
        PlanError: a model is no fine-tune of the base, or task vectors were taken from another, or of other shapes.
        UsageError: a task vector is a full model.
    """
    base = None if run.settings.source_base is None else run.checkpoint("source_base")
    if run.settings.source_model:
        assert base is not None
        tuned = run.checkpoints("source_model")
        check_sources(base, tuned, partial(in_heads, run.settings.task_heads))
        whole = Differences(tuned, base)
        return whole.only([name for name in whole if not in_heads(run.settings.task_heads, name)])
    vectors = run.checkpoints("task_vector")
    known = None if base is None else run.fingerprint("source_base")
    for vector in vectors:
        if not is_task_vector(vector):
            raise UsageError("it holds weights, not differences", where=vector.label, hint="give it as --source-model")
        recorded = base_fingerprint(vector)
        if known is not None and recorded is not None and known != recorded:
            other = base.label if base is not None else vectors[0].label
            what = f"the task vector was taken from another base than {other}"
            raise PlanError(what, where=vector.label, hint="give the base that it was subtracted from")
        known = known or recorded
        for name, stored in vector.tensors.items():
            first = vectors[0].tensors.get(name, stored)
            if first.shape != stored.shape:
                shapes = f"{list(stored.shape)}, and {list(first.shape)} in {vectors[0].label}"
                raise PlanError(f"{shown(name)} has shape {shapes}", where=vector.label)
    return Differences(vectors, None)
