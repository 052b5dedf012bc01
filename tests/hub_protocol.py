"""The Hub's protocol as far as the client uses it: models, LFS storage, uploads, commits. See `hub_server`."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

if TYPE_CHECKING:
    from hub_server import Commit, FakeHub, Fault, Repository, Request

USER = "tester"
LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


class _Refused(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = "refused", **headers: str) -> None:
        self.status = status
        self.headers = headers
        self.body = json.dumps({"error": message}).encode()
        if code is not None:
            self.headers["X-Error-Code"] = code
        self.headers["X-Error-Message"] = message


ROUTES: tuple[tuple[str, str, str], ...] = (
    ("info", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?"),
    ("tree", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)"),
    ("whoami", "GET", r"/api/whoami-v2"),
    ("create", "POST", r"/api/repos/create"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("branch", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)"),
    ("preupload", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)"),
    ("commit", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)"),
    ("batch", "POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("resolve", "GET HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)"),
    ("storage", "GET HEAD", r"/storage/(?P<key>[0-9a-f]{64})/(?P<name>.+)"),
    ("upload", "PUT", r"/upload/(?P<key>[0-9a-f]{64})(?:/(?P<part>\d+))?"),
    ("complete", "POST", r"/upload/(?P<key>[0-9a-f]{64})/complete"),
    ("verify", "POST", r"/upload/(?P<key>[0-9a-f]{64})/verify"),
)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: FakeHub

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """The log is `FakeHub.requests`."""

    def _serve(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path) if "%2F" not in address.path else address.path
        self.query = parse_qs(address.query)
        self.body = self._read_body()
        self.route, groups = _find_route(self.command, path)
        with self.hub.lock:
            fault = next((each for each in self.hub.faults if each.applies(self.route, self.command, path)), None)
        self.fault = fault
        try:
            if fault is not None:
                self._misbehave(fault)
            self._check_token()
            if not self.route:
                raise _Refused(404, message="no such page")
            getattr(self, f"_{self.route}")(**{key: unquote(part) for key, part in groups.items() if part is not None})
        except _Refused as refused:
            self._answer(refused.status, refused.body, refused.headers)
        except ConnectionAbortedError:
            self._log(0, 0)
            self._hang_up()

    def _misbehave(self, fault: Fault) -> None:
        if fault.then is not None:
            fault.then()
        self.hub.sleep(fault.wait)
        if fault.hang_up:
            raise ConnectionAbortedError
        if fault.status is not None:
            raise _Refused(fault.status, fault.code, fault.message or "refused by the test", **fault.headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return b"".join(self._chunks())
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    # answers

    def _answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        fault = self.fault
        if fault is not None and fault.truncate_to is not None:
            body = body[: fault.truncate_to]
        shown = b"" if self.command == "HEAD" else body
        if fault is not None and fault.cut_after is not None:
            shown = shown[: fault.cut_after]
            self.close_connection = True
        self.send_response(status)
        given = {"Content-Length": str(len(body)), **(headers or {})}
        for key, value in given.items():
            self.send_header(key, value)
        self.end_headers()
        entry = self._log(status, len(shown))
        try:
            for start in range(0, len(shown), 1 << 16):
                self.wfile.write(shown[start : start + (1 << 16)])
        except OSError:  # the client has had enough: note how much it took
            with self.hub.lock:
                self.hub.requests[self.hub.requests.index(entry)] = replace(entry, sent=start)
            self.close_connection = True
            return
        if self.close_connection:
            self._hang_up()

    def _log(self, status: int, sent: int) -> Request:
        return self.hub.note(
            route=self.route,
            method=self.command,
            path=unquote(self.path),
            range=self.headers.get("Range"),
            has_token=self._known,
            status=status,
            sent=sent,
        )

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _json(self, data: object, status: int = 200) -> None:
        self._answer(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _content(self, body: bytes, headers: Mapping[str, str]) -> None:
        """A whole file or the range asked for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or (self.fault is not None and self.fault.ignore_range):
            return self._answer(200, body, {"Accept-Ranges": "bytes", **headers})
        first, last = int(wanted[1]), int(wanted[2] or len(body) - 1)
        if first >= len(body):
            raise _Refused(416, message="out of range")
        last = min(last, len(body) - 1)
        span = {"Content-Range": f"bytes {first}-{last}/{len(body)}"}
        self._answer(206, body[first : last + 1], {**headers, **span})

    # who may

    def _check_token(self) -> None:
        given = self.headers.get("Authorization")
        if given is not None and given != f"Bearer {self.hub.token}":
            raise _Refused(401, message="Invalid credentials in Authorization header")

    @property
    def _known(self) -> bool:
        return "Authorization" in self.headers

    def _repository(self, repo: str, *, write: bool = False) -> Repository:
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self._known):
            raise _Refused(404 if self._known else 401, "RepoNotFound", "Repository not found")
        if write and not self._known:
            raise _Refused(401, message="a token is needed to write")
        return found

    def _at(self, repository: Repository, revision: str | None) -> Commit:
        commit = repository.find(revision or "main")
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # reading

    def _info(self, repo: str, revision: str | None = None) -> None:
        repository = self._repository(repo)
        commit = self._at(repository, revision)
        with_sizes = self.query.get("blobs", [""])[0].lower() == "true"
        siblings = [self._sibling(name, key, with_sizes) for name, key in sorted(commit.files.items())]
        data = {
            "_id": "0",
            "id": repo,
            "modelId": repo,
            "sha": commit.sha,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        card = _front_matter(self.hub.storage.get(commit.files.get("README.md", ""), b""))
        self._json(data if card is None else {**data, "cardData": card})

    def _sibling(self, name: str, key: str, with_sizes: bool) -> dict[str, Any]:
        if not with_sizes:
            return {"rfilename": name}
        body = self.hub.storage[key]
        found: dict[str, Any] = {"rfilename": name, "size": len(body), "blobId": _git_hash(body)}
        if _is_large(name):
            found["lfs"] = {"sha256": key, "size": len(body), "pointerSize": 134}
        return found

    def _tree(self, repo: str, revision: str) -> None:
        commit = self._at(self._repository(repo), revision)
        entries = []
        for name, key in sorted(commit.files.items()):
            body = self.hub.storage[key]
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(body), "oid": _git_hash(body)}
            if _is_large(name):
                entry["lfs"] = {"oid": key, "size": len(body), "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def _whoami(self) -> None:
        if not self._known:
            raise _Refused(401, message="Invalid username or password.")
        self._json({"type": "user", "name": USER, "orgs": []})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        repository = self._repository(repo)
        if repository.gated:
            raise _Refused(403 if self._known else 401, "GatedRepo", f"Access to model {repo} is restricted.")
        commit = self._at(repository, revision)
        key = commit.files.get(name)
        if key is None:
            raise _Refused(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit.sha})
        body = self.hub.storage[key]
        if not _is_large(name):
            return self._content(body, {"X-Repo-Commit": commit.sha, "ETag": f'"{_git_hash(body)}"'})
        location = f"{self.hub.storage_endpoint}/storage/{key}/{name}?Signature=secret"
        linked = {"X-Linked-Etag": f'"{key}"', "X-Linked-Size": str(len(body)), "Location": location}
        self._answer(302, b"", {"X-Repo-Commit": commit.sha, **linked})

    def _storage(self, key: str, name: str) -> None:
        self._content(self.hub.storage[key], {"ETag": f'"{key}"'})

    # writing

    def _create(self) -> None:
        if not self._known:
            raise _Refused(401, message="Invalid username or password.")
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        with self.hub.lock:
            if repo in self.hub.repositories:
                self._json({"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{repo}"}, 409)
                return
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            found = self.hub.make(repo, private=private)
            attributes = self.hub.store(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
            self.hub.commit(found, "main", "initial commit", {".gitattributes": attributes})
        self._json({"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": "0"})

    def _validate(self) -> None:
        try:
            _front_matter(json.loads(self.body)["content"].encode())
        except yaml.YAMLError as error:
            self._json({"errors": [{"message": f"bad YAML: {type(error).__name__}"}], "warnings": []}, 400)
            return
        self._json({"errors": [], "warnings": []})

    def _branch(self, repo: str, branch: str) -> None:
        repository = self._repository(repo, write=True)
        start = self._at(repository, json.loads(self.body or b"{}").get("startingPoint"))
        if branch in repository.branches:
            raise _Refused(409, message="Reference already exists")
        repository.branches[branch] = start.sha
        self._json({})

    def _preupload(self, repo: str, revision: str) -> None:
        commit = self._at(self._repository(repo, write=True), revision)
        ignored = self.hub.storage.get(commit.files.get(".gitignore", ""), b"").decode().split()
        answers = []
        for file in json.loads(self.body)["files"]:
            name, key = file["path"], commit.files.get(file["path"])
            answer = {
                "path": name,
                "uploadMode": "lfs" if _is_large(name) else "regular",
                "shouldIgnore": name in ignored,
            }
            if key is not None:
                answer["oid"] = key if _is_large(name) else _git_hash(self.hub.storage[key])
            answers.append(answer)
        self._json({"files": answers})

    def _batch(self, repo: str) -> None:
        self._repository(repo, write=True)
        answers = [self._upload_plan(each["oid"], each["size"]) for each in json.loads(self.body)["objects"]]
        self._json({"transfer": "basic", "objects": answers})

    def _upload_plan(self, key: str, size: int) -> dict[str, Any]:
        if key in self.hub.storage:
            return {"oid": key, "size": size}
        place = f"{self.hub.storage_endpoint}/upload/{key}"
        upload: dict[str, Any] = {"href": place}
        if self.hub.part_bytes is not None and size > self.hub.part_bytes:
            count = -(-size // self.hub.part_bytes)
            header = {str(number): f"{place}/{number}" for number in range(1, count + 1)}
            upload = {
                "href": f"{self.hub.endpoint}/upload/{key}/complete",
                "header": {"chunk_size": str(self.hub.part_bytes), **header},
            }
        verify = {"href": f"{self.hub.endpoint}/upload/{key}/verify"}
        return {"oid": key, "size": size, "actions": {"upload": upload, "verify": verify}}

    def _upload(self, key: str, part: str | None = None) -> None:
        with self.hub.lock:
            if part is not None:
                self.hub.parts[key, int(part)] = self.body
            elif hashlib.sha256(self.body).hexdigest() == key:
                self.hub.storage[key] = self.body
            else:
                raise _Refused(400, message="the hash does not fit")
        self._answer(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def _complete(self, key: str) -> None:
        with self.hub.lock:
            numbers = [each["partNumber"] for each in json.loads(self.body)["parts"]]
            body = b"".join(self.hub.parts.pop((key, number)) for number in numbers)
            if self.hub.store(body) != key:
                del self.hub.storage[hashlib.sha256(body).hexdigest()]
                raise _Refused(400, message="the hash does not fit")
        self._json({})

    def _verify(self, key: str) -> None:
        if key not in self.hub.storage:
            raise _Refused(404, message="Object not found")
        self._json({})

    def _commit(self, repo: str, revision: str) -> None:
        repository = self._repository(repo, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        with self.hub.lock:
            before = self._at(repository, revision)
            if header.get("parentCommit") not in (None, before.sha):
                raise _Refused(412, message="A commit has happened since. Please refresh and try again.")
            files = dict(before.files)
            for line in lines[1:]:
                self._apply(files, line["key"], line["value"])
            sha = self.hub.commit(repository, revision, header["summary"], files)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}"})

    def _apply(self, files: dict[str, str], kind: str, value: dict[str, Any]) -> None:
        if kind == "file":
            files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            if value["oid"] not in self.hub.storage:
                raise _Refused(400, message="the LFS object was never uploaded")
            files[value["path"]] = value["oid"]
        elif kind == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise _Refused(404, "EntryNotFound", "A file with this name doesn't exist")
        else:
            raise _Refused(400, message=f"unknown operation {kind}")


def _find_route(method: str, path: str) -> tuple[str, dict[str, str]]:
    for route, methods, pattern in ROUTES:
        match = re.fullmatch(pattern, path)
        if match is not None and method in methods.split():
            return route, match.groupdict()
    return "", {}


def _is_large(name: str) -> bool:
    return name.endswith(LARGE_SUFFIXES)


def _git_hash(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _front_matter(card: bytes) -> Any:
    match = re.match(rb"---\n(.*?)\n---", card, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None
