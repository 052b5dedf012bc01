"""Tells a model on the Hub from a folder on disk, by text alone: opens nothing, imports no client."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mergekit_px.checkpoint.object_store import store_scheme
from mergekit_px.errors import UsageError

_REPO = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[^\s\\~^:?*\[\x00-\x1f\x7f]{1,255}")
_USER_INFO = re.compile(r"//[^/@]*@")
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_OTHER_KINDS = ("datasets", "spaces", "buckets", "kernels")
_VIEWS = ("tree", "blob", "resolve", "raw", "commit")


@dataclass(frozen=True)
class HubReference:
    """A model repository on the Hub, and the revision asked for (None: its default branch)."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse_reference(text: str) -> HubReference | None:
    """A Hub reference, or None where ``text`` means a local path.

    Local is anything that exists on disk, that starts with ``./``, ``../``, ``/`` or ``~``, or that has
    more or fewer slashes than the one of ``org/name``. So is an address of a store, ``s3://bucket/key``: a folder here
    stands for it. ``hf://`` and web addresses are never local.

    Raises:
        UsageError: an address that is no model repository, or a revision that cannot be one.
    """
    if store_scheme(text) is not None:
        return None
    if "://" in text:
        return parse_repository(text)
    repo, at, revision = text.partition("@")
    if text.startswith((".", "/", "~")) or not _is_repo(repo) or _exists(text):
        return None
    return HubReference(repo, _revision(revision, text) if at else None)


def parse_repository(text: str) -> HubReference:
    """A Hub reference from ``org/name``, ``org/name@revision``, ``hf://...`` or a web address of the Hub.

    Does not look at the disk: for places where a repository is the only thing that can be meant.

    Raises:
        UsageError: anything else.
    """
    if text.startswith(("http://", "https://")):
        text = _USER_INFO.sub("//", text, count=1)  # a password pasted with an address goes into no message
        repo, revision = _split_web_address(text)
    else:
        repo, at, tail = text.removeprefix("hf://").removeprefix("models/").partition("@")
        revision = tail if at else None
    if not _is_repo(repo):
        hint = "write org/name or org/name@revision"
        if re.fullmatch(r"[\w.-]+", repo, re.ASCII):
            hint += "; models that once had no organisation have one now, as openai-community/gpt2"
        raise UsageError("not the name of a model repository", where=text, hint=hint)
    return HubReference(repo, None if revision is None else _revision(revision, text))


def _split_web_address(text: str) -> tuple[str, str | None]:
    address = urlsplit(text)
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    path = address.path
    if address.netloc == endpoint.netloc:
        path = path.removeprefix(endpoint.path.rstrip("/"))
    elif address.hostname not in _HUB_HOSTS:
        raise UsageError(
            f"{address.hostname or 'this address'} is not the Hub",
            where=text,
            hint="write org/name, or set HF_ENDPOINT for another Hub",
        )
    parts = [part for part in path.split("/") if part]
    if parts and parts[0] in _OTHER_KINDS:
        raise UsageError(f"one of the Hub's {parts[0]}, not a model repository", where=text)
    repo = "/".join(parts[:2])
    if len(parts) < 4 or parts[2] not in _VIEWS:
        return repo, None
    is_special = parts[3] == "refs" and len(parts) >= 6
    return repo, "/".join(parts[3:6]) if is_special else unquote(parts[3])


def _is_repo(text: str) -> bool:
    return bool(_REPO.fullmatch(text)) and ".." not in text and "--" not in text and not text.endswith(".git")


def _revision(text: str, whole: str) -> str:
    # A revision becomes a path in the client's cache: it must not climb out of it.
    parts = text.split("/")
    if not _REVISION.fullmatch(text) or any(part in ("", ".", "..") for part in parts):
        raise UsageError(
            f"{text!r} is not a revision", where=whole, hint="write a branch, a tag or a commit after the @"
        )
    return text


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False
