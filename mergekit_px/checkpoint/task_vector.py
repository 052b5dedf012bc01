"""How a safetensors file says that its tensors are differences from a base, not weights.

Two strings in the header's ``__metadata__`` (of every shard): the kind, and the fingerprint of the base, so
that a task vector is recognised when it is read back and is not added to a model it does not belong to.
"""

from __future__ import annotations

from mergekit_px.checkpoint.open import Checkpoint

KIND_KEY = "pxmerge.kind"
BASE_KEY = "pxmerge.base_fingerprint"
TASK_VECTOR_KIND = "task_vector"
COMPONENTS_KIND = "components"
"""Differences too, of matrices as singular components (see :mod:`mergekit_px.pools`)."""


def is_task_vector(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint holds differences."""
    return checkpoint.metadata.get(KIND_KEY) == TASK_VECTOR_KIND


def base_fingerprint(checkpoint: Checkpoint) -> str | None:
    """The fingerprint of the base that a task vector was taken from; None where none is recorded."""
    return checkpoint.metadata.get(BASE_KEY)


def task_vector_metadata(fingerprint: str | None) -> dict[str, str]:
    """The header strings of a task vector. ``fingerprint``: of its base; None where it has no single base."""
    metadata = {KIND_KEY: TASK_VECTOR_KIND}
    if fingerprint is not None:
        metadata[BASE_KEY] = fingerprint
    return metadata
