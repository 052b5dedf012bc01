"""`acmap map`, `classify` and `export` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_px.learn.acmap import mapping

PUSH = {1: np.zeros(3), 2: np.array([0.5, -1, 0.25])}
CENTRES = np.array([[4.0, 0, 1], [0, 4, 1], [1, 0, 4], [-3, -3, 1]])


def cloud(task: int, seed: int, rows: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Examples of the classes 0 and 1, or 2 and 3, around their centres."""
    labels = np.arange(rows) % 2 + 2 * (task - 1)
    return CENTRES[labels] + 0.1 * np.random.default_rng(seed).normal(size=(rows, 3)), labels


@pytest.fixture
def work(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two merged adapters; features of two tasks, which the second adapter moves, of a test, and of the old task."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        save_file({"down": torch.full((2, 2), float(number))}, f"t{number}.safetensors")
    assert run("acmap", "merge", "t1.safetensors", "t2.safetensors", "--state", "state", "-q").code == 0
    first, second, old = cloud(1, 1), cloud(2, 2), cloud(1, 1)
    np.savez("task1.npz", features=first[0] + PUSH[1], labels=first[1])
    np.savez("task2.npz", features=second[0] + PUSH[2], features_1=second[0] + PUSH[1], labels=second[1])
    np.savez("old.npz", features=old[0] + PUSH[2], labels=old[1])
    parts = [cloud(task, 10 + task) for task in (1, 2)]
    np.savez(
        "test.npz",
        features=np.concatenate([x for x, _ in parts]) + PUSH[2],
        labels=np.concatenate([labels for _, labels in parts]),
    )
    return tmp_path


def map_both(run) -> None:
    for task in (1, 2):
        assert run("acmap", "map", "--state", "state", "--features", f"task{task}.npz", "-q").code == 0


def test_map_says_how_far_prototypes_moved(run, work) -> None:
    assert run("acmap", "map", "--state", "state", "--features", "task1.npz", "-q").stdout == "state\n"
    words = ("acmap", "map", "--state", "state", "--features", "task2.npz", "--oracle", "old.npz")
    outcome = run(*words, "-o", "prototypes.safetensors")
    assert outcome.code == 0
    first, *lines = outcome.stderr.splitlines()
    assert first == "task 2: 2 classes, 8 examples, features of 3 numbers"
    table = [line.split() for line in lines]
    norm = np.linalg.norm(PUSH[2])
    assert table[1][:2] == ["1", f"{norm:.4g}"] and float(table[1][3]) > 0.1 and float(table[1][4]) < 1e-4
    assert table[2][:2] == ["2", "0"]
    assert outcome.stdout == "prototypes.safetensors\n"
    report = json.loads(Path("prototypes.json").read_text())
    assert (report["t"], report["L"], report["classes"]) == (2, 10, [2, 3])
    assert report["drift"]["tasks"]["1"]["after"] < 1e-12 < 0.1 < report["drift"]["tasks"]["1"]["before"]
    again = run(*words, "--json")
    assert again.document().items() >= {**report, "was_mapped_already": True}.items()
    assert "nothing changed" in again.stderr


def test_classify_prints_a_line_for_each_example(run, work) -> None:
    map_both(run)
    outcome = run("acmap", "classify", "--state", "state", "--features", "test.npz")
    assert outcome.code == 0
    lines = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert len(lines) == 16
    assert lines[0].keys() == {"index", "class", "task", "cosine", "label"}
    assert [line["class"] for line in lines] == [line["label"] for line in lines]
    assert outcome.stderr == "accuracy: task 1 100.00 %, task 2 100.00 %, all 100.00 %\n"


def test_classify_into_a_file_and_as_a_document(run, work) -> None:
    map_both(run)
    words = ("acmap", "classify", "--state", "state", "--features", "test.npz")
    outcome = run(*words, "-o", "predictions.npz")
    assert [line.split() for line in outcome.stderr.splitlines()[1:4]] == [
        ["task", "1", "100.00"],
        ["task", "2", "100.00"],
        ["all", "100.00"],
    ]
    assert outcome.stdout == "predictions.npz\n"
    with np.load("predictions.npz") as archive:
        assert archive["class"].tolist() == archive["labels"].tolist()
    document = run(*words, "--json").document()
    assert document["accuracy"] == {"overall": 100.0, "tasks": {"1": 100.0, "2": 100.0}}
    assert len(document["predictions"]) == 16
    assert run(*words, "-o", "predictions.npz", "--overwrite", "--json").document()["predictions"] is None
    assert run(*words, "-q").stderr == ""


def test_merged_and_not_mapped_is_said(run, work) -> None:
    assert run("acmap", "map", "--state", "state", "--features", "task1.npz", "-q").code == 0
    outcome = run("acmap", "classify", "--state", "state", "--features", "task1.npz", "--json")
    assert outcome.stderr.startswith("warning: merged and not mapped, so left out: task 2\n")


def test_export(run, work) -> None:
    map_both(run)
    outcome = run("acmap", "export", "--state", "state", "-o", "head.safetensors", "--prefix", "head.", "--json")
    assert outcome.document() == {"output": "head.safetensors", "classes": [0, 1, 2, 3], "dimension": 3}
    head = load_file("head.safetensors")["head.weight"]
    with np.load("test.npz") as archive:
        scores = torch.from_numpy(archive["features"]).float() @ head.T
        assert scores.argmax(1).tolist() == archive["labels"].tolist()
    assert run("acmap", "export", "--state", "state", "-o", "a2.safetensors", "--adapter", "2", "-q").code == 0
    assert load_file("a2.safetensors")["down"].flatten().tolist() == [1.5] * 4


def test_rows_of_classes_with_gaps_are_pointed_out(run, work) -> None:
    np.savez("gap.npz", features=np.eye(3), labels=np.array([4, 4, 9]))
    assert run("acmap", "map", "--state", "state", "--features", "gap.npz", "--classes", "4", "9", "-q").code == 0
    outcome = run("acmap", "export", "--state", "state", "-o", "head.safetensors")
    assert "row r of the head is the r-th class" in outcome.stderr


def test_an_interruption_says_how_to_go_on(run, work, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mapping, "class_means", stop)
    words = ("acmap", "map", "--state", "state", "--features", "task1.npz")
    outcome = run(*words)
    assert outcome.code == 130
    assert outcome.stderr == f"interrupted; to go on: pxmerge {' '.join(words)} --resume\n"
    monkeypatch.undo()
    monkeypatch.chdir(work)
    assert run(*words, "--resume").code == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("map --state state", 2, "either --features or --data"),
        ("map --features task1.npz", 2, "--state"),
        ("map --state nowhere --features task1.npz", 3, "nowhere"),
        ("map --state no/where --features task1.npz", 5, "no such folder"),
        ("map --state t1.safetensors --features task1.npz", 3, "not a state of acmap"),
        ("map --state state --features missing.npz", 3, "missing.npz: no such"),
        ("map --state state --features broken.npz", 3, "not a readable .npz"),
        ("map --state state --features text.txt", 3, "comes as .npz or .safetensors"),
        ("map --state state --features task1.npz --base b", 2, "--features needs no model"),
        ("map --state state --data task1.npz", 2, "give --base, --model, or both"),
        ("map --state state --data task1.npz --model vit.py:make", 2, "allow it with --allow-code"),
        ("map --state state --features task1.npz --classes 0 1.5", 2, "--classes must be a whole number, not 0 1.5"),
        ("map --state state --features task1.npz --classes 0 1 7", 3, "class 7 of the task has no examples"),
        ("map --state state --features task2.npz --task 2", 3, "map the tasks in their order"),
        ("map --state state --features task2.npz", 3, "features_1 has no meaning; expected are features, labels"),
        ("map --state state --features task1.npz -o p.json", 4, "end the name so"),
        ("map --state state --features task1.npz -o t1.safetensors", 4, "exists already"),
        ("classify --state state --features test.npz", 3, "no prototypes yet"),
        ("classify --state state --features test.npz -o p.safetensors", 4, "written as .npz"),
        ("export --state state -o head.safetensors", 3, "no prototypes yet"),
        ("export --state state -o a.safetensors --adapter 3", 3, "task 3 needs the merged adapter of 3 tasks"),
        ("export --state state -o a.safetensors --adapter 1 --bias", 2, "which is no head"),
    ],
)
def test_a_mistake_is_one_line(run, work, words: str, code: int, message: str) -> None:
    Path("broken.npz").write_bytes(b"no archive")
    Path("text.txt").write_text("x")
    before = Path("state").read_bytes()
    outcome = run("acmap", *words.split())
    assert (outcome.code, outcome.stdout) == (code, ""), outcome.stderr
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert Path("state").read_bytes() == before
    assert not list(Path().glob("*.lock"))


def test_two_runs_do_not_write_one_state(run, work) -> None:
    from mergekit_px.adapters.acmap_file import locked

    with locked(Path("state")):
        for words in ("map --state state --features task1.npz", "merge t1.safetensors --state state --resume"):
            outcome = run("acmap", *words.split())
            assert outcome.code == 5
            assert "another run is writing there" in outcome.stderr


def test_a_later_adapter_must_mean_the_same_as_the_state_s_first(run, work) -> None:
    for name, alpha in (("a", 8), ("b", 16)):
        Path(name).mkdir()
        save_file({"x.lora_A.weight": torch.ones(2, 2)}, f"{name}/adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha}
        Path(f"{name}/adapter_config.json").write_text(json.dumps(config))
    assert run("acmap", "merge", "a", "--state", "lora", "-q").code == 0
    outcome = run("acmap", "merge", "b", "--state", "lora")
    assert outcome.code == 4
    assert "'lora_alpha' is 16, in lora 8" in outcome.stderr
