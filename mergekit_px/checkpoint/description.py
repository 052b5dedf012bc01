"""What the headers of single files say of the model or adapter in them, apart from its bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
