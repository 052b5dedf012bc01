from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from folders import contents
from hub_server import FakeHub

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.errors import DiskSpaceError, HubError, InputError, OutputError
from mergekit_px.hub.fetch import fetch, pull
from mergekit_px.hub.reference import HubReference
from mergekit_px.hub.repository import ResolvedRepo
from mergekit_px.hub.resolve import remote_checkpoint, resolve

Weights = Callable[..., bytes]
Sharded = Callable[..., dict[str, bytes]]


def leftovers(home: Path) -> list[str]:
    return [path.name for path in home.rglob("*.incomplete")]


def test_exactly_the_needed_files_are_fetched(hub: FakeHub, sharded: Sharded) -> None:
    needed = sharded(3) | {
        "tokenizer.json": b"{}",
        "additional_chat_templates/rag.jinja": b"x",
        "LICENSE": b"free",
        "README.md": b"# Hello",
        "modeling_custom.py": b"g",
    }
    others = {
        "pytorch_model.bin": b"b",
        "consolidated.safetensors": b"c",
        "model.onnx": b"d",
        "optimizer.pt": b"e",
        "original/model.safetensors": b"f",
    }
    commit = hub.add("org/model", needed | others)
    folder = fetch(resolve(HubReference("org/model")))
    assert folder.name == commit
    assert contents(folder) == needed
    for name in others:
        assert hub.asked("resolve", name) == []


def cached(hub: FakeHub, body: bytes) -> tuple[ResolvedRepo, Path]:
    """A repository of one file that is in the cache, and the file there."""
    hub.add("org/model", {"model.safetensors": body})
    resolved = resolve(HubReference("org/model"))
    return resolved, (fetch(resolved) / "model.safetensors").resolve()


def test_an_unsharded_model_opens_as_its_remote_headers_say(hub: FakeHub, weights: Weights) -> None:
    hub.add("org/model", {"model.safetensors": weights("a", "b"), "config.json": b'{"x": 1}'})
    resolved = resolve(HubReference("org/model"))
    remote = remote_checkpoint(resolved)
    local = open_checkpoint(fetch(resolved))
    assert (local.tensors, local.files, local.config) == (remote.tensors, remote.files, remote.config)


def test_fetch_keeps_to_the_pin_when_main_moves(hub: FakeHub, weights: Weights) -> None:
    old = {"model.safetensors": weights("old"), "config.json": b'{"which": "old"}'}
    commit = hub.add("org/model", old)
    resolved = resolve(HubReference("org/model", "main"))
    hub.add("org/model", {"model.safetensors": weights("new"), "config.json": b'{"which": "new"}'})
    folder = fetch(resolved)
    assert folder.name == commit
    assert contents(folder) == old


def test_main_that_moves_between_two_files_does_not_mix(hub: FakeHub, sharded: Sharded) -> None:
    old = sharded(2)
    hub.add("org/model", old)
    resolved = resolve(HubReference("org/model"))
    hub.fault("resolve", path="config.json", times=1, then=lambda: hub.add("org/model", sharded(4)))
    assert contents(fetch(resolved)) == old


def test_what_the_cache_has_is_not_asked_for_again(hub: FakeHub, sharded: Sharded) -> None:
    hub.add("org/model", sharded(2))
    resolved = resolve(HubReference("org/model"))
    first = fetch(resolved)
    before = len(hub.requests)
    assert fetch(resolved) == first
    assert len(hub.requests) == before


def test_a_new_commit_downloads_only_what_changed(hub: FakeHub, sharded: Sharded, weights: Weights) -> None:
    files = sharded(3)
    hub.add("org/model", files)
    fetch(resolve(HubReference("org/model")))
    changed = "model-00002-of-00003.safetensors"
    hub.add("org/model", files | {changed: weights("layer.1", elements=999)})
    downloads = len(hub.asked("storage", method="GET"))
    fetch(resolve(HubReference("org/model")))
    assert [each.path.split("/")[-1].split("?")[0] for each in hub.asked("storage", method="GET")[downloads:]] == [
        changed
    ]


def test_a_body_cut_short_is_taken_up_where_it_broke(
    hub: FakeHub, weights: Weights, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)
    body = weights("a", elements=100_000)
    hub.add("org/model", {"model.safetensors": body})
    hub.fault("storage", cut_after=150_000, times=1)
    folder = fetch(resolve(HubReference("org/model")))
    assert (folder / "model.safetensors").read_bytes() == body
    assert [each.range for each in hub.asked("storage", method="GET")] == [None, "bytes=150000-"]
    assert hub.sent("/storage/") == len(body)


def test_a_connection_that_keeps_breaking_leaves_no_file(
    hub: FakeHub, weights: Weights, waits: list[float], tmp_path: Path
) -> None:
    body = weights("a", elements=10_000)
    hub.add("org/model", {"model.safetensors": body})
    fault = hub.fault("storage", cut_after=0)
    resolved = resolve(HubReference("org/model"))
    with pytest.raises(HubError, match="broke before everything had arrived; run it again"):
        fetch(resolved)
    assert not any(path.name == "model.safetensors" for path in tmp_path.rglob("*"))
    assert leftovers(tmp_path) == []
    fault.times = 0
    assert (fetch(resolved) / "model.safetensors").read_bytes() == body


def test_a_short_body_that_looks_whole_is_not_accepted(hub: FakeHub, weights: Weights, tmp_path: Path) -> None:
    body = weights("a", elements=10_000)
    hub.add("org/model", {"model.safetensors": body})
    fault = hub.fault("storage", method="GET", truncate_to=1000)
    resolved = resolve(HubReference("org/model"))
    with pytest.raises(HubError, match="broke before everything had arrived"):
        fetch(resolved)
    assert not any(path.name == "model.safetensors" for path in tmp_path.rglob("*"))
    fault.times = 0
    assert (fetch(resolved) / "model.safetensors").read_bytes() == body


def test_a_truncated_file_in_the_cache_is_replaced(hub: FakeHub, weights: Weights) -> None:
    body = weights("a", elements=10_000)
    resolved, blob = cached(hub, body)
    blob.write_bytes(body[:1000])
    assert list(remote_checkpoint(resolved).tensors) == ["a"]
    assert (fetch(resolved) / "model.safetensors").read_bytes() == body


def test_a_truncated_file_in_the_cache_is_refused_offline(
    hub: FakeHub, weights: Weights, offline: Callable[[], None]
) -> None:
    body = weights("a", elements=10_000)
    resolved, blob = cached(hub, body)
    blob.write_bytes(body[:1000])
    offline()
    with pytest.raises(HubError, match="has 1000 bytes where the Hub lists"):
        fetch(resolved)


def test_progress_counts_every_byte_once(hub: FakeHub, sharded: Sharded, waits: list[float]) -> None:
    files = sharded(3, elements=50_000)
    hub.add("org/model", files)
    hub.fault("storage", path="model-00001", cut_after=60_000, times=1)
    seen: list[tuple[int, int]] = []
    fetch(resolve(HubReference("org/model")), progress=lambda done, total: seen.append((done, total)))
    total = sum(map(len, files.values()))
    assert seen[-1] == (total, total)
    assert {each for _, each in seen} == {total}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > len(files)


def test_an_interruption_stops_the_other_downloads(
    hub: FakeHub, sharded: Sharded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    files = sharded(8, elements=1_000_000)
    hub.add("org/model", files)
    resolved = resolve(HubReference("org/model"))
    interrupted: list[int] = []

    def interrupt_once(done: int, total: int) -> None:
        if done > 1_000_000 and not interrupted:
            interrupted.append(done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(resolved, progress=interrupt_once)
    assert leftovers(tmp_path) == []
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == []
    assert contents(fetch(resolved)) == files


def test_weights_wait_for_everything_else(hub: FakeHub, sharded: Sharded) -> None:
    hub.add("org/model", sharded(2) | {"tokenizer.json": b"{}"})
    hub.fault("resolve", path="tokenizer.json", method="GET", status=403)
    with pytest.raises(HubError, match=r"downloading tokenizer\.json failed"):
        fetch(resolve(HubReference("org/model")))
    assert hub.asked("storage") == []


def test_no_token_goes_to_the_storage_host(logged_in: FakeHub, weights: Weights) -> None:
    logged_in.add("org/private", {"model.safetensors": weights("a")}, private=True)
    resolved = resolve(HubReference("org/private"))
    remote_checkpoint(resolved)
    fetch(resolved)
    assert all(each.has_token for each in logged_in.asked("resolve"))
    assert logged_in.asked("storage")
    assert not any(each.has_token for each in logged_in.asked("storage"))


def test_pickles_are_fetched_only_when_allowed(hub: FakeHub) -> None:
    files = {"pytorch_model.bin": b"weights", "config.json": b"{}"}
    hub.add("org/model", files | {"training_args.bin": b"x"})
    resolved = resolve(HubReference("org/model"))
    with pytest.raises(InputError, match="PyTorch pickles"):
        fetch(resolved)
    assert contents(fetch(resolved, allow_pickle=True)) == files


def test_a_full_disk_is_seen_before_the_download(
    hub: FakeHub, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", {"model.safetensors": weights("a")})
    resolved = resolve(HubReference("org/model"))
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 10})())
    with pytest.raises(DiskSpaceError, match="HF_HOME"):
        fetch(resolved)
    assert hub.asked("storage") == []


def test_pull_gives_the_folder_in_the_cache(hub: FakeHub, sharded: Sharded) -> None:
    commit = hub.add("org/model", sharded(2))
    assert pull("org/model@main").name == commit


def test_pull_into_a_folder_makes_real_files(hub: FakeHub, sharded: Sharded, tmp_path: Path) -> None:
    files = sharded(2)
    hub.add("org/model", files)
    place = pull("org/model", local_dir=tmp_path / "here")
    assert place == tmp_path / "here"
    assert contents(place) == files
    assert not any(path.is_symlink() for path in place.rglob("*"))
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["here"]


def test_pull_into_a_full_folder_is_refused_before_any_request(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        pull("org/model", local_dir=tmp_path / "here")
    assert hub.requests == []
    assert (tmp_path / "here" / "mine").read_text() == "mine"


def test_other_bytes_than_the_listed_ones_are_not_accepted(hub: FakeHub, weights: Weights, tmp_path: Path) -> None:
    body = weights("a", elements=10_000)
    hub.add("org/model", {"model.safetensors": body})
    key = hashlib.sha256(body).hexdigest()
    hub.storage[key] = body[:-8] + bytes(8)
    resolved = resolve(HubReference("org/model"))
    with pytest.raises(HubError, match="do not have the sha256 that the Hub lists"):
        fetch(resolved)
    with pytest.raises(HubError, match="sha256"):
        pull("org/model", local_dir=tmp_path / "here")
    assert not (tmp_path / "here").exists()
    hub.storage[key] = body
    assert (fetch(resolved) / "model.safetensors").read_bytes() == body


def test_a_damaged_file_in_the_cache_is_replaced_or_refused(
    hub: FakeHub, weights: Weights, offline: Callable[[], None]
) -> None:
    body = weights("a", elements=10_000)
    resolved, blob = cached(hub, body)
    blob.write_bytes(body[:-8] + bytes(8))
    assert (fetch(resolved) / "model.safetensors").read_bytes() == body
    blob.write_bytes(body[:-8] + bytes(8))
    offline()
    with pytest.raises(HubError, match="sha256"):
        pull("org/model")
