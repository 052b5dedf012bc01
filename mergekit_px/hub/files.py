"""Which files of a repository a merge needs, and its small ones whole, through the client's cache.

The weights are found by the rule of `mergekit_px.checkpoint.selection`, applied to the names in the repository, so
that a fetched model opens as the same checkpoint as its remote headers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_px.checkpoint.contents import CONFIG_FILE
from mergekit_px.checkpoint.destination import LOCK_FILE, RECIPE_FILE
from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.index import INDEX_SUFFIX, parse_index
from mergekit_px.checkpoint.json_text import parse_json
from mergekit_px.checkpoint.open import check_numbers
from mergekit_px.checkpoint.parts import part_folders
from mergekit_px.checkpoint.selection import select_weights
from mergekit_px.checkpoint.side_files import SideFiles, sort_files
from mergekit_px.errors import HubError, InputError, InputNotFoundError
from mergekit_px.hub.client import answer_timeout, byte_counter, hub_api, is_offline, quiet_client
from mergekit_px.hub.errors import hub_errors
from mergekit_px.hub.repository import ResolvedRepo
from mergekit_px.small_files import read_small_file

LARGEST_SMALL_FILE = 200_000_000
"""Bytes. An index of a million tensors has about a tenth; more is not read into memory."""

_DESCRIPTIONS = (CONFIG_FILE, "adapter_config.json", "README.md")
_CUT_SHORT = "run it again; if it stays so, report it to the owner of the repository"


@dataclass(frozen=True)
class WeightFiles:
    """The files of weights, sorted; the index that names them, if one does, with its bytes."""

    names: tuple[str, ...]
    index_name: str | None = None
    index: bytes | None = None


@dataclass(frozen=True)
class NeededFiles:
    """``weights``, and what describes them or travels with them: ``described``."""

    described: tuple[str, ...]
    weights: tuple[str, ...]


def weight_files(resolved: ResolvedRepo, *, allow_pickle: bool = False) -> WeightFiles:
    """The weights directly in a repository, or in the folder of it that is meant; reads the index, if there is one.

    Raises:
        InputError: no weights, only pickles that are not allowed, or weights that could mean two things.
        HubError: the index cannot be had.
    """
    chosen = select_weights(name for name in resolved.files if "/" not in name)
    if chosen is None:
        gone = "in the cache" if is_offline() else "there"
        raise InputNotFoundError(f"no weights are {gone}: no .safetensors file", where=str(resolved))
    if chosen.pickled and not allow_pickle:
        first = chosen.names[0] if chosen.index is None else chosen.index.removesuffix(INDEX_SUFFIX)
        raise InputError(
            f"its weights are PyTorch pickles ({first}), which are not read unless asked for",
            where=str(resolved),
            hint=f"`pxmerge pull {resolved.repo} --allow-pickle`, and merge the folder that it prints",
        )
    check_numbers(chosen.names, str(resolved), None)
    if chosen.index is None:
        return WeightFiles(chosen.names)
    indexed = _indexed(resolved, chosen.index)
    if chosen.is_open(indexed.names):
        raise InputError(
            f"both {chosen.rival} and an index of other files are there, so which weights are meant is open",
            where=str(resolved),
            hint="download the one that is meant, and give the file itself",
        )
    return indexed


def parts_of(resolved: ResolvedRepo) -> tuple[str, ...]:
    """The folders of a model in several, ``("",)`` for a plain one. Reads its list of them, if it has one.

    Raises:
        InputError: the list cannot be read, or names what is not there.
        HubError: the list cannot be had.
    """

    def read(name: str) -> Any:
        return parse_json(read_small(resolved, name), f"{resolved}/{name}", strict=False)

    return part_folders(resolved.files, read, str(resolved)) or ("",)


def needed_files(resolved: ResolvedRepo, *, allow_pickle: bool = False, record: bool = False) -> NeededFiles:
    """What a merge reads of a repository, all its parts included. Raises as ``weight_files`` and ``parts_of`` do.

    Args:
        record: also lock and recipe of a repository that is a merge itself, so that it can be verified.
    """
    parts = parts_of(resolved)
    weights: list[str] = []
    described = list(small_files(resolved, parts))
    described += [name for name in (RECIPE_FILE, LOCK_FILE) if record and name in resolved.files]
    for folder in parts:
        found = weight_files(resolved.within(folder), allow_pickle=allow_pickle)
        start = f"{folder}/" if folder else ""
        weights += [start + name for name in found.names]
        described += [start + found.index_name] if found.index_name is not None else []
    return NeededFiles(tuple(described), tuple(weights))


def side_files(resolved: ResolvedRepo, weights: Collection[str], parts: Collection[str] = ()) -> SideFiles:
    """Which files of a repository travel with the weights, and which stay behind."""
    return sort_files({name: file.size for name, file in resolved.files.items()}, weights, parts)


def small_files(resolved: ResolvedRepo, parts: Collection[str] = ()) -> tuple[str, ...]:
    """Everything beside weights and index that describes the model or travels with it, sorted.

    The model card is among them: it tells licence and base models when the Hub is out of reach.
    """
    described = {name for name in resolved.files if name in _DESCRIPTIONS}
    return tuple(sorted(described.union(side_files(resolved, (), parts).carried)))


def read_small(resolved: ResolvedRepo, name: str) -> bytes:
    """The bytes of a config or an index: from the cache, else downloaded into it."""
    size = resolved.files[name].size
    if size > LARGEST_SMALL_FILE:
        raise HubError(f"{name} has {size} bytes, too many for a description", where=str(resolved))
    with quiet_client():
        return read_small_file(download(resolved, name), f"{resolved}/{name}", limit=LARGEST_SMALL_FILE)


def download(
    resolved: ResolvedRepo, name: str, report: Callable[[int], None] = lambda count: None, *, verify_cached: bool = True
) -> Path:
    """One file of the pinned commit as a path in the cache, whole or not at all.

    Args:
        report: called with the number of bytes written, while they arrive.
        verify_cached: check the bytes of a file that the cache has already; those that arrive are always checked.

    Raises:
        HubError: the file cannot be had, or not with the size and the sha256 that the Hub lists.
    """
    listed = resolved.files[name]
    verify = verify_cached or not _is_cached(resolved, name)
    path = _download(resolved, name, report, again=False)
    for attempt in ("again", "last"):
        size = path.stat().st_size
        if size == listed.size and not (verify and listed.sha256 not in (None, file_sha256(path))):
            return path
        if attempt == "again" and not is_offline():
            path = _download(resolved, name, report, again=True)
            verify = True
    if size == listed.size:
        raise not_as_listed(name, str(resolved))
    raise HubError(f"{name} has {size} bytes where the Hub lists {listed.size}", where=str(resolved), hint=_CUT_SHORT)


def not_as_listed(name: str, where: str) -> HubError:
    """The error for a file whose bytes are not those that the Hub lists."""
    return HubError(
        f"the bytes of {name} do not have the sha256 that the Hub lists",
        where=where,
        hint="`pxmerge pull` fetches it again; if it stays so, report it to the owner of the repository",
    )


def _is_cached(resolved: ResolvedRepo, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(resolved.repo, resolved.path(name), revision=resolved.commit), str)


def _download(resolved: ResolvedRepo, name: str, report: Callable[[int], None], *, again: bool) -> Path:
    with hub_errors(resolved.repo, resolved.revision, f"downloading {name}"):
        path = hub_api().hf_hub_download(
            resolved.repo,
            resolved.path(name),
            revision=resolved.commit,
            etag_timeout=answer_timeout(),
            force_download=again,
            tqdm_class=byte_counter(report),
        )
    return Path(str(path))


def _indexed(resolved: ResolvedRepo, index: str) -> WeightFiles:
    raw = read_small(resolved, index)
    names = sorted(set(parse_index(raw, f"{resolved}/{index}").values()))
    for name in names:
        if name not in resolved.files:
            gone = "is not in the cache" if is_offline() else "is not in the repository"
            raise HubError(
                f"{index} names {name}, which {gone}",
                where=str(resolved),
                hint=f"unset HF_HUB_OFFLINE, or run `pxmerge pull {resolved.repo}` while online"
                if is_offline()
                else "the upload is incomplete; try another revision",
            )
    return WeightFiles(tuple(names), index, raw)
