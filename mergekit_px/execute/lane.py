"""What one worker thread owns: reused host buffers, and on CUDA a stream and pinned memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from mergekit_px.errors import UsageError

_ALIGNMENT = 64


def pick_device(text: str) -> torch.device:
    """``auto`` (CUDA where there is one, else the CPU), or any device that torch knows.

    Raises:
        UsageError: no such device here.
    """
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise UsageError(f"'{text}' is not a device", hint="write auto, cpu, cuda or cuda:1") from None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(
            f"device '{text}' cannot be used: {reason}", hint="use --device cpu, or leave it out"
        ) from None
    return device


class Lane:
    """One worker's buffers and stream.

    On CUDA each worker has its own stream and waits for it before its buffers are used again, so reading, copying
    and computing overlap between workers, and no buffer is written while a copy still reads it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[str, torch.Tensor] = {}
        make_stream: Any = torch.cuda.Stream
        self._stream: torch.cuda.Stream | None = make_stream(device) if device.type == "cuda" else None
        # Decompositions give other bits with other numbers of threads, and the setting reaches beyond this thread.
        torch.set_num_threads(1)

    def host_bytes(self, role: str, count: int) -> torch.Tensor:
        """A reused uint8 buffer of ``count`` bytes for a role; its old contents are lost."""
        buffer = self._buffers.get(role)
        if buffer is None or buffer.numel() < count:
            size = -(-max(count, 1) // _ALIGNMENT) * _ALIGNMENT
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._stream is not None)
            self._buffers[role] = buffer
        return buffer[:count]

    def release(self) -> None:
        """Give large buffers back; called after a tensor that was needed whole."""
        self._buffers.clear()

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Kernels and copies inside run on this worker's stream."""
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """The bytes on the device; on the CPU the buffer itself."""
        if self.device.type == "cpu":
            return host
        return host.to(self.device, non_blocking=self._stream is not None)

    def finish(self) -> None:
        """Wait until everything on this worker's stream is done."""
        if self._stream is not None:
            self._stream.synchronize()
