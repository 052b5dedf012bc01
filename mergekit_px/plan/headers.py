"""What the headers of the output's files say of the model: kept from the donor, extended by what was merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.task_vector import MODEL_SPEC, description

_MERGED_FROM = "modelspec.merged_from"
_FRAMEWORKS = ("pt", "tf", "flax", "mlx")
"""What libraries take for ``format``, which says how tensors of this file are laid out."""


def describing_metadata(donor: Checkpoint | None, sources: Iterable[str]) -> dict[str, dict[str, str]]:
    """The strings of each folder's headers; ``""`` where the model has no parts.

    Args:
        sources: the references of all models that are merged.
    """
    if donor is None:
        return {}
    return {folder: _kept(part.metadata, sources) for folder, part in (donor.parts or {"": donor}).items()}


def _kept(metadata: Mapping[str, str], sources: Iterable[str]) -> dict[str, str]:
    kept = description(metadata)
    if any(key.startswith(MODEL_SPEC) for key in kept):
        # Names, not paths: whoever gets the file is not on this machine.
        names = (PurePath(source).name.removesuffix(".safetensors") for source in sources)
        kept[_MERGED_FROM] = ",".join(dict.fromkeys(names))
    if metadata.get("format") in _FRAMEWORKS:
        kept["format"] = metadata["format"]
    return kept
