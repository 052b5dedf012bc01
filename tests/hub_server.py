"""A small Hub on 127.0.0.1 for the real `huggingface_hub` client: models, LFS storage, faults on request.

    with FakeHub() as hub:
        hub.add("org/model", {"config.json": b"{}", "model.safetensors": ...})
        hub.fault("storage", path="model.safetensors", cut_after=100, times=1)
        environment = hub.environment(tmp_path)     # for a process that runs the client

Files live in memory. Large files are kept apart from git, by their sha256, and served from a second port, as the
Hub serves them from another host: the log shows whether a token went there. Every request is logged with the
bytes of body sent.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hub_protocol import Handler

TOKEN = "hf_testTokenOfTheSmallHub000000000"


@dataclass(frozen=True)
class Request:
    """One request as answered. ``route``: see `hub_protocol.ROUTES`; ``sent``: bytes of body sent."""

    route: str
    method: str
    path: str
    range: str | None
    has_token: bool
    status: int
    sent: int


@dataclass
class Fault:
    """What goes wrong with the requests that fit ``route``, ``path`` and ``method``.

    Attributes:
        times: how often (None: always), after the first ``after`` requests that fit.
        status: answer with this error; ``code`` and ``message`` are the Hub's headers of that name.
        hang_up: close the connection without an answer and without doing what was asked.
        cut_after: close the connection after so many bytes of the body, with what was asked done.
        truncate_to: send a shorter body that looks whole.
        wait: seconds before anything else.
        ignore_range: send the whole file.
        then: called when the fault happens.
        hits: how often it has happened.
    """

    route: str
    path: str = ""
    method: str = ""
    times: int | None = None
    after: int = 0
    status: int | None = None
    code: str | None = None
    message: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    hang_up: bool = False
    cut_after: int | None = None
    truncate_to: int | None = None
    wait: float = 0.0
    ignore_range: bool = False
    then: Callable[[], object] | None = None
    hits: int = 0

    def applies(self, route: str, method: str, path: str) -> bool:
        """Whether this request is hit; counts it if so."""
        if route != self.route or self.path not in path or self.method not in ("", method):
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.times is not None:
            if self.times == 0:
                return False
            self.times -= 1
        self.hits += 1
        return True


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    message: str
    files: Mapping[str, str]
    """Path -> key of the content in `FakeHub.storage`."""


@dataclass
class Repository:
    repo: str
    private: bool
    gated: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))


class FakeHub:
    """The server; a context manager. ``part_bytes``: larger files are uploaded in parts of this size."""

    def __init__(self, *, part_bytes: int | None = None) -> None:
        self.part_bytes = part_bytes
        self.token = TOKEN
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._closing = threading.Event()
        self._servers: list[ThreadingHTTPServer] = []

    def __enter__(self) -> FakeHub:
        handler = type("BoundHandler", (Handler,), {"hub": self})
        for _ in range(2):
            server = _Server(("127.0.0.1", 0), handler)
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            self._servers.append(server)
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def storage_endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    def environment(self, home: Path, *, token: str | None = None) -> dict[str, str]:
        """Variables that point the client at this server and at a cache of its own."""
        found = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return found if token is None else found | {"HF_TOKEN": token}

    def add(
        self,
        repo: str,
        files: Mapping[str, bytes],
        *,
        branch: str = "main",
        message: str = "Add files",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Commits ``files`` (a new whole, not a change) to a repository, made if need be; the commit."""
        with self.lock:
            found = self.repositories.get(repo) or self.make(repo, private=private, gated=gated)
            return self.commit(found, branch, message, {name: self.store(body) for name, body in files.items()})

    def make(self, repo: str, *, private: bool, gated: bool = False) -> Repository:
        """An empty repository, without a commit."""
        self.repositories[repo] = Repository(repo, private, gated)
        return self.repositories[repo]

    def store(self, body: bytes) -> str:
        key = hashlib.sha256(body).hexdigest()
        self.storage[key] = body
        return key

    def commit(self, repository: Repository, branch: str, message: str, files: Mapping[str, str]) -> str:
        parent = repository.branches.get(branch)
        text = json.dumps([repository.repo, parent, message, sorted(files.items()), len(repository.commits)])
        sha = hashlib.sha1(text.encode()).hexdigest()
        repository.commits[sha] = Commit(sha, parent, message, dict(files))
        repository.branches[branch] = sha
        return sha

    def note(self, **what: Any) -> Request:
        with self.lock:
            self.requests.append(Request(**what))
            return self.requests[-1]

    def fault(self, route: str, **what: Any) -> Fault:
        """Makes requests to ``route`` go wrong; see `Fault`. Stays until it has happened ``times`` times."""
        fault = Fault(route, **what)
        with self.lock:
            self.faults.append(fault)
        return fault

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repositories[repo].find(revision)
        assert commit is not None
        return {name: self.storage[key] for name, key in commit.files.items()}

    def history(self, repo: str, branch: str = "main") -> list[Commit]:
        """The commits of a branch, newest first."""
        repository = self.repositories[repo]
        found, sha = [], repository.branches.get(branch)
        while sha is not None:
            found.append(repository.commits[sha])
            sha = repository.commits[sha].parent
        return found

    def asked(self, route: str, path: str = "", method: str = "") -> list[Request]:
        with self.lock:
            return [
                each
                for each in self.requests
                if each.route == route and path in each.path and method in ("", each.method)
            ]

    def sent(self, path: str) -> int:
        """Bytes of body sent for requests whose address holds ``path``."""
        with self.lock:
            return sum(each.sent for each in self.requests if path in each.path)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        """For what the server notices a moment after the client has gone on."""
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, "it never happened"
            self._closing.wait(0.01)

    def sleep(self, seconds: float) -> None:
        self._closing.wait(seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


def point_client_at(hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch, *, token: str | None = None) -> None:
    """Points the client in this process at ``hub``; what it read from the environment at import is set too.

    Call `huggingface_hub.close_session` before the server goes, so that no connection outlives it.
    """
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_VERBOSITY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in hub.environment(home, token=token).items():
        monkeypatch.setenv(name, value)
    settings = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / "agents.json"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, setting in settings.items():
        monkeypatch.setattr(constants, name, setting)
