from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import FakeHub

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.errors import HubError, InputError, MalformedCheckpointError
from mergekit_px.hub.client import cache_folder
from mergekit_px.hub.fetch import fetch
from mergekit_px.hub.reference import HubReference
from mergekit_px.hub.repository import RemoteFile
from mergekit_px.hub.resolve import remote_checkpoint, resolve

CARD = b"---\nlicense: apache-2.0\nbase_model:\n- org/base\n---\n# A model\n"
Weights = Callable[..., bytes]
Sharded = Callable[..., dict[str, bytes]]


def test_a_reference_is_pinned_to_the_commit_it_means_now(hub: FakeHub, weights: Weights) -> None:
    body = weights("a")
    commit = hub.add("org/model", {"model.safetensors": body, "config.json": b"{}", "README.md": CARD})
    resolved = resolve(HubReference("org/model", "main"))
    assert (resolved.repo, resolved.revision, resolved.commit) == ("org/model", "main", commit)
    assert resolved.files["model.safetensors"] == RemoteFile(len(body), hashlib.sha256(body).hexdigest())
    assert resolved.files["config.json"] == RemoteFile(2, None)
    assert resolved.license == "apache-2.0"
    assert resolved.base_models == ("org/base",)
    assert len(hub.requests) == 1


def test_branches_tags_and_commits_resolve(hub: FakeHub) -> None:
    old = hub.add("org/model", {"config.json": b"{}"})
    new = hub.add("org/model", {"config.json": b"{ }"})
    side = hub.add("org/model", {"config.json": b"{  }"}, branch="refs/pr/1")
    assert resolve(HubReference("org/model")).commit == new
    assert resolve(HubReference("org/model", old)).commit == old
    assert resolve(HubReference("org/model", "refs/pr/1")).commit == side


@pytest.mark.parametrize(
    ("front", "license_id", "base_models"),
    [
        ("license: other\nlicense_name: acme-research\nbase_model: org/one", "other (acme-research)", ("org/one",)),
        ("license: other", "other", ()),
        ("tags: [x]", None, ()),
    ],
)
def test_the_card_tells_licence_and_bases(
    hub: FakeHub, front: str, license_id: str | None, base_models: tuple[str, ...]
) -> None:
    hub.add("org/model", {"README.md": f"---\n{front}\n---\n".encode()})
    resolved = resolve(HubReference("org/model"))
    assert (resolved.license, resolved.base_models) == (license_id, base_models)


def test_remote_headers_cost_the_headers_alone(hub: FakeHub, weights: Weights) -> None:
    body = weights("a", "b", elements=50_000)
    hub.add("org/model", {"model.safetensors": body, "config.json": b'{"x": 1}', "tokenizer.json": b"{}"})
    checkpoint = remote_checkpoint(resolve(HubReference("org/model")))
    header = int.from_bytes(body[:8], "little")
    assert hub.sent("model.safetensors") == 8 + header
    assert hub.sent("tokenizer.json") == 0
    assert sorted(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.config == {"x": 1}
    assert checkpoint.side_files == ("tokenizer.json",)
    assert checkpoint.directory is None


def test_remote_headers_of_shards(hub: FakeHub, sharded: Sharded, tmp_path: Path) -> None:
    files = sharded(12, elements=20_000)
    hub.add("org/model", files | {"pytorch_model.bin": b"x" * 1000, "consolidated.safetensors": b"y" * 1000})
    resolved = resolve(HubReference("org/model"))
    checkpoint = remote_checkpoint(resolved)
    for name, body in files.items():
        if name.endswith(".safetensors"):
            assert hub.sent(name) == 8 + int.from_bytes(body[:8], "little")
    assert hub.sent("pytorch_model.bin") == hub.sent("consolidated.safetensors") == 0

    for name, body in files.items():
        (tmp_path / name).write_bytes(body)
    local = open_checkpoint(tmp_path)
    assert checkpoint.tensors == local.tensors
    assert checkpoint.files == local.files
    assert checkpoint.config == local.config


def test_headers_are_read_from_the_cache_where_it_has_the_file(hub: FakeHub, sharded: Sharded) -> None:
    hub.add("org/model", sharded(3))
    resolved = resolve(HubReference("org/model"))
    remote = remote_checkpoint(resolved)
    fetch(resolved)
    before = len(hub.requests)
    assert remote_checkpoint(resolved).tensors == remote.tensors
    assert len(hub.requests) == before


def test_a_server_that_ignores_ranges_is_read_no_further(hub: FakeHub, weights: Weights) -> None:
    body = weights("a", elements=16_000_000)
    hub.add("org/model", {"model.safetensors": body})
    fault = hub.fault("storage", ignore_range=True)
    assert list(remote_checkpoint(resolve(HubReference("org/model"))).tensors) == ["a"]
    hub.wait_until(lambda: hub.sent("/storage/") < len(body))  # both answers were broken off
    assert fault.hits == 2


def test_a_listing_without_sizes_is_no_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    hub.add("org/model", {"config.json": b"{}"})
    plain = HfApi.model_info
    monkeypatch.setattr(HfApi, "model_info", lambda *given, files_metadata, **named: plain(*given, **named))
    with pytest.raises(HubError, match=r"the size of config\.json is not told"):
        resolve(HubReference("org/model"))


def test_headers_are_pinned_too(hub: FakeHub, weights: Weights) -> None:
    hub.add("org/model", {"model.safetensors": weights("old"), "config.json": b"{}"})
    resolved = resolve(HubReference("org/model"))
    hub.add("org/model", {"model.safetensors": weights("new"), "config.json": b"[]"})
    assert list(remote_checkpoint(resolved).tensors) == ["old"]


def test_a_header_cut_short_is_asked_for_again(hub: FakeHub, weights: Weights, waits: list[float]) -> None:
    hub.add("org/model", {"model.safetensors": weights("a")})
    hub.fault("storage", cut_after=4, times=1)
    assert list(remote_checkpoint(resolve(HubReference("org/model"))).tensors) == ["a"]
    assert waits == [1.0]


def test_retry_after_is_obeyed_and_a_long_wait_is_not_begun(hub: FakeHub, waits: list[float]) -> None:
    hub.add("org/model", {"config.json": b"{}"})
    hub.fault("info", status=429, headers={"Retry-After": "7"}, times=1)
    resolve(HubReference("org/model"))
    assert waits == [7.0]
    hub.fault("info", status=429, headers={"Retry-After": "3600"})
    with pytest.raises(HubError, match="wait 3600 seconds"):
        resolve(HubReference("org/model"))
    assert waits == [7.0]


def test_a_damaged_remote_header_names_the_file(hub: FakeHub) -> None:
    hub.add("org/model", {"model.safetensors": (2**62).to_bytes(8, "little") + b"{}" * 50})
    with pytest.raises(MalformedCheckpointError, match=r"org/model@\w{12}/model\.safetensors"):
        remote_checkpoint(resolve(HubReference("org/model")))


def test_an_index_that_leaves_the_repository_is_refused(hub: FakeHub, weights: Weights) -> None:
    index = json.dumps({"weight_map": {"a": "../../../etc/passwd"}}).encode()
    hub.add("org/model", {"model.safetensors.index.json": index, "x.safetensors": weights("a")})
    with pytest.raises(MalformedCheckpointError, match="passwd"):
        remote_checkpoint(resolve(HubReference("org/model")))


def test_an_index_that_names_a_missing_shard(hub: FakeHub, sharded: Sharded) -> None:
    files = sharded(3)
    del files["model-00002-of-00003.safetensors"]
    hub.add("org/model", files)
    with pytest.raises(HubError, match=r"model-00002-of-00003\.safetensors, which is not in the repository"):
        remote_checkpoint(resolve(HubReference("org/model")))


def test_names_that_leave_the_repository_are_refused(hub: FakeHub) -> None:
    hub.add("org/model", {"../evil.safetensors": b"x"})
    with pytest.raises(HubError, match="no path inside"):
        resolve(HubReference("org/model"))


def test_pickles_and_ambiguous_weights_are_refused(hub: FakeHub, weights: Weights, sharded: Sharded) -> None:
    hub.add("org/pickle", {"pytorch_model.bin": b"x", "config.json": b"{}"})
    with pytest.raises(InputError, match="--allow-pickle"):
        remote_checkpoint(resolve(HubReference("org/pickle")))
    hub.add("org/none", {"config.json": b"{}"})
    with pytest.raises(InputError, match="no weights are there"):
        remote_checkpoint(resolve(HubReference("org/none")))
    hub.add("org/both", sharded(2) | {"model.safetensors": weights("a")})
    with pytest.raises(InputError, match="which weights are meant"):
        remote_checkpoint(resolve(HubReference("org/both")))


def test_an_adapter_repository(hub: FakeHub, weights: Weights) -> None:
    hub.add("org/lora", {"adapter_model.safetensors": weights("a"), "adapter_config.json": b"{}"})
    resolved = resolve(HubReference("org/lora"))
    assert list(remote_checkpoint(resolved).tensors) == ["a"]
    assert (fetch(resolved) / "adapter_config.json").read_bytes() == b"{}"


def test_offline_resolves_from_the_cache(hub: FakeHub, sharded: Sharded, offline: Callable[[], None]) -> None:
    commit = hub.add("org/model", sharded(2) | {"README.md": CARD, "tokenizer.json": b"{}", "model.onnx": b"x"})
    online = resolve(HubReference("org/model"))
    fetch(online)
    before = len(hub.requests)
    offline()
    for revision in (None, "main", commit):
        resolved = resolve(HubReference("org/model", revision))
        assert resolved.commit == commit
        assert resolved.files == {name: file for name, file in online.files.items() if name != "model.onnx"}
        assert (resolved.license, resolved.base_models) == ("apache-2.0", ("org/base",))
        assert sorted(remote_checkpoint(resolved).tensors) == ["layer.0", "layer.1"]
        assert fetch(resolved).name == commit
    assert len(hub.requests) == before


@pytest.mark.parametrize("revision", [None, "v9", "f" * 40])
def test_offline_without_a_cache_says_what_to_do(
    hub: FakeHub, revision: str | None, offline: Callable[[], None]
) -> None:
    offline()
    with pytest.raises(HubError, match=r"not in the cache; unset HF_HUB_OFFLINE, or run `pxmerge pull org/model"):
        resolve(HubReference("org/model", revision))
    assert hub.requests == []


def test_offline_with_holes_in_the_cache(hub: FakeHub, sharded: Sharded, offline: Callable[[], None]) -> None:
    hub.add("org/model", sharded(2))
    resolved = resolve(HubReference("org/model"))
    folder = fetch(resolved)
    (folder / "model-00002-of-00002.safetensors").unlink()
    offline()
    with pytest.raises(HubError, match=r"model-00002-of-00002\.safetensors, which is not in the cache"):
        remote_checkpoint(resolve(HubReference("org/model")))


def test_planning_stores_no_weight(hub: FakeHub, sharded: Sharded) -> None:
    hub.add("org/model", sharded(2))
    resolved = resolve(HubReference("org/model"))
    remote_checkpoint(resolved)
    stored = {path.name for path in (cache_folder("org/model") / "snapshots").rglob("*") if path.is_file()}
    assert stored == {"config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize(
    "odd",
    [
        {"sha": 5},
        {"siblings": [{"rfilename": ["a"], "size": 1}]},
        {"siblings": [{"rfilename": "a", "size": "large"}]},
        {"siblings": [{"rfilename": "a", "size": -1}]},
        {"siblings": {"a": 1}},
        {"cardData": ["license"]},
        {"cardData": "mit"},
    ],
)
def test_answers_of_odd_types_are_one_clear_line(monkeypatch: pytest.MonkeyPatch, odd: dict[str, object]) -> None:
    from huggingface_hub.hf_api import ModelInfo

    class Api:
        def model_info(self, repo: str, **options: object) -> ModelInfo:
            return ModelInfo(**{"id": repo, "sha": "a" * 40, "siblings": [], "tags": [], **odd})

    monkeypatch.setattr("mergekit_px.hub.resolve.hub_api", Api)
    monkeypatch.setattr("mergekit_px.hub.resolve.is_offline", lambda: False)
    with pytest.raises(HubError, match="the answer") as caught:
        resolve(HubReference("org/model"))
    assert "\n" not in str(caught.value)
