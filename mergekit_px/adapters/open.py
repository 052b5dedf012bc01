"""A folder or a file -> ``Adapter``. Headers and the configuration only; no tensor is read."""

from __future__ import annotations

from pathlib import Path

from mergekit_px.adapters.adapter import Adapter
from mergekit_px.adapters.config import CONFIG_FILE, read_config
from mergekit_px.adapters.peft_keys import parse_keys
from mergekit_px.adapters.registry import family
from mergekit_px.adapters.single_file import open_single_file
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.selection import ADAPTER_FILE
from mergekit_px.errors import AdapterError, InputNotFoundError

_PICKLE_FILE = "adapter_model.bin"


def open_adapter(path: str | Path, *, label: str | None = None, allow_pickle: bool = False) -> Adapter:
    """Describe the adapter at ``path``: a PEFT folder, or a single file in a kohya, LyCORIS or diffusers style.

    Args:
        label: as the user wrote it, for messages; the path by default.
        allow_pickle: read ``adapter_model.bin`` where there is no safetensors file.

    Raises:
        InputNotFoundError: nothing there, or no configuration beside a PEFT file.
        AdapterError: a malformed or unknown configuration, an adapter that cannot be merged, names without meaning.
        MalformedCheckpointError: the weights break their format.
    """
    label = str(path) if label is None else label
    place = Path(path).expanduser()
    if not place.exists():
        raise InputNotFoundError("no such file or folder", where=label, hint="check the path")
    if place.is_file() and place.name in (ADAPTER_FILE, _PICKLE_FILE) and (place.parent / CONFIG_FILE).exists():
        place = place.parent
    if place.is_dir() and ((place / CONFIG_FILE).exists() or (place / ADAPTER_FILE).exists()):
        return _open_peft(place, label, allow_pickle)
    if place.is_dir():
        _refuse_parent(place, label)
    return open_single_file(place, label, allow_pickle=allow_pickle)


def _open_peft(folder: Path, label: str, allow_pickle: bool) -> Adapter:
    config = read_config(folder, label)
    kind = family(config)
    for name in (ADAPTER_FILE, _PICKLE_FILE):
        if (folder / name).exists():
            checkpoint = open_checkpoint(folder / name, label=f"{label}/{name}", allow_pickle=allow_pickle)
            keys = parse_keys(checkpoint.tensors, kind.parameters, label)
            if not (keys.modules or keys.whole or keys.tokens):
                raise AdapterError("the file holds no tensor", where=f"{label}/{name}")
            return Adapter(label, checkpoint, config, kind, keys)
    raise InputNotFoundError(f"there is a configuration but no {ADAPTER_FILE}", where=label)


def _refuse_parent(folder: Path, label: str) -> None:
    """Adapters with a name of their own lie in sub-folders; say which there are."""
    inside = sorted(entry.name for entry in folder.iterdir() if (entry / CONFIG_FILE).is_file())
    if inside:
        raise InputNotFoundError(
            "the folder holds several adapters, not one" if len(inside) > 1 else "the adapter is in a sub-folder",
            where=label,
            hint=f"give {', '.join(f'{label}/{name}' for name in inside[:3])}",
        )
