"""The real client in processes of its own, configured by the environment alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from folders import contents
from hub_server import TOKEN, FakeHub

RUN = """
import sys
from pathlib import Path
from mergekit_px.errors import PxmergeError
from mergekit_px.hub.fetch import pull
from mergekit_px.hub.publish import publish
try:
    if sys.argv[1] == "pull":
        print(pull(sys.argv[2]))
    else:
        print(publish(Path(sys.argv[2]), sys.argv[3], message="Merge", private=True))
except PxmergeError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def environment(server: FakeHub, tmp_path: Path) -> dict[str, str]:
    return {**os.environ, **server.environment(tmp_path / "home", token=TOKEN)}


def start(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error::ResourceWarning", "-c", RUN, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    assert TOKEN not in out + err
    return process.returncode, out.strip(), err.strip()


def test_push_then_pull_then_offline(
    server: FakeHub, environment: dict[str, str], tmp_path: Path, sharded: Callable[..., dict[str, bytes]]
) -> None:
    files = sharded(3) | {"README.md": b"---\nlicense: mit\n---\n", "tokenizer.json": b"{}"}
    merged = tmp_path / "merged"
    merged.mkdir()
    for name, body in files.items():
        (merged / name).write_bytes(body)
    code, out, err = finish(start(environment, "push", str(merged), "tester/merged"))
    assert (code, err) == (0, "")
    commit = server.history("tester/merged")[0].sha
    assert out == f"{server.endpoint}/tester/merged/commit/{commit}"
    assert len(server.history("tester/merged")) == 2
    assert server.repositories["tester/merged"].private

    code, out, err = finish(start(environment, "pull", "tester/merged"))
    assert (code, err) == (0, "")
    assert Path(out).name == commit
    assert contents(Path(out)) == files

    asked = len(server.requests)
    code, again, err = finish(start({**environment, "HF_HUB_OFFLINE": "1"}, "pull", "tester/merged"))
    assert (code, again, err) == (0, out, "")
    code, _, err = finish(start({**environment, "HF_HUB_OFFLINE": "1"}, "pull", "org/other"))
    assert code == 3 and "not in the cache" in err and len(err.splitlines()) == 1
    assert len(server.requests) == asked


def test_a_download_killed_in_the_middle(
    server: FakeHub, environment: dict[str, str], tmp_path: Path, sharded: Callable[..., dict[str, bytes]]
) -> None:
    files = sharded(2)
    server.add("org/model", files)
    fault = server.fault("storage", path="model-00002", method="GET", wait=60)
    process = start(environment, "pull", "org/model")
    server.wait_until(lambda: fault.hits > 0)
    server.wait_until(lambda: any(path.name.startswith("model-00001") for path in tmp_path.rglob("*")))
    process.kill()
    finish(process)
    fault.times = 0
    code, out, err = finish(start(environment, "pull", "org/model"))
    assert (code, err) == (0, "")
    assert contents(Path(out)) == files
    assert len(server.asked("storage", "model-00001", "GET")) == 1


def test_a_push_killed_in_the_middle(
    server: FakeHub, environment: dict[str, str], tmp_path: Path, sharded: Callable[..., dict[str, bytes]]
) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    for name, body in sharded(3).items():
        (merged / name).write_bytes(body)
    fault = server.fault("upload", after=1, wait=60)
    process = start(environment, "push", str(merged), "tester/merged")
    server.wait_until(lambda: fault.hits > 0)
    process.kill()
    finish(process)
    assert set(server.files("tester/merged")) == {".gitattributes"}
    fault.times = 0
    code, _, err = finish(start(environment, "push", str(merged), "tester/merged"))
    assert (code, err) == (0, "")
    assert contents(merged).items() <= server.files("tester/merged").items()
    assert len(server.history("tester/merged")) == 2


def test_a_refusal_is_one_line_and_exit_code_3(server: FakeHub, environment: dict[str, str]) -> None:
    server.add("org/gated", {"model.safetensors": b"x" * 100}, gated=True)
    code, out, err = finish(start(environment, "pull", "org/gated"))
    assert (code, out) == (3, "")
    assert len(err.splitlines()) == 1 and f"{server.endpoint}/org/gated" in err
