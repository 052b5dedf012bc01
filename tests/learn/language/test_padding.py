"""The same texts with twice the padding: every learner that reads texts learns, measures and scores the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from mergekit_px.adapters.acmap import AcmapState
from mergekit_px.cli import main

from .conftest import NEXT, VOCABULARY, learned, numbers, ofasd, padded, save, save_arrays, task

_ALIGN = "align --source-base base --source-model tuned1 --base tuned2 --data DATA -o OUT --steps 4 --batch 16 --route "
_STATS = "stats tuned1 --data DATA -o OUT.safetensors --examples 12 --what "
LEARNED = [
    ("llama", _ALIGN + "orthogonal --controls cheap --sites all --sided two", "OUT/rotations.safetensors"),
    ("t5", _ALIGN + "orthogonal --controls none", "OUT/rotations.safetensors"),
    ("t5", _ALIGN + "theseus --controls none", "OUT/maps.safetensors"),
    ("llama", _ALIGN + "gradfix --controls none", "OUT/signs.safetensors"),
    ("llama", "tune pool --base base --data DATA -o OUT --steps 6 --batch 16", "OUT/components.safetensors"),
    ("t5", "tune pool --base base --data DATA -o OUT --steps 6 --batch 16", "OUT/components.safetensors"),
    ("llama", _STATS + "fisher --labels given", "OUT.safetensors"),
    ("gpt2", _STATS + "fisher --labels sampled", "OUT.safetensors"),
    ("bert", _STATS + "gram", "OUT.safetensors"),
    ("t5", _STATS + "gram", "OUT.safetensors"),
    ("gpt2", "search recipe.yaml --over merge.sources.a=0,1 --data DATA -o OUT", "OUT/model/model.safetensors"),
    ("t5", "search recipe.yaml --over merge.sources.a=0,1 --data DATA -o OUT", "OUT/model/model.safetensors"),
    ("llama", "transfer DATA.yaml -o OUT", "OUT/transfer/target/model.safetensors"),
    ("t5", "transfer DATA.yaml -o OUT", "OUT/transfer/target/model.safetensors"),
]


@pytest.mark.parametrize("objective", ["cross-entropy", "distill", "entropy"])
def test_no_coefficient_changes(world: str, objective: str) -> None:
    reports = [ofasd(f"{name}.npz", name, "--objective", objective, "--steps", "6") for name in ("data", "long")]
    for first, second in zip(*(report["coefficients"].values() for report in reports), strict=True):
        assert first == pytest.approx(second, abs=1e-6)
    for name, scores in reports[0]["test"].items():
        assert scores == pytest.approx(reports[1]["test"][name], abs=1e-4)


@pytest.mark.parametrize(("family", "line", "file"), LEARNED, indirect=["family"])
def test_nothing_that_is_learned_changes(world: str, line: str, file: str) -> None:
    if line.startswith("tune"):
        learned(*"svd --base base --sources tuned1 tuned2 --top-k 6 --as components -o pool".split())  # noqa: SIM905
    Path("recipe.yaml").write_text(
        "models: {base: ./base, a: ./tuned1, b: ./tuned2}\n"
        "merge: {method: task_arithmetic, base: base, sources: {a: 0.5, b: 0.5}}\n"
    )
    tensor = next(name for name, one in load_file("base/model.safetensors").items() if one.shape == (16, 16))
    tensors, scores = [], []
    for data in ("data", "long"):
        Path(f"{data}.npz.yaml").write_text(
            f"models:\n  a: {{weights: ./base, data: {data}.npz, batch: 16}}\n"
            f"  b: {{weights: ./tuned1, data: {data}.npz, batch: 16}}\n"
            f"transfer: {{target: a, source: b, mode: frozen, steps: 4, cycle: 2, controls: [none],"
            f" pairs: [{{target: {tensor}, source: {tensor}, rank: 4}}]}}\n"
        )
        learned(*line.replace("DATA", f"{data}.npz").replace("OUT", f"out-{data}").split())
        tensors.append(load_file(file.replace("OUT", f"out-{data}")))
        report = Path(f"out-{data}.json" if line.startswith("stats") else f"out-{data}/report.json")
        scores.append(json.loads(report.read_text()))
    assert tensors[0].keys() == tensors[1].keys()
    for name, one in tensors[0].items():
        assert torch.allclose(one, tensors[1][name], rtol=1e-4, atol=2e-5 if line.startswith("align") else 1e-6), name
    first, second = map(numbers, scores)
    assert first == pytest.approx(second, rel=1e-5, abs=1e-4)
    if line.startswith(("align", "stats")):
        assert scores[0]["labels"] == ("next tokens" if world in NEXT else "tokens")


def test_no_prototype_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    save(transformers.GPT2Model(config), Path("base"))
    norms = {name: one * 1.5 for name, one in load_file("base/model.safetensors").items() if "ln_" in name}
    state = AcmapState()
    state.add(norms, "norms")
    state.save(Path("state"))
    arrays = {**task("gpt2", 12, 3), "labels": torch.arange(12) % 3}
    inputs = {name: one for name, one in arrays.items() if name != "labels"}
    save_arrays("data.npz", arrays)
    save_arrays("long.npz", {**padded(inputs, left=True), "labels": arrays["labels"]})
    line = ["acmap", "map", "--base", "base"]
    for pool in ("mean", "last"):
        found = []
        for data in ("data", "long"):
            shutil.copy("state", f"{data}-{pool}")
            place = f"{data}-{pool}.safetensors"
            learned(*line, "--state", f"{data}-{pool}", "--data", f"{data}.npz", "--pool", pool, "-o", place)
            found.append(load_file(place))
        assert found[0].keys() == found[1].keys()
        for name, one in found[0].items():
            np.testing.assert_allclose(one, found[1][name], rtol=0, atol=1e-6)
    capsys.readouterr()
    assert main([*line, "--state", "state", "--data", "data.npz", "-q"]) == 2
    assert "depends on nothing but the first token of a text" in capsys.readouterr().err
