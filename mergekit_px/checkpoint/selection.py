"""Which files of a folder or a repository are its weights, by their names alone.

In the order in which it is looked at: an index and its shards; ``model.safetensors``; an adapter's
``adapter_model.safetensors``; ``diffusion_pytorch_model.safetensors``, beside which its variants may lie; one
safetensors file of any name; several without an index. Pickles (``.bin``, ``.pt``,
``.pth``, ``.ckpt``) only where there is no safetensors file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mergekit_px.checkpoint.index import INDEX_SUFFIX, index_name

SAFETENSORS_SUFFIX = ".safetensors"
MODEL_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
DIFFUSION_FILE = "diffusion_pytorch_model.safetensors"

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# The Hub's libraries number shards; a variant (fp16) is named before the numbers, or after them.
_NUMBERED = re.compile(r"(?P<before>.+-)(?P<number>\d{3,})-of-(?P<count>\d{3,})(?P<after>(\.\w+)?\.\w+)")
_MOST_SHARDS = 10_000
_PICKLE_FILES = ("pytorch_model.bin", "adapter_model.bin", "diffusion_pytorch_model.bin")
TRAINER_STATE = ("training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state", "random_states")


@dataclass(frozen=True)
class Selection:
    """The files of weights.

    Attributes:
        names: sorted; empty where an index says which.
        index: that index.
        rival: a single file of weights beside the index, which must be one that the index names.
        pickled: they are PyTorch pickles.
    """

    names: tuple[str, ...] = ()
    index: str | None = None
    rival: str | None = None
    pickled: bool = False

    def is_open(self, indexed: Iterable[str]) -> bool:
        """Whether index and single file could both be meant; ``indexed``: the files that the index names."""
        return self.rival is not None and self.rival not in indexed


def select_weights(names: Iterable[str]) -> Selection | None:
    """The weights among the names of a folder's own files; None where there are none."""
    held = sorted(names)
    weights = tuple(name for name in held if name.endswith(SAFETENSORS_SUFFIX))
    indices = [name for name in held if name.endswith(SAFETENSORS_SUFFIX + INDEX_SUFFIX)]
    for model in (MODEL_FILE, DIFFUSION_FILE):
        if index_name(model) in indices:
            return Selection(index=index_name(model), rival=model if model in weights else None)
    for single in (MODEL_FILE, ADAPTER_FILE, DIFFUSION_FILE):
        if single in weights:
            return Selection((single,))
    if len(indices) == 1:
        return Selection(index=indices[0])
    return Selection(weights) if weights else _pickles(held)


def _pickles(held: list[str]) -> Selection | None:
    for single in _PICKLE_FILES:
        if index_name(single) in held:
            return Selection(index=index_name(single), pickled=True)
        if single in held:
            return Selection((single,), pickled=True)
    others = [name for name in held if name.lower().endswith(PICKLE_SUFFIXES) and not name.startswith(TRAINER_STATE)]
    return Selection(tuple(others), pickled=True) if others else None


def missing_shards(names: Iterable[str]) -> list[str]:
    """The files that are not among ``names`` although the numbers of those that are speak of them, sorted."""
    held = set(names)
    missing: set[str] = set()
    for name in held:
        if (shard := _NUMBERED.fullmatch(name)) is not None:
            digits, count = len(shard["number"]), int(shard["count"])
            # A count that no save has is a name like any other.
            if int(shard["number"]) > count or count > _MOST_SHARDS or "{" in name or "}" in name:
                continue
            named = f"{shard['before']}{{number:0{digits}d}}-of-{shard['count']}{shard['after']}"
            first = 0 if named.format(number=0) in held else 1
            missing.update(named.format(number=number) for number in range(first, first + count))
    return sorted(missing - held)
