"""A merge that is written to an object store: file by file, the lock file last, and resumed from what is there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_server import FakeStore, point_at, refuse

from mergekit_px.checkpoint.destination import destination
from mergekit_px.errors import OutputError

RECIPE = """
models: {base: base, math: math, code: code}
merge: {method: ties, base: base, sources: [math, code], params: {density: 0.5}}
output: {shard_size: 700}
"""
OUTPUT = "s3://models/out/merged"


@pytest.fixture(scope="module")
def server() -> Iterator[FakeStore]:
    with FakeStore() as running:
        yield running


@pytest.fixture
def store(server: FakeStore, models, monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    server.create("models")
    point_at(server, monkeypatch)
    monkeypatch.setattr("mergekit_px.checkpoint.object_store._WAITS", (0.01,))
    Path("recipe.yaml").write_text(RECIPE)
    return server


def written(store: FakeStore) -> dict[str, bytes]:
    return {name.removeprefix("out/merged/"): data for name, data in store.objects("models").items()}


def local() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("here/merged").iterdir() if path.is_file()}


def test_an_output_in_a_store_has_the_bytes_of_one_on_a_disk(run, store: FakeStore, tmp_path: Path) -> None:
    assert run("run", "recipe.yaml", "-o", "here/merged").code == 0
    outcome = run("run", "recipe.yaml", "-o", OUTPUT)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout == f"{OUTPUT}\n"
    assert written(store) == local()
    puts = [request.path for request in store.requests if request.method in ("PUT", "POST") and "/out/" in request.path]
    final = [path for path in puts if "/.pxmerge/" not in path]
    assert final[-1].endswith("/pxmerge.lock.json") and final[-2].endswith("/config.json")
    assert not list((tmp_path / "cache/pxmerge/outputs").rglob("*.safetensors"))
    assert not Path("s3:").exists()
    again = run("run", "recipe.yaml", "-o", OUTPUT)
    assert again.code == 4 and "the output is not empty" in again.stderr
    assert run("run", "recipe.yaml", "-o", OUTPUT, "--overwrite", "--set", "merge.params.density=1").code == 0
    assert written(store).keys() == local().keys() and written(store) != local()


def test_a_run_that_broke_off_goes_on_from_what_the_store_has(run, store: FakeStore) -> None:
    assert run("run", "recipe.yaml", "-o", "here/merged").code == 0
    store.faults.append(refuse("500 Internal Error", "InternalError", method="PUT", where="model-00003"))
    outcome = run("run", "recipe.yaml", "-o", OUTPUT)
    assert outcome.code == 5 and "--resume" in outcome.stderr and f"{OUTPUT}/model-00003" in outcome.stderr
    assert "pxmerge.lock.json" not in written(store) and "config.json" not in written(store)
    store.faults.clear()
    refused = run("run", "recipe.yaml", "-o", OUTPUT)
    assert refused.code == 4 and "an unfinished run is there" in refused.stderr
    other = run("run", "recipe.yaml", "-o", OUTPUT, "--resume", "--set", "merge.params.density=1")
    assert other.code == 4 and "another plan" in other.stderr
    # What somebody wrote over is made again, what is there as it was is not.
    first = next(name for name in written(store) if name.startswith("model-00001"))
    store.put("models", {f"out/merged/{first}": b"other"})
    store.requests.clear()
    outcome = run("run", "recipe.yaml", "-o", OUTPUT, "--resume")
    assert outcome.code == 0, outcome.stderr
    assert written(store) == local()
    puts = {Path(request.path).name[:11] for request in store.requests if request.method == "PUT"}
    assert "model-00001" in puts and "model-00003" in puts and "model-00002" not in puts


def test_what_a_store_output_cannot_be_is_said_before_the_work(run, store: FakeStore) -> None:
    store.faults.append(refuse("403 Forbidden", "AccessDenied", method="PUT", where=""))
    outcome = run("run", "recipe.yaml", "-o", OUTPUT)
    assert outcome.code == 4 and "does not allow it (AccessDenied)" in outcome.stderr
    store.faults.clear()
    store.put("models", {"out/merged/notes.txt": b"mine"})
    outcome = run("run", "recipe.yaml", "-o", OUTPUT, "--overwrite")
    assert outcome.code == 4 and "notes.txt" in outcome.stderr
    for words in (
        ["run", "recipe.yaml", "-o", "s3://models/x.safetensors"],
        ["run", "recipe.yaml", "-o", "s3://models/x", "--part", "1/2"],
        ["run", "recipe.yaml", "-o", "s3://models/x", "--push", "org/name"],
    ):
        outcome = run(*words)
        assert outcome.code in (2, 4) and outcome.stderr.splitlines()[-1].startswith("error: "), outcome.stderr
    with pytest.raises(OutputError, match="only merges are written to a store"):
        destination(Path("s3://models/x"))
    assert written(store).keys() == {"out/merged/notes.txt".removeprefix("out/merged/")}
    assert json.dumps(sorted(path.name for path in Path().iterdir())).count("s3:") == 0
