"""Resolve and pin: a reference becomes a commit, its list of files, and a checkpoint known by its headers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_px.checkpoint.index import is_inside
from mergekit_px.checkpoint.json_text import parse_object, shown
from mergekit_px.checkpoint.parts import joined
from mergekit_px.checkpoint.side_files import SideFiles
from mergekit_px.errors import HubError, InputError
from mergekit_px.hub.client import answer_timeout, cache_folder, hub_api, is_offline, patiently
from mergekit_px.hub.errors import hub_errors
from mergekit_px.hub.files import parts_of, read_small, side_files, weight_files
from mergekit_px.hub.ranges import read_remote_header
from mergekit_px.hub.reference import HubReference
from mergekit_px.hub.repository import RemoteFile, ResolvedRepo
from mergekit_px.small_files import read_small_file

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

    from mergekit_px.checkpoint.open import Checkpoint

__all__ = ["RemoteFile", "ResolvedRepo", "remote_checkpoint", "resolve"]

HEADERS_AT_ONCE = 8

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CARD_KEYS = ("license", "license_name", "base_model")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def resolve(reference: HubReference) -> ResolvedRepo:
    """What ``reference`` means now: one request to the Hub; offline, what the cache remembers.

    Raises:
        HubError: no such repository or revision, no access, no answer, or nothing in the cache.
    """
    return _resolve_cached(reference) if is_offline() else _resolve_remote(reference)


def remote_checkpoint(resolved: ResolvedRepo) -> Checkpoint:
    """The checkpoint by its headers: no byte of a weight is read, and no weight file is stored.

    Config and index come whole, through the cache; each header takes two ranged requests, several files at
    a time, or none where the cache holds the file.

    Raises:
        HubError: something cannot be had.
        InputError: no weights in safetensors, or `MalformedCheckpointError`.
    """
    folders = parts_of(resolved)
    if folders == ("",):
        return _plain_checkpoint(resolved)
    parts = {folder: _plain_checkpoint(resolved.within(folder)) for folder in folders}
    whole = joined(str(resolved), None, parts, SideFiles())
    beside = side_files(resolved, whole.files, folders)
    return replace(whole, side_files=beside.carried, left_behind=beside.left_behind)


def _plain_checkpoint(resolved: ResolvedRepo) -> Checkpoint:
    from mergekit_px.checkpoint.open import checkpoint_from_headers

    weights = weight_files(resolved)
    config = _config(resolved)
    with ThreadPoolExecutor(max_workers=HEADERS_AT_ONCE) as pool:
        found = list(pool.map(lambda name: read_remote_header(resolved, name), weights.names))
    headers = dict(zip(weights.names, found, strict=True))
    return checkpoint_from_headers(
        str(resolved),
        {name: header for name, (header, _) in headers.items()},
        {name: resolved.files[name].size for name in weights.names},
        {name: digest for name, (_, digest) in headers.items()},
        weights.index,
        config,
        side_files(resolved, weights.names),
    )


def _resolve_remote(reference: HubReference) -> ResolvedRepo:
    repo, revision = reference.repo, reference.revision
    with hub_errors(repo, revision, "looking it up"):
        info = patiently(
            lambda: hub_api().model_info(repo, revision=revision, files_metadata=True, timeout=answer_timeout())
        )
        commit = info.sha if isinstance(info.sha, str) else ""
        files = {each.rfilename: _remote_file(each, reference) for each in info.siblings or ()}
        card = {key: info.card_data.get(key) for key in _CARD_KEYS} if info.card_data is not None else {}
    if not _COMMIT.fullmatch(commit):
        raise HubError("the answer names no commit", where=str(reference), hint="check HF_ENDPOINT")
    return ResolvedRepo(repo, revision, commit, files, _license(card), _base_models(card))


def _resolve_cached(reference: HubReference) -> ResolvedRepo:
    repo, revision = reference.repo, reference.revision
    folder = cache_folder(repo)
    commit = revision or "main"
    if not _COMMIT.fullmatch(commit):
        reference_file = folder / "refs" / commit
        commit = _noted_commit(reference_file)
    snapshot = folder / "snapshots" / commit
    if not commit or not snapshot.is_dir():
        raise HubError(
            "offline mode is on and this is not in the cache",
            where=str(reference),
            hint=f"unset HF_HUB_OFFLINE, or run `pxmerge pull {reference}` while online",
        )
    paths = sorted(path for path in snapshot.rglob("*") if path.is_file())
    files = {path.relative_to(snapshot).as_posix(): _cached_file(path) for path in paths}
    card = _cached_card(snapshot / "README.md")
    return ResolvedRepo(repo, revision, commit, files, _license(card), _base_models(card))


def _remote_file(sibling: RepoSibling, reference: HubReference) -> RemoteFile:
    if not is_inside(sibling.rfilename):
        name = shown(sibling.rfilename)
        raise HubError(f"it lists {name}, which is no path inside a repository", where=str(reference))
    if sibling.size is None:
        raise HubError(f"the size of {sibling.rfilename} is not told", where=str(reference), hint="check HF_ENDPOINT")
    sha256 = sibling.lfs.sha256 if sibling.lfs is not None else None
    if type(sibling.size) is not int or sibling.size < 0 or not isinstance(sha256, str | None):
        raise TypeError(f"size and hash of {shown(sibling.rfilename)} are of odd types")
    return RemoteFile(sibling.size, sha256)


def _noted_commit(path: Path) -> str:
    """The commit that the cache notes for a branch; empty where it notes none."""
    try:
        return read_small_file(path, limit=200).decode("ascii").strip()
    except (InputError, UnicodeDecodeError):
        return ""


def _cached_file(path: Path) -> RemoteFile:
    # The cache names a blob by its etag, which is the sha256 for large files.
    blob = path.resolve().name
    return RemoteFile(path.stat().st_size, blob if _SHA256.fullmatch(blob) else None)


def _cached_card(path: Path) -> Mapping[str, Any]:
    from huggingface_hub import metadata_load

    if not path.is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except (ValueError, RecursionError):
        return {}


def _config(resolved: ResolvedRepo) -> Mapping[str, Any] | None:
    from mergekit_px.checkpoint.contents import CONFIG_FILE

    if CONFIG_FILE not in resolved.files:
        return None
    return parse_object(read_small(resolved, CONFIG_FILE), f"{resolved}/{CONFIG_FILE}", strict=False)


def _license(card: Mapping[str, Any]) -> str | None:
    license_id = card.get("license")
    if isinstance(license_id, list):
        license_id = " and ".join(str(part) for part in license_id)
    if not isinstance(license_id, str) or not license_id.strip():
        return None
    name = card.get("license_name")
    return f"other ({name})" if license_id == "other" and isinstance(name, str) else license_id


def _base_models(card: Mapping[str, Any]) -> tuple[str, ...]:
    found = card.get("base_model")
    found = [found] if isinstance(found, str) else found
    return tuple(base for base in found if isinstance(base, str)) if isinstance(found, list) else ()
