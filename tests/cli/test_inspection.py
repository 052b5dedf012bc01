from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import save_file


def test_inspect_shows_what_is_there(run, models) -> None:
    outcome = run("inspect", "math")
    assert outcome.code == 0
    for words in ("LlamaForCausalLM", "2 in model.layers.", "1.89 kB", "model.safetensors", "no, by its config"):
        assert words in outcome.stdout
    assert "input_layernorm" not in outcome.stdout


def test_inspect_lists_tensors_by_a_glob(run, models) -> None:
    text = run("inspect", "math", "--tensors", "*layernorm*").stdout.partition("\nTensors\n")[2]
    assert [line.split()[0] for line in text.splitlines()[1:]] == [
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
    ]
    document = run("inspect", "math", "--tensors", "*norm*", "--json").document()
    assert len(document["matching"]) == 3


def test_inspect_in_json(run, models) -> None:
    document = run("inspect", "math/model.safetensors", "--json").document()
    assert document["parameters"] == 472
    assert document["kind"] == "model"


def test_inspect_refuses_a_file_that_is_none(run, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 100)
    outcome = run("inspect", tmp_path / "x.safetensors")
    assert (outcome.code, outcome.stdout) == (3, "")
    assert "x.safetensors" in outcome.stderr


def test_compare_sorts_by_difference(run, models) -> None:
    weights = dict(models.weights["base"])
    weights["lm_head.weight"] = weights["lm_head.weight"] * 2
    save_file(weights, models.math / "model.safetensors")
    outcome = run("compare", "base", "math")
    assert outcome.code == 0
    rows = outcome.stdout.partition("By tensor")[2].splitlines()[2:]
    assert rows[0].split()[:2] == ["lm_head.weight", "1"]
    assert all(row.split()[1] == "equal" for row in rows[1:])
    assert "6 of 7" in outcome.stdout


def test_compare_several_with_their_base(run, models) -> None:
    outcome = run("compare", "math", "code", "--base", "base", "--limit", 2)
    assert "against base" in outcome.stdout
    assert "sign conflicts:" in outcome.stdout
    assert "and 5 more" in outcome.stdout
    document = run("compare", "math", "code", "--base", "base", "--json").document()
    assert document["models"] == ["math", "code"]
    assert abs(document["total"]["delta_cosines"][0][1]) < 0.2


def test_compare_fits_a_narrow_terminal(run, models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert max(map(len, run("compare", "base", "math").stdout.splitlines())) <= 40


def test_compare_says_what_it_cannot_compare(run, models) -> None:
    weights = {name: value[:4] for name, value in models.weights["base"].items() if "norm" not in name}
    save_file(weights, models.math / "model.safetensors")
    outcome = run("compare", "base", "math", "--json")
    document = outcome.document()
    assert outcome.code == 4 and "no tensor is in all models" in outcome.stderr
    assert (len(document["missing"]), len(document["mismatched"]), document["tensors"]) == (3, 4, [])
    shown = run("compare", "base", "math").stdout
    assert "not in math: model.norm.weight" in shown
    assert "shapes differ: lm_head.weight: [16, 8] and [4, 8]" in shown
    short = run("compare", "base", "math", "--limit", "1").stdout.splitlines()
    assert [line for line in short if "more (all with --limit 0)" in line] == [
        "and 2 more (all with --limit 0)",
        "and 3 more (all with --limit 0)",
    ]


def test_compare_needs_two(run, models) -> None:
    outcome = run("compare", "math")
    assert (outcome.code, outcome.stderr) == (2, "error: one model alone cannot be compared; give another, or --base\n")


def test_verify_accepts_what_was_merged_and_nothing_else(run, models) -> None:
    assert run("linear", "--sources", "math", "code", "-o", "out").code == 0
    intact = run("verify", "out")
    assert intact.code == 0
    assert re.fullmatch(r"OK: \d files match the lock\n", intact.stdout)

    shard = Path("out/model.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    Path("out/config.json").unlink()
    Path("out/notes.txt").write_text("")
    different = run("verify", "out")
    assert different.code == 3
    assert different.stdout == "changed: model.safetensors\nmissing: config.json\nextra: notes.txt\n"
    document = run("verify", "out", "--json")
    assert document.code == 3
    assert json.loads(document.stdout)["intact"] is False


def test_verify_needs_a_lock_file(run, models) -> None:
    outcome = run("verify", "math")
    assert outcome.code == 3
    assert "pxmerge.lock.json" in outcome.stderr
