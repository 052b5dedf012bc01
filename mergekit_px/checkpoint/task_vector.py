"""What the headers of safetensors files say of what is in them: differences or weights, of which base, by whom.

Differences have two strings in the header's ``__metadata__`` (of every shard): the kind, and the fingerprint of the
base, so that a task vector is recognised when it is read back and is not added to a model it does not belong to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


MODEL_SPEC = "modelspec."
"""What the names of the specification of single-file models begin with."""

_DESCRIBING = (MODEL_SPEC, "ss_")
"""The second is of kohya's trainers."""

_OF_THE_BYTES = ("modelspec.hash_sha256", "modelspec.date")
"""What holds for one file alone."""


def description(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries of a header that describe what is in the file and stay true of what is made of it."""
    return {key: text for key, text in metadata.items() if key.startswith(_DESCRIBING) and key not in _OF_THE_BYTES}


def common_description(headers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The entries in which several files agree."""
    first, *others = [description(metadata) for metadata in headers] or [{}]
    return {key: text for key, text in first.items() if all(other.get(key) == text for other in others)}
