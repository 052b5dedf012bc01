from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_px.checkpoint import whole


def bottleneck(seed: int) -> dict[str, torch.Tensor]:
    """A bottleneck adapter of two blocks of a vision transformer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"down.weight": (4, 12), "down.bias": (4,), "up.weight": (12, 4), "up.bias": (12,)}
    return {
        f"blocks.{block}.adapter.{name}": torch.randn(*shape, generator=generator)
        for block in range(2)
        for name, shape in shapes.items()
    }


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    monkeypatch.chdir(tmp_path)
    found = [bottleneck(seed) for seed in range(4)]
    for number, adapter in enumerate(found):
        save_file(adapter, f"t{number}.safetensors")
    return found


FILES = [f"t{number}.safetensors" for number in range(4)]


def check(file: str, adapters: list[dict[str, torch.Tensor]]) -> None:
    found = load_file(file)
    for name in adapters[0]:
        mean = sum(adapter[name].double() for adapter in adapters) / len(adapters)
        torch.testing.assert_close(found[name], mean.float(), rtol=0, atol=0)
    assert found.keys() == adapters[0].keys()


def test_the_mean_in_any_order_to_the_byte(run, tasks) -> None:
    assert run("acmap", "merge", *FILES, "-o", "out.safetensors").code == 0
    check("out.safetensors", tasks)
    assert run("acmap", "merge", *reversed(FILES), "-o", "other.safetensors").code == 0
    assert Path("out.safetensors").read_bytes() == Path("other.safetensors").read_bytes()


def test_task_by_task_through_the_state(run, tasks) -> None:
    assert run("acmap", "merge", FILES[0], "--state", "state", "-q").stdout == "state\n"
    for file in FILES[1:3]:
        assert run("acmap", "merge", file, "--state", "state").code == 0
    outcome = run("acmap", "merge", FILES[3], "--state", "state", "-o", "out.safetensors", "--json")
    assert outcome.document()["merged"] == 4
    check("out.safetensors", tasks)


def test_nothing_changes_after_the_stop(run, tasks) -> None:
    outcome = run("acmap", "merge", *FILES, "--limit", 2, "-o", "out.safetensors", "--json")
    assert [task["merged"] for task in outcome.document()["tasks"]] == [True, True, False, False]
    check("out.safetensors", tasks[:2])


def test_modes(run, tasks) -> None:
    assert run("acmap", "merge", *FILES, "--mode", "aper", "-o", "first.safetensors").code == 0
    check("first.safetensors", tasks[:1])
    assert run("acmap", "merge", *FILES, "--mode", "none", "-o", "last.safetensors").code == 0
    check("last.safetensors", tasks[3:])
    for mode in ("trim", "trim-published"):
        words = ("--mode", mode, "--trim-rate", 0.5, "-o", f"{mode}.safetensors")
        assert run("acmap", "merge", *FILES, *words).code == 0
    found = load_file("trim.safetensors")
    for name, value in found.items():
        stacked = torch.stack([task[name].double() for task in tasks])
        flat = stacked.abs().flatten(1)
        cuts = flat.sort(1).values[:, flat.shape[1] // 2]
        kept = stacked.abs() >= cuts.view(-1, *[1] * value.dim())
        wanted = (stacked * kept).sum(0) / kept.sum(0).clamp(min=1)
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=1e-6)


def test_an_interrupted_merge_goes_on(run, tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    real = whole.read_tensors

    def stop_at_third(checkpoint):
        if checkpoint.label == FILES[2]:
            raise KeyboardInterrupt
        return real(checkpoint)

    words = ("acmap", "merge", *FILES, "--state", "state", "-o", "out.safetensors")
    monkeypatch.setattr(whole, "read_tensors", stop_at_third)
    outcome = run(*words)
    assert outcome.code == 130
    assert outcome.stderr == f"interrupted; to go on: pxmerge {' '.join(words)} --resume\n"
    monkeypatch.setattr(whole, "read_tensors", real)
    assert run(*words).code == 2
    assert run(*words, "--resume", "--json").document()["added"] == 2
    check("out.safetensors", tasks)


def write_peft(folder: str, seed: int, alpha: int = 8) -> None:
    Path(folder).mkdir()
    save_file(bottleneck(seed), f"{folder}/adapter_model.safetensors")
    Path(f"{folder}/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": alpha}))


def test_peft_folders_give_a_peft_folder(run, tasks) -> None:
    write_peft("a", 0)
    write_peft("b", 1)
    outcome = run("acmap", "merge", "a", "b", "-o", "out")
    assert outcome.code == 0
    assert "mean of the factors" in outcome.stderr
    check("out/adapter_model.safetensors", tasks[:2])
    assert Path("out/adapter_config.json").read_bytes() == Path("a/adapter_config.json").read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("t0.safetensors", 2, "--state"),
        ("t0.safetensors --resume -o o.safetensors", 2, "--resume goes with --state"),
        ("t0.safetensors -o folder", 2, ".safetensors"),
        ("t0.safetensors -o t1.safetensors", 4, "already"),
        ("t0.safetensors t0.safetensors -o o.safetensors", 2, "given twice"),
        ("t0.safetensors wide.safetensors -o o.safetensors", 4, "wide.safetensors"),
        ("t0.safetensors nowhere -o o.safetensors", 3, "nowhere"),
        ("t0.safetensors --state t1.safetensors", 3, "not a state of acmap"),
        ("t1.safetensors --state state --mode trim", 2, "begun with average"),
        ("t1.safetensors --state state --limit 3", 2, "begun with 10"),
        ("t0.safetensors --state state", 2, "already"),
        ("a b -o o.safetensors", 4, "'lora_alpha' is 16"),
        ("t0.safetensors --trim-rate 1 -o o.safetensors", 2, "trim rate"),
    ],
)
def test_a_mistake_is_one_line(run, tasks, words: str, code: int, message: str) -> None:
    assert run("acmap", "merge", "t0.safetensors", "--state", "state").code == 0
    before = Path("state").read_bytes()
    save_file({name: torch.ones(3, 3) for name in tasks[0]}, "wide.safetensors")
    write_peft("a", 0)
    write_peft("b", 1, alpha=16)
    outcome = run("acmap", "merge", *words.split())
    assert (outcome.code, outcome.stdout) == (code, ""), outcome.stderr
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert Path("state").read_bytes() == before
