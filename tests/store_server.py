"""A store on this machine that speaks S3 (moto's server), with faults put in between."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import pytest

from mergekit_px.checkpoint.ranged import forget

Answer = Iterable[bytes]
Fault = Callable[[Mapping[str, Any], Callable[..., Any]], "Answer | None"]


@dataclass
class Request:
    method: str
    path: str
    range: str
    sent: int = 0


@dataclass
class FakeStore:
    """A server; ``faults``: what to answer in the place of the store, ``requests``: what was asked of it."""

    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> Self:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def objects(self, bucket: str) -> dict[str, bytes]:
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        keys = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket].keys
        return {name: keys[name].value for name in keys}

    def create(self, bucket: str) -> None:
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        backend.reset()
        backend.create_bucket(bucket, "us-east-1")

    def put(self, bucket: str, files: Mapping[str, bytes]) -> None:
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        for name, value in files.items():
            backend.put_object(bucket, name, value)

    def bytes_sent(self, suffix: str) -> int:
        return sum(request.sent for request in self.requests if request.path.endswith(suffix))

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        request = Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", ""))
        self.requests.append(request)
        for fault in list(self.faults):
            answer = fault(environ, start_response)
            if answer is not None:
                return answer
        body = b"".join(self._app(environ, start_response))
        request.sent = len(body) if request.method == "GET" else 0
        return [body]


def point_at(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the packages that read stores find this one, and nothing of an earlier test."""
    store.faults.clear()
    store.requests.clear()
    forget()
    for name, value in {
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "SECRETWORD",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)


def refuse(status: str, code: str, *, times: int = 10**9, method: str = "GET", where: str = ".safetensors") -> Fault:
    """Answer so many requests for an object with an error of S3."""
    left = [times]
    lock = threading.Lock()

    def fault(environ: Mapping[str, Any], start_response: Callable[..., Any]) -> Answer | None:
        if environ["REQUEST_METHOD"] != method or where not in environ["PATH_INFO"]:
            return None
        with lock:
            if left[0] <= 0:
                return None
            left[0] -= 1
        secret = "the key AKIAEXAMPLESECRET"
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{secret}</Message></Error>".encode()
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    return fault


def cut_short(times: int) -> Fault:
    """Close the connection inside a body."""
    left = [times]

    def fault(environ: Mapping[str, Any], start_response: Callable[..., Any]) -> Answer | None:
        if not environ.get("HTTP_RANGE") or left[0] <= 0:
            return None
        left[0] -= 1
        start_response("206 Partial Content", [("Content-Length", "1000"), ("Content-Range", "bytes 0-999/1000")])
        return [b"x" * 10]

    return fault


def slow(seconds: float) -> Fault:
    def fault(environ: Mapping[str, Any], start_response: Callable[..., Any]) -> Answer | None:
        if environ.get("HTTP_RANGE"):
            time.sleep(seconds)
        return None

    return fault
