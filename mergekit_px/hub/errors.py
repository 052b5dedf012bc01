"""Turns whatever the Hub client raises into one clear line that never holds a token."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mergekit_px.errors import HubError, PxmergeError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_TOKEN = re.compile(r"hf_\w+|(?<=Bearer )\S+", re.IGNORECASE)
_ODD_ANSWERS = TypeError | AttributeError | KeyError | IndexError | RecursionError
"""What comes of fields that are missing or of other types than the client and this program expect."""
_ADDRESS = re.compile(r"https?://\S+")


@contextmanager
def hub_errors(repo: str, revision: str | None, action: str) -> Iterator[None]:
    """Everything that the client raises inside becomes a `HubError`; our own errors pass through.

    Args:
        action: what is being done, as in "listing its files".
    """
    try:
        yield
    except PxmergeError:
        raise
    except Exception as error:
        raise hub_error(error, repo=repo, revision=revision, action=action) from error


def hub_error(error: Exception, *, repo: str, revision: str | None, action: str) -> HubError:
    """One line for ``error``: what failed, why, and what to do about it."""
    where = repo if revision is None else f"{repo}@{revision}"
    for link in _causes(error):
        reason = _reason(link, repo, revision)
        if reason is not None:
            what, hint = reason
            return HubError(f"{action} failed: {what}", where=where, hint=hint)
    what = f"{type(error).__name__}: {clean(str(error))}"
    return HubError(f"{action} failed: {what}", where=where, hint="PXMERGE_DEBUG=1 shows where it came from")


def clean(text: str) -> str:
    """``text`` as one short line without tokens and without addresses, which may carry signatures."""
    token = os.environ.get("HF_TOKEN")
    if token:
        text = text.replace(token, "***")
    text = _ADDRESS.sub("(address)", _TOKEN.sub("***", text))
    return " ".join(text.split())[:300]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The chain of causes, innermost first: the client wraps the telling error in general ones."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__
    yield from reversed(chain)


def _reason(error: BaseException, repo: str, revision: str | None) -> tuple[str, str | None] | None:
    from huggingface_hub.errors import (
        FileMetadataError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        reference = repo if revision is None else f"{repo}@{revision}"
        return (
            "offline mode is on and this is not in the cache",
            f"unset HF_HUB_OFFLINE, or run `pxmerge pull {reference}` while online",
        )
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, repo, revision)
    if isinstance(error, httpx.TimeoutException):
        return "the Hub did not answer in time", "try again; HF_HUB_DOWNLOAD_TIMEOUT=60 waits longer"
    if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError) or "Consistency check failed" in str(error):
        return "the connection broke before everything had arrived", "run it again; finished files are kept"
    if isinstance(error, httpx.ProxyError):
        return "the proxy refused", "check HTTPS_PROXY"
    if isinstance(error, httpx.TransportError):
        return (
            f"{_endpoint()} cannot be reached",
            "check the network and HF_ENDPOINT; with HF_HUB_OFFLINE=1 the cache is used",
        )
    if isinstance(error, FileMetadataError | httpx.DecodingError | json.JSONDecodeError | _ODD_ANSWERS):
        return "the answer is not what a Hub sends", "check HF_ENDPOINT and the proxy"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES):
        place = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{place}", "free some space, or let HF_HOME name another place for the cache"
    return None


def _refusal(error: HfHubHTTPError, repo: str, revision: str | None) -> tuple[str, str | None]:
    """The reason in an HTTP answer of 400 or above."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        DisabledRepoError,
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code
    page = f"{_endpoint()}/{repo}"
    if isinstance(error, GatedRepoError):
        return "its owner restricts access", f"accept the terms at {page}, then {LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision or 'main'!r}", f"see its branches and tags at {page}/tree/main"
    if isinstance(error, DisabledRepoError):
        return "the Hub has disabled this repository", None
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such model on the Hub, or it is private",
            f"check the name; a local folder is written ./{repo}; for a private model {LOG_IN}",
        )
    if isinstance(error, EntryNotFoundError):
        return "the file is not in the repository", f"see {page}/tree/{revision or 'main'}"
    said = clean(error.server_message or "")
    because = f" ({said})" if said else ""
    if status == 401 and get_token() is None:
        return "the Hub asks who you are, and no token is set", LOG_IN
    if status == 401:
        return f"the Hub did not accept the token{because}", f"{LOG_IN} with a valid one"
    if status == 403:
        return f"the token has no permission for this{because}", f"use a token that may; {LOG_IN}"
    if status == 429:
        wait = error.response.headers.get("Retry-After", "")
        soon = f"{wait} seconds" if wait.isdigit() else "some minutes"
        return "the Hub's rate limit is reached", f"wait {soon} and run it again; being logged in raises the limit"
    if status >= 500:
        return f"the Hub is in trouble (HTTP {status})", "run it again later; finished files are kept"
    return f"the Hub refused with HTTP {status}{because}", None


def _endpoint() -> str:
    from huggingface_hub import HfApi

    return re.sub(r"//[^/@]*@", "//", HfApi().endpoint)
