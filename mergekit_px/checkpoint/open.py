"""A folder or a file of weights -> ``Checkpoint``: names, types, shapes and places. Headers only.

Which files of a folder count is said in :mod:`mergekit_px.checkpoint.selection`. Several without an index are read if
no tensor occurs twice, pickles only where the caller allows them. A folder that could be read in two ways is refused,
never guessed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_px.checkpoint.contents import CONFIG_FILE, Checkpoint, CheckpointFile, FileIdentity, StoredTensor
from mergekit_px.checkpoint.distributed import (
    SHARDING_KEY,
    distributed_place,
    open_distributed,
    refuse_unread_shards,
    shard_notes,
    tensors_of_shards,
)
from mergekit_px.checkpoint.file_kind import file_kind
from mergekit_px.checkpoint.header import Header, parse_header, read_raw_header
from mergekit_px.checkpoint.index import INDEX_SUFFIX, LARGEST_INDEX, check_index, index_name, is_inside, parse_index
from mergekit_px.checkpoint.json_text import parse_json, read_object, shown
from mergekit_px.checkpoint.parts import MODULES_FILE, PIPELINE_FILE, joined, part_folders
from mergekit_px.checkpoint.ranged import exists, files_beside, is_remote, names_in, place_of
from mergekit_px.checkpoint.selection import (
    MODEL_FILE,
    PICKLE_SUFFIXES,
    TRAINER_STATE,
    Selection,
    missing_shards,
    select_weights,
)
from mergekit_px.checkpoint.side_files import SideFiles, is_weights
from mergekit_px.errors import InputError, InputNotFoundError, MalformedCheckpointError
from mergekit_px.python_values import given_path
from mergekit_px.small_files import read_small_file

__all__ = [
    "Checkpoint",
    "CheckpointFile",
    "StoredTensor",
    "checkpoint_from_headers",
    "open_checkpoint",
]


def open_checkpoint(path: str | Path, *, label: str | None = None, allow_pickle: bool = False) -> Checkpoint:
    """Describe the checkpoint at ``path``: a folder, or one weight file, taken without its neighbours.

    ``~`` is expanded, symlinks are followed. Raises ``InputNotFoundError``, ``InputError`` (unreadable, open
    to two readings, or a pickle that was not allowed) and ``MalformedCheckpointError``.
    """
    path = path if isinstance(path, Path) else given_path(path)
    label = str(path) if label is None else label
    try:
        place = place_of(path) if isinstance(path, str) else path.expanduser()
        if place.is_dir():
            return _open_folder(place, label, allow_pickle)
        if not exists(place):
            raise InputNotFoundError("no such file or folder", where=label, hint="check the path")
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=label) from error
    if place.name.endswith(INDEX_SUFFIX):
        raise InputError("this is an index, not weights", where=label, hint=f"give its folder, {place.parent}")
    if place.name.lower().endswith(PICKLE_SUFFIXES):
        _check_pickle_allowed(place.name, label, allow_pickle, place.parent)
        return _open_pickles(place.parent, [place.name], None, label)
    return _open_files(place.parent, [place.name], None, label)


def checkpoint_from_headers(
    label: str,
    headers: Mapping[str, Header],
    sizes: Mapping[str, int],
    header_hashes: Mapping[str, str],
    index: bytes | None,
    config: Mapping[str, Any] | None,
    side_files: SideFiles,
    *,
    directory: Path | None = None,
    identities: Mapping[str, FileIdentity] | None = None,
    index_file: str = index_name(MODEL_FILE),
) -> Checkpoint:
    """Put parsed headers together, with the checks that concern several files.

    Args:
        headers: by file name, in the order in which the files count.
        sizes: of the files, in bytes.
        header_hashes: hex sha256 of the JSON bytes of each header.
        index: the bytes of the index, where there is one.
        directory: where the files are; None if not on this machine.
        identities: of the files, where they are on this machine.
        index_file: what the index is called, for messages.

    Raises ``MalformedCheckpointError`` where index and files disagree, ``InputError`` where there is no index
    and a tensor occurs in two files.
    """
    where = f"{label}/{index_file}"
    sharded = any(SHARDING_KEY in header.metadata for header in headers.values())
    if index is not None and not sharded:
        weight_map = parse_index(index, where)
        for file in weight_map.values():
            if file not in headers:
                raise _missing_shard(file, where)
        check_index(weight_map, {file: header.entries for file, header in headers.items()}, where)
    tensors: dict[str, StoredTensor] = tensors_of_shards(headers, label) if sharded else {}
    for file, header in headers.items() if not sharded else ():
        for entry in header.entries.values():
            if entry.name in tensors:
                raise InputError(
                    f"{shown(entry.name)} is both in {tensors[entry.name].file} and in {file}, and no index says"
                    " which counts",
                    where=label,
                    hint="give one of the files itself",
                )
            tensors[entry.name] = StoredTensor(
                name=entry.name,
                dtype=entry.dtype,
                shape=entry.shape,
                file=file,
                offset=header.data_start + entry.begin,
                nbytes=entry.end - entry.begin,
            )
    files = {
        file: CheckpointFile(file, sizes[file], header.metadata, header_hashes[file], (identities or {}).get(file))
        for file, header in headers.items()
    }
    notes = shard_notes(headers, label) if sharded else ()
    return Checkpoint(label, directory, files, tensors, config, side_files.carried, side_files.left_behind, notes=notes)


def component_folder(pipeline: Path, component: str, label: str) -> Path | None:
    """Where a component of a pipeline is; None if the folder is no model in several folders.

    Raises:
        InputNotFoundError: there are others; it names them.
    """
    folder = pipeline / component
    if is_inside(component) and folder.is_dir():
        return folder
    if not any((pipeline / name).is_file() for name in (PIPELINE_FILE, MODULES_FILE)):
        return None
    parts = open_checkpoint(pipeline, label=label, allow_pickle=True).parts
    raise InputNotFoundError(
        f"no component {shown(component)} is there", where=label, hint=f"it has {', '.join(filter(None, parts))}"
    )


def check_numbers(files: Iterable[str], label: str, index_file: str | None) -> None:
    """Refuse shards whose numbers say that one is missing. Raises ``MalformedCheckpointError``."""
    missing = missing_shards(files)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        said = "the numbers of the shards speak of" if index_file is None else f"{index_file} leaves out"
        raise MalformedCheckpointError(
            f"{said} {missing[0]}{more}, which would be missing from the model",
            where=label,
            hint="fetch or copy the checkpoint again",
        )


def _open_folder(folder: Path, label: str, allow_pickle: bool) -> Checkpoint:
    names = names_in(folder)
    folders = _part_folders(folder, names, label)
    if not folders:
        return _open_plain_folder(folder, names, label, allow_pickle)
    parts = {}
    for name in folders:
        inside = names_in(folder / name)
        parts[name] = _open_plain_folder(folder / name, inside, f"{label}/{name}" if name else label, allow_pickle)
    whole = joined(label, folder, parts, SideFiles())
    beside = files_beside(folder, whole.files, folders)
    return replace(whole, side_files=beside.carried, left_behind=beside.left_behind)


def _part_folders(folder: Path, names: Sequence[str], label: str) -> tuple[str, ...]:
    if PIPELINE_FILE not in names and MODULES_FILE not in names:
        return ()
    files = []
    for name in names:
        inside = folder / name
        files += [f"{name}/{entry}" for entry in names_in(inside)] if inside.is_dir() else [name]

    def read(name: str) -> Any:
        where = f"{label}/{name}"
        return parse_json(read_small_file(folder / name, where, folder=folder), where, strict=False)

    return part_folders(files, read, label)


def _open_plain_folder(folder: Path, names: Sequence[str], label: str, allow_pickle: bool) -> Checkpoint:
    chosen = select_weights(names)
    if chosen is None or chosen.pickled:
        place = distributed_place(folder, names)
        if place is not None:
            checkpoint = open_distributed(folder, place, label)
            beside = files_beside(folder, checkpoint.files)
            return replace(
                checkpoint,
                config=_read_config(folder, label),
                side_files=beside.carried,
                left_behind=beside.left_behind,
            )
        refuse_unread_shards(names, label)
    if chosen is None:
        raise _no_weights(folder, names, label)
    unfinished = next((f"{name}.aria2" for name in chosen.names if f"{name}.aria2" in names), None)
    if unfinished is not None:
        raise MalformedCheckpointError(
            f"{unfinished} says that a download is not finished", where=label, hint="go on with the download"
        )
    if chosen.pickled:
        return _open_pickle_folder(folder, chosen, label, allow_pickle)
    if chosen.index is None:
        check_numbers(chosen.names, label, None)
        return _open_files(folder, chosen.names, None, label, whole_folder=True)
    raw = _read_index(folder, chosen.index, label)
    files = sorted(set(parse_index(raw, f"{label}/{chosen.index}").values()))
    if chosen.is_open(files):
        raise InputError(
            f"it holds both {chosen.rival} and an index of other files, so which weights are meant is open",
            where=label,
            hint="remove one, or give the file itself",
        )
    checkpoint = _open_files(folder, files, raw, label, whole_folder=True, index_file=chosen.index)
    check_numbers(files, label, chosen.index)
    return checkpoint


def _open_files(
    folder: Path,
    names: Sequence[str],
    index: bytes | None,
    label: str,
    *,
    whole_folder: bool = False,
    index_file: str = index_name(MODEL_FILE),
) -> Checkpoint:
    headers: dict[str, Header] = {}
    sizes: dict[str, int] = {}
    hashes: dict[str, str] = {}
    identities: dict[str, FileIdentity] = {}
    for name in names:
        where = f"{label}/{shown(name)}" if whole_folder else label
        try:
            raw, identities[name] = read_raw_header(folder / name, where)
            headers[name] = parse_header(raw, identities[name].size, where)
        except InputNotFoundError:
            if index is not None:
                raise _missing_shard(name, f"{label}/{index_file}") from None
            raise
        except MalformedCheckpointError:
            kind = file_kind(folder / name)
            if kind is None:
                raise
            raise MalformedCheckpointError(
                f"not a safetensors file but {kind.name}",
                where=where,
                hint="rename it to .bin, and allow it with --allow-pickle" if kind.pickled else kind.hint,
            ) from None
        sizes[name] = identities[name].size
        hashes[name] = hashlib.sha256(raw).hexdigest()
    config = _read_config(folder, label) if whole_folder else None
    carried = files_beside(folder, names) if whole_folder else SideFiles()
    return checkpoint_from_headers(
        label,
        headers,
        sizes,
        hashes,
        index,
        config,
        carried,
        directory=folder,
        identities=identities,
        index_file=index_file,
    )


def _no_weights(folder: Path, names: Sequence[str], label: str) -> InputError:
    """Say what the folder holds instead."""
    hint = "a checkpoint has *.safetensors files directly in it"
    part = next((name for name in sorted(names) if name.endswith((".part", ".incomplete", ".crdownload"))), None)
    weights = [name for name in sorted(names) if is_weights(name) and not name.startswith(TRAINER_STATE)]
    other = next((name for name in weights if (folder / name).is_file()), None)
    if part is not None:
        return InputNotFoundError(f"the folder holds no weights but {part}, which is unfinished", where=label)
    if other is not None:
        kind = file_kind(folder / other)
        told = f"is {kind.name}" if kind is not None else "has another format"
        return InputNotFoundError(
            f"the folder holds no safetensors weights; {other} {told}", where=label, hint=kind.hint if kind else hint
        )
    inside = sorted(name for name in names if (folder / name).is_dir() and _holds_weights(folder / name))
    if inside:
        hint = f"give one of its folders with weights: {', '.join(f'{label}/{name}' for name in inside[:5])}"
    return InputNotFoundError("the folder holds no weights", where=label, hint=hint)


def _holds_weights(folder: Path) -> bool:
    try:
        return select_weights(names_in(folder)) is not None
    except OSError:
        return False


def _missing_shard(file: str, where: str) -> MalformedCheckpointError:
    return MalformedCheckpointError(
        f"the index names {shown(file)}, which is missing", where=where, hint="fetch or copy the checkpoint again"
    )


def _open_pickle_folder(folder: Path, chosen: Selection, label: str, allow_pickle: bool) -> Checkpoint:
    if chosen.index is not None:
        where = f"{label}/{chosen.index}"
        weight_map = parse_index(_read_index(folder, chosen.index, label), where)
        names = sorted(set(weight_map.values()))
        for name in names:
            _check_pickle_allowed(name, label, allow_pickle, folder)
        return _open_pickles(folder, names, weight_map, label, whole_folder=True)
    if len(chosen.names) > 1:
        raise InputError(
            f"it holds {len(chosen.names)} PyTorch pickles ({chosen.names[0]}, ...) and no index",
            where=label,
            hint="give the file itself",
        )
    _check_pickle_allowed(chosen.names[0], label, allow_pickle, folder)
    return _open_pickles(folder, chosen.names, None, label, whole_folder=True)


def _open_pickles(
    folder: Path,
    names: Sequence[str],
    weight_map: Mapping[str, str] | None,
    label: str,
    *,
    whole_folder: bool = False,
) -> Checkpoint:
    from mergekit_px.checkpoint.pickled import describe_pickles

    if whole_folder:
        check_numbers(names, label, None if weight_map is None else "the index")
    places = {name: f"{label}/{shown(name)}" if whole_folder else label for name in names}
    files, tensors = describe_pickles(folder, places, weight_map, label)
    config = _read_config(folder, label) if whole_folder else None
    beside = files_beside(folder, names) if whole_folder else SideFiles()
    return Checkpoint(label, folder, files, tensors, config, beside.carried, beside.left_behind, kind="pickle")


def _check_pickle_allowed(name: str, label: str, allow_pickle: bool, folder: Path) -> None:
    if is_remote(folder / name):
        raise InputError(
            f"{name} is a PyTorch pickle, and those are read from this machine only",
            where=label,
            hint="copy it here, or convert it to safetensors",
        )
    if not allow_pickle:
        raise InputError(
            f"{name} is a PyTorch pickle, which is not read unless asked for",
            where=label,
            hint="allow it with --allow-pickle, or convert it to safetensors",
        )


def _read_index(folder: Path, name: str, label: str) -> bytes:
    return read_small_file(folder / name, f"{label}/{name}", folder=folder, limit=LARGEST_INDEX)


def _read_config(folder: Path, label: str) -> dict[str, Any] | None:
    if not os.path.lexists(folder / CONFIG_FILE):
        return None
    # Not strict: models that work have an Infinity in their configuration.
    return read_object(folder / CONFIG_FILE, f"{label}/{CONFIG_FILE}", strict=False, folder=folder)
