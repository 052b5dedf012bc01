from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hub_server import FakeHub
from safetensors.torch import load_file, save_file

RECIPE = """\
models: {base: org/base, math: org/math, code: org/code}
merge: {method: dare-linear, base: base, sources: {math: 0.6, code: 0.4}, params: {density: 0.5}}
output: {path: ./out}
"""


@pytest.fixture
def merged(run, hub: FakeHub) -> Path:
    """A merge of models on the Hub, whose branches have moved on since."""
    Path("recipe.yaml").write_text(RECIPE)
    assert run("run", "recipe.yaml", "--dtype", "bfloat16").code == 0
    for name in ("math", "code"):
        hub.add(f"org/{name}", {path.name: path.read_bytes() for path in Path("base").iterdir()})
    return Path("out")


def relock(folder: Path, change) -> None:
    path = folder / "pxmerge.lock.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_push_pull_verify_rebuild(run, merged: Path, hub: FakeHub) -> None:
    assert run("push", "out", "org/merged").code == 0
    assert run("pull", "org/merged", "-o", "back").code == 0
    assert {path.name for path in Path("back").iterdir()} == {path.name for path in merged.iterdir()}
    assert run("verify", "back").code == 0
    outcome = run("verify", "back", "--rebuild")
    assert outcome.code == 0, outcome.stderr
    assert "files are the same when merged again" in outcome.stdout
    assert "note" not in outcome.stderr


def test_what_was_pulled_into_the_cache_is_verified_too(run, merged: Path, hub: FakeHub) -> None:
    run("push", "out", "org/merged")
    folder = run("pull", "org/merged").stdout.strip()
    assert run("verify", folder).code == 0


def test_a_pull_of_what_is_no_merge_brings_what_it_did(run, hub: FakeHub) -> None:
    assert run("pull", "org/math", "-o", "copy").code == 0
    assert {path.name for path in Path("copy").iterdir()} == {path.name for path in Path("math").iterdir()}


def test_a_rebuild_reads_the_locked_commits(run, merged: Path) -> None:
    document = run("verify", "out", "--rebuild", "--json").document()
    assert document["intact"] is True
    assert document["rebuilt"]["different"] == []
    assert {"model.safetensors", "config.json", "pxmerge.yaml"} <= set(document["rebuilt"]["matching"])


def test_weights_that_the_recipe_does_not_give_are_named(run, merged: Path) -> None:
    weights = load_file(merged / "model.safetensors")
    weights["model.norm.weight"] += torch.ones_like(weights["model.norm.weight"])
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    from mergekit_px.checkpoint.hashing import file_sha256

    place = merged / "model.safetensors"
    entry = {"size": place.stat().st_size, "sha256": file_sha256(place)}
    relock(merged, lambda document: document["files"].update({"model.safetensors": entry}))
    assert run("verify", "out").code == 0
    outcome = run("verify", "out", "--rebuild")
    assert (outcome.code, outcome.stdout.splitlines()[0]) == (3, "different when merged again: model.safetensors")


def test_another_recipe_and_other_versions_are_told(run, merged: Path) -> None:
    path = merged / "pxmerge.yaml"
    path.write_text(path.read_text().replace("0.6", "0.7"))
    relock(merged, lambda document: document["versions"].update({"torch": "1.0"}))
    outcome = run("verify", "out", "--rebuild")
    assert outcome.code == 3
    assert "changed: pxmerge.yaml" in outcome.stdout
    assert "different when merged again: model.safetensors" in outcome.stdout
    assert "it was merged with torch 1.0 (here" in outcome.stderr


def test_a_rebuild_without_recipe_or_lock_is_one_line(run, merged: Path) -> None:
    (merged / "pxmerge.yaml").unlink()
    outcome = run("verify", "out", "--rebuild")
    assert (outcome.code, outcome.stderr.count("\n")) == (3, 1)
    assert "there is no recipe to merge again from" in outcome.stderr
    (merged / "pxmerge.lock.json").unlink()
    assert run("verify", "out", "--rebuild").code == 3


@pytest.mark.parametrize("change", ["changed", "gone"])
def test_a_local_input_that_moved_stops_a_rebuild(run, models, change: str) -> None:
    assert run("linear", "--sources", "math", "code", "-o", "out").code == 0
    assert run("verify", "out", "--rebuild").code == 0
    place = Path("code/model.safetensors")
    if change == "changed":
        place.write_bytes(Path("base/model.safetensors").read_bytes())
    else:
        place.unlink()
    outcome = run("verify", "out", "--rebuild")
    assert (outcome.code, outcome.stdout, outcome.stderr.count("\n")) == (3, "", 1)
    assert "code" in outcome.stderr


def test_one_file_is_rebuilt_from_the_recipe_in_its_lock(run, merged: Path, hub: FakeHub) -> None:
    assert run("linear", "--sources", "org/math", "org/code", "-o", "one.safetensors").code == 0
    hub.add("org/math", {path.name: path.read_bytes() for path in Path("code").iterdir()})
    assert run("verify", "one.safetensors", "--rebuild").code == 0


def test_a_lock_without_hashes_locks_nothing(run, models) -> None:
    assert run("linear", "--sources", "math", "code", "-o", "out", "--no-hash-inputs").code == 0
    outcome = run("run", "out/pxmerge.yaml", "--locked", "-o", "again")
    assert outcome.code == 3
    assert "it holds no hashes of 'math'" in outcome.stderr


def test_a_base_that_cards_name_is_published_and_pinned(run, hub: FakeHub) -> None:
    card = b"---\nbase_model: org/base\n---\n"
    for name in ("math", "code"):
        files = {path.name: path.read_bytes() for path in Path(name).iterdir()}
        hub.add(f"org/{name}", {**files, "README.md": card})
    assert run("ties", "--sources", "org/math", "org/code", "-o", "out").code == 0
    first = hub.history("org/base")[0].sha
    hub.add("org/base", {path.name: path.read_bytes() for path in Path("code").iterdir()})
    assert f"org/base@{first}" in Path("out/pxmerge.yaml").read_text()
    assert run("verify", "out", "--rebuild").code == 0
    Path("recipe.yaml").write_text("models: {m: org/math, c: org/code}\nmerge: {method: ties, sources: [m, c]}\n")
    assert run("lock", "recipe.yaml").code == 0
    now = json.loads(Path("pxmerge.lock.json").read_text())["inputs"]["declared_base"]["commit"]
    hub.add("org/base", {path.name: path.read_bytes() for path in Path("math").iterdir()})
    assert run("run", "recipe.yaml", "--locked", "-o", "locked").code == 0
    assert json.loads(Path("locked/pxmerge.lock.json").read_text())["inputs"]["declared_base"]["commit"] == now


def test_a_mergekit_config_is_locked_and_rebuilt(run, hub: FakeHub) -> None:
    Path("config.yml").write_text(
        "merge_method: linear\nmodels:\n"
        "  - {model: org/math, parameters: {weight: 0.5}}\n  - {model: org/code, parameters: {weight: 0.5}}\n"
    )
    assert run("lock", "config.yml").code == 0
    assert run("run", "config.yml", "-o", "before").code == 0
    hub.add("org/math", {path.name: path.read_bytes() for path in Path("code").iterdir()})
    assert run("run", "config.yml", "--locked", "-o", "out").code == 0
    assert Path("out/model.safetensors").read_bytes() == Path("before/model.safetensors").read_bytes()
    assert run("verify", "out", "--rebuild").code == 0


def test_parts_of_a_locked_merge(run, hub: FakeHub) -> None:
    Path("recipe.yaml").write_text(RECIPE)
    assert run("lock", "recipe.yaml").code == 0
    hub.add("org/math", {path.name: path.read_bytes() for path in Path("code").iterdir()})
    for part in ("1/2", "2/2"):
        assert run("run", "recipe.yaml", "--locked", "--shard-size", "1kB", "--part", part).code == 0
    assert run("publish", "out").code == 0
    assert run("verify", "out", "--rebuild").code == 0
