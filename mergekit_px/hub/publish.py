"""Publish a finished folder: make the repository, send the large files one by one, then one commit with all."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_px.checkpoint.destination import PART_SUFFIX, STATE_FOLDER
from mergekit_px.checkpoint.index import LARGEST_INDEX, parse_index
from mergekit_px.errors import HubError, InputError, InputNotFoundError
from mergekit_px.hub.client import answer_timeout, hub_api, is_offline, patiently, quiet_client
from mergekit_px.hub.errors import LOG_IN, hub_errors
from mergekit_px.hub.reference import HubReference, parse_repository
from mergekit_px.small_files import read_small_file

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, ModelInfo

_STALE = re.compile(r"(?:adapter_)?model(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def publish(
    directory: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """The address of the one commit that holds every file of ``directory``.

    Before that commit nothing is visible: an interrupted push leaves the branch as it was. Weight files of
    an earlier, differently split save leave the branch in the same commit. Hidden files are not sent.

    Args:
        repo: ``org/name``, made if it does not exist.
        private: make it private; refuses a repository that exists and is public.
        revision: the branch, made if it does not exist; None is the default branch.
        message: of the commit.
        progress: called with (bytes sent, bytes in all) after each weight file.

    Raises:
        UsageError: ``repo`` is not a repository's name.
        InputError: the folder is missing or unfinished.
        HubError: no permission, no answer, or a commit that is not what was sent.
    """
    files = finished_files(directory)
    target = uploadable(repo)
    if revision is not None:
        target = HubReference(target.repo, revision)
    before = _prepare(target, private)
    with quiet_client():
        additions = _send(target, directory, files, progress)
        commit, address = _commit(target, additions, _stale_files(before, files), message)
    _check(target, directory, files, commit)
    return address


def uploadable(repo: str) -> HubReference:
    """The repository, where an upload can begin at all; asks nobody.

    Raises:
        UsageError: not a repository's name.
        HubError: offline mode is on, or no token is set.
    """
    from huggingface_hub import get_token

    target = parse_repository(repo)
    if is_offline():
        raise HubError("offline mode is on", where=target.repo, hint="unset HF_HUB_OFFLINE to upload")
    if get_token() is None:
        raise HubError("an upload needs a token, and none is set", where=target.repo, hint=LOG_IN)
    return target


def finished_files(directory: Path) -> tuple[str, ...]:
    """The files to publish, relative with forward slashes, sorted.

    Raises:
        InputNotFoundError: no such folder.
        InputError: a run left it unfinished, or a weight file is missing.
    """
    if not directory.is_dir():
        raise InputNotFoundError("no such folder", where=str(directory))
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    parts = [name for name in names if name.endswith(PART_SUFFIX)]
    if parts or (directory / STATE_FOLDER).exists():
        sign = parts[0] if parts else STATE_FOLDER
        raise InputError(
            f"a run has not finished here: {sign} is left", where=str(directory), hint="`pxmerge run --resume` first"
        )
    shown = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    if not any(name.endswith(".safetensors") for name in shown):
        raise InputError("no .safetensors file to publish", where=str(directory))
    for index in (name for name in shown if name.endswith(".safetensors.index.json")):
        where = directory / index
        for shard in set(
            parse_index(read_small_file(where, folder=directory, limit=LARGEST_INDEX), str(where)).values()
        ):
            if not (where.parent / shard).is_file():
                raise InputError(f"the index names {shard}, which is missing", where=str(directory))
    return tuple(shown)


def _prepare(target: HubReference, private: bool) -> ModelInfo:
    """Makes repository and branch where they do not exist; what the branch holds now."""
    api = hub_api()
    with hub_errors(target.repo, None, "making the repository"), quiet_client():
        api.create_repo(target.repo, private=True if private else None, exist_ok=True)
        info = patiently(lambda: api.model_info(target.repo, timeout=answer_timeout()))
        if private and not info.private:
            raise HubError(
                "the repository exists and is public, and private was asked for",
                where=target.repo,
                hint="make it private on its settings page, or choose another name",
            )
        if target.revision is None:
            return info
        api.create_branch(target.repo, branch=target.revision, exist_ok=True)
        return patiently(lambda: api.model_info(target.repo, revision=target.revision, timeout=answer_timeout()))


def _send(
    target: HubReference, directory: Path, files: tuple[str, ...], progress: Callable[[int, int], None] | None
) -> list[CommitOperationAdd]:
    """Sends the weights, file by file; the operations for the commit, which brings the small files itself."""
    from huggingface_hub import CommitOperationAdd

    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=directory / name) for name in files]
    weights = [addition for addition in additions if addition.path_in_repo.endswith(".safetensors")]
    total = sum(addition.upload_info.size for addition in weights)
    sent = 0
    for addition in weights:
        with hub_errors(target.repo, target.revision, f"sending {addition.path_in_repo}, before any commit,"):
            hub_api().preupload_lfs_files(target.repo, [addition], revision=target.revision, free_memory=False)
        sent += addition.upload_info.size
        if progress is not None:
            progress(sent, total)
    return additions


def _stale_files(before: ModelInfo, files: tuple[str, ...]) -> list[str]:
    there = [sibling.rfilename for sibling in before.siblings or ()]
    return [name for name in there if _STALE.fullmatch(name) and name not in files]


def _commit(
    target: HubReference, additions: list[CommitOperationAdd], stale: list[str], message: str
) -> tuple[str, str]:
    from huggingface_hub import CommitOperationDelete

    deletions = [CommitOperationDelete(path_in_repo=name) for name in stale]
    with hub_errors(target.repo, target.revision, "making the commit"):
        done = hub_api().create_commit(
            target.repo, [*additions, *deletions], commit_message=message, revision=target.revision
        )
    return done.oid, str(done.commit_url)


def _check(target: HubReference, directory: Path, files: tuple[str, ...], commit: str) -> None:
    """The Hub may leave files out (a ``.gitignore`` in the repository): the commit must hold them all."""
    with hub_errors(target.repo, commit, "checking the commit"):
        info = patiently(
            lambda: hub_api().model_info(target.repo, revision=commit, files_metadata=True, timeout=answer_timeout())
        )
    there = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    for name in files:
        if there.get(name) != (directory / name).stat().st_size:
            raise HubError(
                f"the commit {commit} was made, but {name} is missing in it or differs",
                where=target.repo,
                hint="does the repository have a .gitignore? mend it and push again",
            )
