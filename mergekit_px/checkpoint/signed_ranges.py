"""Ranges of objects of an S3 store, by addresses that s3fs signs: each is read from its connection in one piece.

s3fs' own reading takes every answer through an event loop in small pieces and joins them, which costs several times
the processor's time of this, most of it while no other thread may run. What is refused here is asked for there, which
knows what to do about another region, and whose errors are told.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

_AT_ONCE = 16
"""Connections that are kept open."""
_VALID = 900
"""Seconds for which an address may be used; it is used at once."""


class SignedRanges:
    """Reads by signed addresses, as long as the store takes them.

    Args:
        files: s3fs' file system.
    """

    def __init__(self, files: Any) -> None:
        self._files = files
        # These are headers that an address alone does not carry.
        self._usable = not (files.req_kw or files.s3_additional_kwargs)
        self._session: Any = None

    def read(self, path: str, start: int, stop: int) -> bytes | None:
        """Bytes ``[start, stop)``, or fewer where the connection breaks; None where s3fs alone may have them."""
        if not self._usable:
            return None
        request = importlib.import_module("botocore.awsrequest").AWSPreparedRequest
        url = self._files.url(path, expires=_VALID)
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        try:
            answer = self._connected(url).send(request("GET", url, headers, None, True)).raw
            if answer.status not in (200, 206) or answer.headers.get("Content-Length") != str(stop - start):
                # A store that is busy takes the next one, and one that sends too little may send more.
                self._usable = not 300 <= answer.status < 500
                answer.close()
                return None
            data = bytes(answer.read(stop - start, decode_content=False))
            answer.release_conn()
        except Exception as error:  # its words hold the address, which opens the object for a while
            kind = TimeoutError if "Timeout" in type(error).__name__ else ConnectionError
            raise kind(type(error).__name__) from None
        return data

    def _connected(self, url: str) -> Any:
        if self._session is None:
            utils = importlib.import_module("botocore.utils")
            verify = self._files.client_kwargs.get("verify")
            self._session = importlib.import_module("botocore.httpsession").URLLib3Session(
                verify=os.environ.get("AWS_CA_BUNDLE", True) if verify is None else verify,
                proxies=utils.get_environ_proxies(url),
                timeout=(self._files.connect_timeout, self._files.read_timeout),
                max_pool_connections=_AT_ONCE,
            )
        return self._session
