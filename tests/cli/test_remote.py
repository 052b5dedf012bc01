"""Models in an object store: read by ranges, checked, and said clearly where the store says no."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save
from store_server import FakeStore, cut_short, point_at, refuse, slow

from mergekit_px.checkpoint.signed_ranges import SignedRanges

RECIPE = """
models: {base: base, math: math, code: code}
merge: {method: task_arithmetic, base: base, sources: {math: 0.5, code: 0.5}}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[FakeStore]:
    with FakeStore() as running:
        yield running


@pytest.fixture
def store(server: FakeStore, models, monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    """A bucket with the models in it, and the recipe over them as local folders and in the bucket."""
    server.create("models")
    for name in ("base", "math", "code"):
        folder = Path(name)
        server.put("models", {f"runs/{name}/{path.name}": path.read_bytes() for path in folder.iterdir()})
    point_at(server, monkeypatch)
    Path("local.yaml").write_text(RECIPE)
    Path("remote.yaml").write_text(RECIPE.replace(": base,", ": s3://models/runs/base,", 1)
                                   .replace("math: math", "math: s3://models/runs/math")
                                   .replace("code: code", "code: s3://models/runs/code"))  # fmt: skip
    return server


def weights(folder: str) -> bytes:
    return Path(folder, "model.safetensors").read_bytes()


def test_a_merge_of_models_in_a_store_has_the_bytes_of_a_merge_of_files(run, store: FakeStore) -> None:
    assert run("run", "local.yaml", "-o", "here").code == 0
    planned = run("plan", "remote.yaml")
    assert planned.code == 0, planned.stderr
    size = Path("base/model.safetensors").stat().st_size
    assert store.bytes_sent("base/model.safetensors") < size, "a plan read more than the header"
    outcome = run("run", "remote.yaml", "-o", "there")
    assert outcome.code == 0, outcome.stderr
    assert weights("here") == weights("there")
    assert Path("there/tokenizer.json").read_text() == "{}"
    assert '"sha256": null' not in Path("there/pxmerge.lock.json").read_text()
    assert "pxmerge-remote-" not in Path("there/pxmerge.lock.json").read_text() + outcome.stderr
    shown = run("inspect", "s3://models/runs/base/model.safetensors")
    assert shown.code == 0 and "s3://models/runs/base" in shown.stdout


def test_another_store_in_the_same_process_is_read_where_it_is(run, store: FakeStore, monkeypatch) -> None:
    assert run("plan", "remote.yaml").code == 0
    asked = len(store.requests)
    with FakeStore() as other:
        other.create("models")
        for name in ("base", "math", "code"):
            other.put("models", {f"runs/{name}/{path.name}": path.read_bytes() for path in Path(name).iterdir()})
        point_at(other, monkeypatch)
        outcome = run("run", "remote.yaml", "-o", "there")
        assert outcome.code == 0, outcome.stderr
        assert other.bytes_sent("math/model.safetensors") > 0 and len(store.requests) == asked


def test_a_store_that_takes_no_signed_addresses_is_read_as_well(run, store: FakeStore) -> None:
    signed: list[str] = []

    def refused(environ, start_response):
        if "X-Amz-Signature" not in environ["QUERY_STRING"]:
            return None
        signed.append(environ["HTTP_RANGE"])
        start_response("403 Forbidden", [("Content-Length", "0")])
        return [b""]

    assert run("run", "local.yaml", "-o", "here").code == 0
    store.faults = [refused]
    outcome = run("run", "remote.yaml", "-o", "there")
    assert outcome.code == 0, outcome.stderr
    assert weights("here") == weights("there")
    assert 1 <= len(signed) <= 3, "each is asked for after the first was refused"  # three models are opened at once


def test_a_signed_address_is_in_no_traceback() -> None:
    settings = {"req_kw": {}, "s3_additional_kwargs": {}, "client_kwargs": {}, "connect_timeout": 1, "read_timeout": 1}
    files = SimpleNamespace(**settings, url=lambda path, expires: "http://127.0.0.1:9/w?X-Amz-Signature=SECRETWORD")
    with pytest.raises(ConnectionError, match="EndpointConnectionError") as raised:
        SignedRanges(files).read("models/w", 0, 10)
    assert "SECRETWORD" not in "".join(traceback.format_exception(raised.value))


def test_large_files_cross_the_network_once(run, store: FakeStore) -> None:
    large = {f"layers.{number}.w": torch.full((1024, 640), float(number)) for number in range(5)}
    store.put("models", {"large/model.safetensors": save(large, {"format": "pt"}), "large/config.json": b"{}"})
    Path("large.yaml").write_text("models: {a: s3://models/large}\nmerge: {method: linear, sources: [a]}")
    store.requests.clear()
    outcome = run("run", "large.yaml", "-o", "out")
    assert outcome.code == 0, outcome.stderr
    assert weights("out") == save(large, {"format": "pt"})
    size = len(save(large, {"format": "pt"}))
    assert size <= store.bytes_sent("large/model.safetensors") < 1.05 * size


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (refuse("404 Not Found", "NoSuchKey"), "no such object or bucket (NoSuchKey)"),
        (refuse("403 Forbidden", "ExpiredToken"), "does not accept the credentials (ExpiredToken)"),
        (refuse("403 Forbidden", "AccessDenied", where="config.json"), "does not allow it (AccessDenied)"),
        (cut_short(10**9), "failed"),
    ],
)
def test_what_a_store_refuses_is_told_in_one_line(
    run, store: FakeStore, monkeypatch: pytest.MonkeyPatch, fault, what: str
) -> None:
    monkeypatch.setattr("mergekit_px.checkpoint.object_store._WAITS", (0.01, 0.01))
    store.faults.append(fault)
    outcome = run("run", "remote.yaml", "-o", "out")
    assert outcome.code == 3, outcome.stderr
    assert what in outcome.stderr and "s3://models/runs/base" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert "SECRET" not in outcome.stderr and "AKIA" not in outcome.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "fault",
    [
        refuse("500 Internal Error", "InternalError", times=2),
        cut_short(2),
        slow(0.02),
    ],
)
def test_what_passes_is_tried_again(run, store: FakeStore, monkeypatch: pytest.MonkeyPatch, fault) -> None:
    monkeypatch.setattr("mergekit_px.checkpoint.object_store._WAITS", (0.01, 0.01, 0.01))
    assert run("run", "local.yaml", "-o", "here").code == 0
    store.faults.append(fault)
    outcome = run("run", "remote.yaml", "-o", "there")
    assert outcome.code == 0, outcome.stderr
    assert weights("here") == weights("there")


def test_an_object_that_changes_stops_the_run(run, store: FakeStore) -> None:
    changed = save({"x": torch.ones(3)})

    def change_before_weights(environ, start_response):
        begins = int(environ.get("HTTP_RANGE", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if begins > 8 and "math" in environ["PATH_INFO"]:
            store.faults.clear()
            store.put("models", {"runs/math/model.safetensors": changed})

    store.faults.append(change_before_weights)
    outcome = run("run", "remote.yaml", "-o", "out")
    assert outcome.code == 3, outcome.stderr
    assert "s3://models/runs/math/model.safetensors: " in outcome.stderr
    assert not Path("out/model.safetensors").exists()


@pytest.mark.parametrize(
    ("reference", "code", "what"),
    [
        ("s4://models/base", 2, "s4:// is no scheme of a store"),
        ("s3://key:secret@models/base", 2, "credentials and settings are not taken from an address"),
        ("s3://models/nowhere", 3, "no such object"),
        ("s3://no-such-bucket/base", 3, "no such object or bucket"),
        ("gs://models/base", 2, "pip install gcsfs, or 'pxmerge[remote]'"),
        ("s3://", 2, "names no bucket"),
        ("s3://models/runs", 3, "s3://models/runs/base"),
    ],
)
def test_addresses_that_cannot_be_used(run, store: FakeStore, reference: str, code: int, what: str) -> None:
    Path("bad.yaml").write_text(f"models: {{a: '{reference}'}}\nmerge: {{method: linear, sources: [a]}}")
    outcome = run("run", "bad.yaml", "-o", "out")
    assert outcome.code == code, outcome.stderr
    assert what in outcome.stderr and "secret" not in outcome.stderr
    assert not Path("out").exists()


def test_without_credentials_that_is_said(run, store: FakeStore, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    outcome = run("run", "remote.yaml", "-o", "out")
    assert outcome.code == 3 and "no usable credentials were found" in outcome.stderr


def test_adapters_and_single_files_in_a_store(run, store: FakeStore) -> None:
    low = {
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 8),
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": torch.ones(12, 2),
    }
    Path("lora").mkdir()
    Path("lora/adapter_model.safetensors").write_bytes(save(low))
    Path("lora/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    store.put("models", {f"lora/{path.name}": path.read_bytes() for path in Path("lora").iterdir()})
    text = "models: {{a: {{model: {0}base, adapter: {1}lora}}}}\nmerge: {{method: linear, sources: [a]}}"
    Path("here.yaml").write_text(text.format("", ""))
    Path("there.yaml").write_text(text.format("s3://models/runs/", "s3://models/"))
    assert run("run", "here.yaml", "-o", "here").code == 0
    outcome = run("run", "there.yaml", "-o", "there")
    assert outcome.code == 0, outcome.stderr
    assert weights("here") == weights("there")
    described = [run("adapter", "inspect", place, "--json").document() for place in ("./lora", "s3://models/lora")]
    assert described[0]["modules"] == described[1]["modules"] != []


def test_a_training_run_in_a_store_is_averaged_like_one_on_a_disk(run, store: FakeStore) -> None:
    """Whole checkpoints, and pieces that processes wrote: in the folder of a step, or in that of its model."""
    generator = torch.Generator().manual_seed(0)
    for step, place in ((100, ""), (200, "/model"), (300, None)):
        state = {f"layers.{number}.w": torch.randn(8, 6, generator=generator) for number in range(2)}
        if place is None:
            folder = Path(f"run/{step}")  # whose name tells nothing before its step is read
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(save(state))
            (folder / "trainer_state.json").write_text('{"global_step": 300}')
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.save({"model": state}, checkpoint_id=f"run/step-{step}{place}", no_dist=True)
    Path("run/tmp-checkpoint-400").mkdir()
    Path("run/tmp-checkpoint-400/model.safetensors").write_bytes(b"half")
    files = {str(path): path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    store.put("models", files)
    assert run("average", "run", "-o", "here").code == 0
    outcome = run("average", "s3://models/run", "-o", "there")
    assert outcome.code == 0, outcome.stderr
    assert "3 checkpoints, from step 100 to step 300" in outcome.stderr
    assert "s3://models/run/tmp-checkpoint-400 is skipped" in outcome.stderr
    assert weights("here") == weights("there")
    store.put("models", {"run/step-200/model/__0_0.distcp": files["run/step-200/model/__0_0.distcp"][:64]})
    outcome = run("average", "s3://models/run", "-o", "other")
    assert outcome.code == 3 and "step-200" in outcome.stderr and "is cut short" in outcome.stderr
    assert not Path("other").exists()
