"""Fetch: the files of a pinned commit that a merge needs, in the client's own cache."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from mergekit_px.checkpoint.destination import output_state
from mergekit_px.checkpoint.publish import new_folder
from mergekit_px.errors import DiskSpaceError, OutputError
from mergekit_px.hub.client import cache_folder, is_offline, quiet_client
from mergekit_px.hub.files import download, needed_files
from mergekit_px.hub.reference import parse_repository
from mergekit_px.hub.repository import ResolvedRepo
from mergekit_px.hub.resolve import resolve

DOWNLOADS_AT_ONCE = 4

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from any thread, one call at a time."""


def fetch(
    resolved: ResolvedRepo,
    *,
    allow_pickle: bool = False,
    record: bool = False,
    progress: Progress | None = None,
    verify_cached: bool = True,
) -> Path:
    """The snapshot folder of the commit, or that in it which is meant, with weights, index, config and side files.

    Files that the cache holds are not asked for again. What breaks off inside a file is taken up again while
    this runs; after a restart, finished files count and an unfinished one starts over. Weights come after
    everything else, so that a cache with all the weights also has what belongs to them.

    Args:
        record: also lock and recipe of what is a merge itself.
        verify_cached: check the bytes of files that the cache has already; a run checks them while it reads them.

    Raises:
        HubError: a file cannot be had whole.
        InputError: the repository has no usable weights.
        DiskSpaceError: the cache has no room for what is missing.
    """
    folder = _snapshot(resolved)
    needed = needed_files(resolved, allow_pickle=allow_pickle, record=record)
    names = (*needed.described, *needed.weights)
    if not is_offline():
        _check_room(resolved, folder, names)
    meter = _Meter(sum(resolved.files[name].size for name in names), progress)
    with quiet_client():
        for group in (needed.described, needed.weights):
            _download_all(resolved, group, meter, verify_cached=verify_cached)
    if not is_offline():
        _remember(resolved)
    return folder


def pull(
    repository: str,
    *,
    local_dir: Path | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Resolve, pin and fetch ``org/name[@revision]``; the folder in the cache, named by the commit.

    Args:
        local_dir: where to put a copy that depends on no cache; new or empty, or with a copy that was
            cut short. Then this is the folder returned.

    Raises:
        UsageError: not a repository.
        OutputError: ``local_dir`` cannot be used.
        HubError, InputError, DiskSpaceError: see `fetch`.
    """
    if local_dir is not None and (state := output_state(local_dir)).occupied and state.unfinished is None:
        raise OutputError("this is not an empty folder", where=str(local_dir), hint="name a new one")
    resolved = resolve(parse_repository(repository))
    folder = fetch(resolved, allow_pickle=allow_pickle, record=True, progress=progress)
    if local_dir is None:
        return folder
    needed = needed_files(resolved, allow_pickle=allow_pickle, record=True)
    return _copy(folder, local_dir, (*needed.described, *needed.weights))


class _Meter:
    """Adds up the bytes of files that arrive side by side; also the way to stop them all."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def add(self, count: int) -> None:
        if self.stopped.is_set():
            raise _Stopped
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)


class _Stopped(Exception):
    pass


def _download_all(resolved: ResolvedRepo, names: tuple[str, ...], meter: _Meter, *, verify_cached: bool) -> None:
    with ThreadPoolExecutor(max_workers=DOWNLOADS_AT_ONCE) as pool:
        waiting = [pool.submit(_download_one, resolved, name, meter, verify_cached) for name in names]
        try:
            for future in as_completed(waiting):
                future.result()
        except BaseException:
            meter.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _download_one(resolved: ResolvedRepo, name: str, meter: _Meter, verify_cached: bool) -> None:
    counted = 0

    def report(count: int) -> None:
        nonlocal counted
        counted += count
        meter.add(count)

    download(resolved, name, report, verify_cached=verify_cached)
    report(resolved.files[name].size - counted)


def _snapshot(resolved: ResolvedRepo) -> Path:
    return cache_folder(resolved.repo) / "snapshots" / resolved.commit / resolved.folder


def _check_room(resolved: ResolvedRepo, folder: Path, names: tuple[str, ...]) -> None:
    missing = sum(resolved.files[name].size for name in names if not (folder / name).exists())
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if missing > free:
        raise DiskSpaceError(
            f"{missing / 1e9:.1f} GB are to be downloaded, {free / 1e9:.1f} GB are free at {place}",
            where=str(resolved),
            hint="free some space, or let HF_HOME name another place for the cache",
        )


def _remember(resolved: ResolvedRepo) -> None:
    """Notes in the cache what the revision meant, as the client does, for offline use later."""
    revision = resolved.revision or "main"
    if revision == resolved.commit:
        return
    place = cache_folder(resolved.repo) / "refs" / revision
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(f"{place.name}.{os.getpid()}")
        fresh.write_text(resolved.commit)
        fresh.replace(place)
    except OSError:
        return  # a cache that cannot be written to still serves


def _copy(folder: Path, local_dir: Path, names: tuple[str, ...]) -> Path:
    """Copies through the cache's links into a folder whose files appear when all are there."""
    # What a pull left that was killed at its end is replaced.
    unfinished = output_state(local_dir).unfinished
    overwrite = unfinished is not None and not unfinished.plan_hash
    with new_folder(local_dir, overwrite=overwrite, record=False) as staged:
        for name in names:
            target = staged / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target)
    return local_dir
