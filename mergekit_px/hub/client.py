"""How this package uses the Hub's own client: quietly, with time limits, and with few retries.

The client is imported on first use only, so that a merge of local files never loads it. It finds the
token, the cache and the endpoint by itself (``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT`` ...): nothing
here reads or passes a token.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from mergekit_px._version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Result = TypeVar("Result")

LIBRARY = "pxmerge"
ATTEMPTS = 3
LONGEST_WAIT = 30.0
_TRANSIENT = (408, 429, 500, 502, 503, 504)


def hub_api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name=LIBRARY, library_version=__version__)


def is_offline() -> bool:
    import huggingface_hub

    return bool(huggingface_hub.is_offline_mode())


def cache_folder(repo: str) -> Path:
    """Where the client keeps a model: ``blobs``, ``refs`` and ``snapshots/<commit>`` lie under it."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def answer_timeout() -> float:
    """Seconds to wait for an answer, the client's own setting (``HF_HUB_DOWNLOAD_TIMEOUT``)."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def patiently(call: Callable[[], Result]) -> Result:
    """``call()``, repeated where the client itself does not: after a broken connection, 429 or 5xx.

    Waits 1 s, then 2 s, or as long as ``Retry-After`` asks; a wait over `LONGEST_WAIT` is not begun.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    for attempt in range(1, ATTEMPTS + 1):
        wait = float(2 ** (attempt - 1))
        try:
            return call()
        except httpx.TransportError:
            if attempt == ATTEMPTS:
                raise
        except HfHubHTTPError as error:
            asked = error.response.headers.get("Retry-After", "")
            wait = float(asked) if asked.isdigit() else wait
            if attempt == ATTEMPTS or error.response.status_code not in _TRANSIENT or wait > LONGEST_WAIT:
                raise
        time.sleep(wait)
    raise AssertionError("unreachable")


@contextmanager
def quiet_client() -> Iterator[None]:
    """Keeps the client's own bars and warnings off stderr: an error is one line, and it is ours.

    What the user asks for with ``HF_HUB_VERBOSITY``, ``HF_DEBUG`` or ``HF_HUB_DISABLE_PROGRESS_BARS`` wins.
    The settings are the process's: enter it from one thread, around the threads that download.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from huggingface_hub.utils import logging as hub_logging

    hide_bars = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    hush = "HF_HUB_VERBOSITY" not in os.environ and not constants.HF_DEBUG
    verbosity = hub_logging.get_verbosity()
    if hide_bars:
        disable_progress_bars()
    if hush:
        hub_logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if hush:
            hub_logging.set_verbosity(verbosity)
        if hide_bars:
            enable_progress_bars()


def byte_counter(report: Callable[[int], None]) -> type[Any]:
    """A class for the client's ``tqdm_class``: draws nothing, passes the bytes written to ``report``.

    The count may go back: the client takes bytes off again when it starts a file over.
    """

    class Counter:
        total: int | None = None
        n = 0

        def __init__(self, *args: Any, **keywords: Any) -> None:
            pass

        def update(self, count: float | None = 1) -> None:
            report(int(count or 0))

        def update_transfer(self, count: float | None = 1) -> None:
            """Bytes received, which `update` sees again when they are written."""

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args, **keywords: None  # close, refresh, set_postfix_str ...: nothing to draw

    return Counter
