"""A short name for the weights of a checkpoint, cheap enough to take before every use of a task vector."""

from __future__ import annotations

import hashlib
import json

from mergekit_px.checkpoint.open import Checkpoint
from mergekit_px.checkpoint.reader import TensorReader

_SAMPLES = 4
_SAMPLE_BYTES = 64


def fingerprint(checkpoint: Checkpoint, reader: TensorReader) -> str:
    """Hex sha256 over name, dtype, shape and four samples of 64 bytes of every tensor, sorted by name.

    The samples are spread evenly, first and last bytes included; a tensor of up to 256 bytes counts whole.
    The same for sharded and unsharded saves of the same weights. It tells fine-tunes of one model apart; it
    does not prove that two files are equal. Raises ``InputError`` where a tensor cannot be read.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_SAMPLES * _SAMPLE_BYTES))
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[name]
        digest.update(json.dumps([name, tensor.dtype.name, list(tensor.shape)]).encode())
        if tensor.nbytes <= len(buffer):
            taken = buffer[: tensor.nbytes]
            reader.read_into(tensor, 0, taken)
            digest.update(taken)
            continue
        for sample in range(_SAMPLES):
            start = (tensor.nbytes - _SAMPLE_BYTES) * sample // (_SAMPLES - 1)
            taken = buffer[:_SAMPLE_BYTES]
            reader.read_into(tensor, start, taken)
            digest.update(taken)
    return digest.hexdigest()
