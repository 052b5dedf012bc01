"""The task vector that is transported."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.task_vector import base_fingerprint, is_task_vector
from mergekit_px.errors import PlanError, UsageError
from mergekit_px.learn.align.settings import AlignTask
from mergekit_px.learn.life import Run
from mergekit_px.learn.models import read_tensor
from mergekit_px.learn.ofasd.blend import check_sources
from mergekit_px.learn.sources import open_source


class Differences(Mapping[str, Tensor]):
    """The floating-point differences that a fine-tune or a file makes, read whenever one is asked for.

    Attributes:
        shapes: by name.
    """

    def __init__(self, tuned: Checkpoint, base: Checkpoint | None) -> None:
        self._tuned, self._base = tuned, None if is_task_vector(tuned) else base
        self._readers = [open_source(one) for one in (tuned, base) if one is not None]
        self._device, self._dtype = torch.device("cpu"), torch.float32
        self.shapes = {name: stored.shape for name, stored in tuned.tensors.items() if stored.dtype.arithmetic}

    def __getitem__(self, name: str) -> Tensor:
        values = read_tensor(self._readers[0], self._tuned.tensors[name]).to(self._device, self._dtype)
        if self._base is None:
            return values
        return values.sub_(read_tensor(self._readers[1], self._base.tensors[name]).to(self._device, self._dtype))

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
        for reader in self._readers:
            reader.close()


def open_deltas(run: Run[AlignTask]) -> Differences:
    """The task vector that is transported.

    Raises:
        PlanError: the model is no fine-tune of the base, or the task vector was taken from another.
        UsageError: the task vector is a full model.
    """
    base = None if run.settings.source_base is None else run.checkpoint("source_base")
    if run.settings.task_vector is None:
        assert base is not None
        tuned = run.checkpoint("source_model")
        check_sources(base, [tuned])
        return Differences(tuned, base)
    vector = run.checkpoint("task_vector")
    if not is_task_vector(vector):
        raise UsageError("it holds weights, not differences", where=vector.label, hint="give it as --source-model")
    recorded = base_fingerprint(vector)
    if base is not None and recorded is not None and run.fingerprint("source_base") != recorded:
        what = f"the task vector was taken from another base than {base.label}"
        raise PlanError(what, where=vector.label, hint="give the base that it was subtracted from")
    return Differences(vector, None)
