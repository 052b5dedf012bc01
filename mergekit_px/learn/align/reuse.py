"""Matrices, signs or permutations of a former run, applied to another task vector; nothing is learned."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.whole import read_tensors
from mergekit_px.errors import InputError, InputNotFoundError, PlanError
from mergekit_px.learn.align.direct import MAPS_FILE, SIGNS_FILE, gradfix, theseus
from mergekit_px.learn.align.fixed import Artefact, FixedMap, Transport
from mergekit_px.learn.align.permutations import Permutations
from mergekit_px.learn.align.rebasin import PERMUTATIONS_FILE
from mergekit_px.learn.align.rotations import ROTATIONS_FILE

SOURCE_KEY = "pxmerge.source_fingerprint"
TARGET_KEY = "pxmerge.target_fingerprint"

_FILES = (ROTATIONS_FILE, MAPS_FILE, SIGNS_FILE, PERMUTATIONS_FILE)
_MATRIX = re.compile(r"(?P<tensor>.+)\[(?P<start>\d+):(?P<stop>\d+)\]\.(?P<side>both|out|in)")
_ORDER = re.compile(r"(?P<tensor>.+)\.axis(?P<axis>\d+)")


def load_map(path: str, metadata: Mapping[str, str]) -> FixedMap:
    """What a former run wrote, as a transport.

    Args:
        path: ``rotations.safetensors`` or another of the files of that kind, or its folder.
        metadata: fingerprints of source (where it is known) and target of this run.

    Raises:
        InputError: no such file, or not of that kind.
        PlanError: it was made for other bases.
    """
    file = find_map_file(path)
    checkpoint = open_checkpoint(str(file), label=path)
    for key, part in ((SOURCE_KEY, "source"), (TARGET_KEY, "target")):
        recorded, wanted = checkpoint.metadata.get(key), metadata.get(key)
        if recorded is not None and wanted is not None and recorded != wanted:
            raise PlanError(f"it was made for another {part} base", where=path, hint="give the bases that it is for")
    arrays = read_tensors(checkpoint)
    artefact = Artefact(file.name, arrays, checkpoint.metadata)
    sides = [{name.removesuffix(end) for name in arrays if name.endswith(end)} for end in (".inputs", ".outputs")]
    if arrays and sides[0] == sides[1] and len(arrays) == len(sides[0]) + len(sides[1]):
        return FixedMap(partial(theseus, maps=arrays), artefact, {"reused": path}, across_shapes=True)
    transport = _permuting(arrays, path) or _rotating(arrays, path) or _masking(arrays, path)
    if transport is None:
        raise InputError("it is no file that `pxmerge align` transports with", where=path)
    return FixedMap(transport, artefact, {"reused": path})


def find_map_file(path: str) -> Path:
    """The file of a former run, by itself or by its folder. Raises ``InputNotFoundError``."""
    place = Path(path).expanduser()
    if place.is_dir():
        for name in _FILES:
            if (place / name).is_file():
                return place / name
        raise InputNotFoundError(f"none of {', '.join(_FILES)} is there", where=path)
    if not place.is_file():
        raise InputNotFoundError("no such file", where=path)
    return place


def _permuting(arrays: Mapping[str, Tensor], where: str) -> Transport | None:
    found = {name: _ORDER.fullmatch(name) for name in arrays}
    if not arrays or not all(found.values()):
        return None
    orders = {}
    for name, matched in found.items():
        assert matched is not None
        order = arrays[name]
        if order.dtype != torch.int64 or not torch.equal(order.sort().values, torch.arange(order.numel())):
            raise InputError(f"{shown(name)} is no permutation", where=where)
        orders[matched["tensor"], int(matched["axis"])] = order
    permutations = Permutations(orders)

    def transport(deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for (name, axis), order in orders.items():
            if name in deltas and (deltas[name].ndim <= axis or deltas[name].shape[axis] != len(order)):
                raise PlanError(f"{shown(name)} is {list(deltas[name].shape)}, which it does not fit", where=where)
        return permutations.transport(deltas)

    return transport


def _masking(arrays: Mapping[str, Tensor], where: str) -> Transport | None:
    if not arrays or any(signs.dtype != torch.int8 for signs in arrays.values()):
        return None

    def transport(deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, signs in arrays.items():
            if name in deltas and deltas[name].shape != signs.shape:
                raise PlanError(f"{shown(name)} is {list(deltas[name].shape)}, which it does not fit", where=where)
        return gradfix(deltas, {name: signs.to(deltas[name]) for name, signs in arrays.items() if name in deltas})

    return transport


def _rotating(arrays: Mapping[str, Tensor], where: str) -> Transport | None:
    found = {name: _MATRIX.fullmatch(name) for name in arrays}
    if not arrays or not all(found.values()):
        return None
    pieces: dict[tuple[str, int, int], dict[str, Tensor]] = {}
    for name, matched in found.items():
        assert matched is not None
        sides = pieces.setdefault((matched["tensor"], int(matched["start"]), int(matched["stop"])), {})
        side = matched["side"]
        sides.update(dict.fromkeys(("out", "in") if side == "both" else (side,), arrays[name]))

    def transport(deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        moved = dict(deltas)
        for (name, start, stop), sides in pieces.items():
            if name not in deltas:
                continue
            rows, columns = stop - start, deltas[name].shape[-1]
            if sides.keys() != {"out", "in"} or [len(sides["out"]), len(sides["in"])] != [rows, columns]:
                raise PlanError(f"{shown(name)} is {list(deltas[name].shape)}, which it does not fit", where=where)
            left, right = (sides[side].to(deltas[name]) for side in ("out", "in"))
            changed = moved[name].clone()
            changed[start:stop] = left.T @ deltas[name][start:stop] @ right
            moved[name] = changed
        return moved

    return transport
