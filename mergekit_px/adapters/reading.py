"""Whole tensors of a checkpoint as torch tensors in their storage dtype, for steps that hold one module at a time."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from mergekit_px.checkpoint.contents import Checkpoint, StoredTensor
from mergekit_px.checkpoint.reader import TensorReader, open_reader

if TYPE_CHECKING:
    import torch


class TensorSource:
    """A checkpoint's tensors; files stay open until ``close``, or the end of the ``with`` block.

    Args:
        reader: where the bytes come from, if not from the checkpoint's files.
    """

    def __init__(self, checkpoint: Checkpoint, reader: TensorReader | None = None) -> None:
        self.checkpoint = checkpoint
        self._reader = reader or open_reader(checkpoint)

    def load(self, tensor: StoredTensor) -> torch.Tensor:
        """The tensor, in fresh memory. Raises InputError."""
        import torch

        values = torch.empty(tensor.shape, dtype=tensor.dtype.torch)
        if tensor.nbytes:
            self._reader.read_into(tensor, 0, values.reshape(-1).view(torch.uint8).numpy().data)
        return values

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
