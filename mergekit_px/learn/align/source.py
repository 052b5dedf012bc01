"""The task vector that is transported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import torch
from torch import Tensor

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.task_vector import base_fingerprint, is_task_vector
from mergekit_px.errors import PlanError, UsageError
from mergekit_px.learn.align.settings import AlignTask
from mergekit_px.learn.life import Run
from mergekit_px.learn.models import read_tensor
from mergekit_px.learn.ofasd.blend import check_sources
from mergekit_px.learn.sources import open_source


def read_deltas(run: Run[AlignTask], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The floating-point differences, by name, in the dtype of the target.

    Raises:
        PlanError: the model is no fine-tune of the base, or the task vector was taken from another.
        UsageError: the task vector is a full model.
    """
    base = None if run.settings.source_base is None else run.checkpoint("source_base")
    if run.settings.task_vector is None:
        assert base is not None
        tuned = run.checkpoint("source_model")
        check_sources(base, [tuned])
        if is_task_vector(tuned):
            return dict(_tensors(tuned, device, dtype))
        with closing(open_reader(base)) as reader:
            return {
                name: tensor - read_tensor(reader, base.tensors[name]).to(device, dtype)
                for name, tensor in _tensors(tuned, device, dtype)
            }
    vector = run.checkpoint("task_vector")
    if not is_task_vector(vector):
        raise UsageError("it holds weights, not differences", where=vector.label, hint="give it as --source-model")
    recorded = base_fingerprint(vector)
    if base is not None and recorded is not None and run.fingerprint("source_base") != recorded:
        what = f"the task vector was taken from another base than {base.label}"
        raise PlanError(what, where=vector.label, hint="give the base that it was subtracted from")
    return dict(_tensors(vector, device, dtype))


def _tensors(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors, one after another."""
    with closing(open_source(checkpoint)) as reader:
        for name, stored in checkpoint.tensors.items():
            if stored.dtype.arithmetic:
                yield name, read_tensor(reader, stored).to(device, dtype)
