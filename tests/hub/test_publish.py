from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import contents
from hub_protocol import USER
from hub_server import FakeHub

from mergekit_px.errors import HubError, InputError, InputNotFoundError, UsageError
from mergekit_px.hub.fetch import pull
from mergekit_px.hub.publish import finished_files, publish

Sharded = Callable[..., dict[str, bytes]]
CARD = b"---\nlicense: mit\ntags:\n- merge\n---\n# Merged\n"


@pytest.fixture
def merged(tmp_path: Path, sharded: Sharded) -> Path:
    folder = tmp_path / "merged"
    files = sharded(3) | {
        "README.md": CARD,
        "pxmerge.yaml": b"pxmerge: 1\n",
        "pxmerge.lock.json": b"{}",
        "tokenizer.json": b"{}",
        "LICENSE": b"free",
    }
    write(folder, files)
    return folder


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)


def visible(hub: FakeHub, repo: str, revision: str = "main") -> dict[str, bytes]:
    return {name: body for name, body in hub.files(repo, revision).items() if name != ".gitattributes"}


def test_push_makes_one_commit_that_pulls_back_equal(logged_in: FakeHub, merged: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    url = publish(
        merged, "tester/merged", message="Merge of three", progress=lambda done, total: seen.append((done, total))
    )
    newest, first = logged_in.history("tester/merged")
    assert url == f"{logged_in.endpoint}/tester/merged/commit/{newest.sha}"
    assert (newest.message, first.message) == ("Merge of three", "initial commit")
    assert visible(logged_in, "tester/merged") == contents(merged)
    assert not logged_in.repositories["tester/merged"].private
    total = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    assert seen[-1] == (total, total) and len(seen) == 3

    pulled = contents(pull("tester/merged", local_dir=tmp_path / "again"))
    assert pulled == contents(merged)


def test_large_files_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, merged: Path) -> None:
    import huggingface_hub
    from hub_server import point_client_at

    with FakeHub(part_bytes=1000) as hub:
        point_client_at(hub, tmp_path / "home", monkeypatch, token=hub.token)
        publish(merged, "tester/merged", message="Parts")
        assert visible(hub, "tester/merged") == contents(merged)
        assert hub.asked("complete")
        huggingface_hub.close_session()


def test_private_is_private(logged_in: FakeHub, merged: Path) -> None:
    publish(merged, "tester/merged", private=True, message="Quiet")
    assert logged_in.repositories["tester/merged"].private


def test_private_refuses_a_public_repository_before_sending(logged_in: FakeHub, merged: Path) -> None:
    logged_in.add("tester/merged", {"README.md": b"mine"})
    with pytest.raises(HubError, match="exists and is public"):
        publish(merged, "tester/merged", private=True, message="Quiet")
    assert logged_in.asked("upload") == []
    assert visible(logged_in, "tester/merged") == {"README.md": b"mine"}


def test_a_second_push_of_the_same_makes_no_commit(logged_in: FakeHub, merged: Path) -> None:
    first = publish(merged, "tester/merged", message="One")
    uploads = len(logged_in.asked("upload"))
    assert publish(merged, "tester/merged", message="Two") == first
    assert len(logged_in.history("tester/merged")) == 2
    assert len(logged_in.asked("upload")) == uploads


def test_stale_shards_leave_in_the_same_commit(logged_in: FakeHub, merged: Path, sharded: Sharded) -> None:
    other = {"notes.txt": b"keep", "extra-00001-of-00002.safetensors": b"keep", "model.safetensors": b"old"}
    logged_in.add("tester/merged", sharded(5) | other)
    publish(merged, "tester/merged", message="New split")
    del other["model.safetensors"]
    assert visible(logged_in, "tester/merged") == contents(merged) | other
    assert len(logged_in.history("tester/merged")) == 2


def test_a_branch_of_its_own(logged_in: FakeHub, merged: Path) -> None:
    publish(merged, "tester/merged", revision="ties-0.5", message="Try")
    assert visible(logged_in, "tester/merged", "ties-0.5") == contents(merged)
    assert visible(logged_in, "tester/merged", "main") == {}
    publish(merged, "tester/merged@other", message="Try")
    assert visible(logged_in, "tester/merged", "other") == contents(merged)


@pytest.mark.parametrize("route", ["preupload", "batch", "upload", "verify", "validate", "commit"])
@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 403, "message": "no"}, {"hang_up": True}])
def test_an_interrupted_push_leaves_no_half_commit(
    logged_in: FakeHub, merged: Path, waits: list[float], route: str, fault: dict[str, Any]
) -> None:
    broken = logged_in.fault(route, after=1 if route in ("batch", "upload", "verify") else 0, **fault)
    before = {"model.safetensors": b"before"}
    logged_in.add("tester/merged", before)
    with pytest.raises(HubError) as caught:
        publish(merged, "tester/merged", message="Merge")
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value) and "hf_" not in str(caught.value)
    assert visible(logged_in, "tester/merged") == before
    assert len(logged_in.history("tester/merged")) == 1

    broken.times = 0
    publish(merged, "tester/merged", message="Merge")
    assert visible(logged_in, "tester/merged") == contents(merged)
    assert len(logged_in.history("tester/merged")) == 2


def test_a_kill_between_shards_leaves_no_half_commit(logged_in: FakeHub, merged: Path) -> None:
    def kill(done: int, total: int) -> None:
        if done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(merged, "tester/merged", message="Merge", progress=kill)
    assert visible(logged_in, "tester/merged") == {}
    uploads = len(logged_in.asked("upload"))
    assert uploads == 1
    publish(merged, "tester/merged", message="Merge")
    assert len(logged_in.asked("upload")) == 3
    assert visible(logged_in, "tester/merged") == contents(merged)


def test_a_lost_answer_to_the_commit_is_told_and_a_repeat_is_harmless(
    logged_in: FakeHub, merged: Path, waits: list[float]
) -> None:
    logged_in.fault("commit", cut_after=0, times=1)
    with pytest.raises(HubError, match="making the commit failed: the connection broke"):
        publish(merged, "tester/merged", message="Merge")
    publish(merged, "tester/merged", message="Merge")
    assert visible(logged_in, "tester/merged") == contents(merged)
    assert len(logged_in.history("tester/merged")) == 2


def test_files_that_the_repository_ignores_are_told(logged_in: FakeHub, merged: Path) -> None:
    logged_in.add("tester/merged", {".gitignore": b"LICENSE\n"})
    with pytest.raises(HubError, match=r"LICENSE is missing in it.*\.gitignore"):
        publish(merged, "tester/merged", message="Merge")


def test_without_a_token(hub: FakeHub, merged: Path) -> None:
    with pytest.raises(HubError, match="hf auth login"):
        publish(merged, f"{USER}/merged", message="Merge")
    assert hub.repositories == {}


def test_with_a_token_that_may_only_read(logged_in: FakeHub, merged: Path) -> None:
    logged_in.fault("create", status=403, message="You don't have the rights to create a model under this namespace")
    with pytest.raises(HubError, match=r"no permission for this \(You don't have the rights"):
        publish(merged, "someone/merged", message="Merge")


def test_offline(hub: FakeHub, merged: Path, offline: Callable[[], None]) -> None:
    offline()
    with pytest.raises(HubError, match="offline mode is on"):
        publish(merged, "tester/merged", message="Merge")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("left", "sign"),
    [("model-00002-of-00003.safetensors.part", "part"), (".pxmerge/journal", ".pxmerge"), (".pxmerge/x/y", ".pxmerge")],
)
def test_an_unfinished_folder_is_refused_before_any_request(hub: FakeHub, merged: Path, left: str, sign: str) -> None:
    write(merged, {left: b""})
    with pytest.raises(InputError, match=rf"has not finished here: .*{sign}"):
        publish(merged, "tester/merged", message="Merge")
    assert hub.requests == []


def test_folders_that_are_no_model_are_refused(merged: Path, tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no such folder"):
        finished_files(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        finished_files(tmp_path / "empty")
    (merged / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"names model-00002-of-00003\.safetensors, which is missing"):
        finished_files(merged)


def test_hidden_files_stay_at_home(merged: Path) -> None:
    files = finished_files(merged)
    write(merged, {".git/config": b"x", ".cache/y": b"y", ".env": b"HF_TOKEN=1"})
    assert finished_files(merged) == files


def test_a_name_without_an_owner_is_refused(merged: Path) -> None:
    with pytest.raises(UsageError, match="org/name"):
        publish(merged, "merged", message="Merge")


def test_the_commit_holds_a_valid_index(logged_in: FakeHub, merged: Path) -> None:
    publish(merged, "tester/merged", message="Merge")
    files = visible(logged_in, "tester/merged")
    shards = set(json.loads(files["model.safetensors.index.json"])["weight_map"].values())
    assert shards == {name for name in files if name.endswith(".safetensors")}
