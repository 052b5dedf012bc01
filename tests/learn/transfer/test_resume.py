from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergekit_px.learn.transfer.side import Side


def stop_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    plain, counted = Side.learn, [0]

    def learn(side: Side, step: int) -> float:
        counted[0] += 1
        if counted[0] > calls:
            raise KeyboardInterrupt
        return plain(side, step)

    monkeypatch.setattr(Side, "learn", learn)


@pytest.mark.parametrize("calls", [3, 13, 33])
@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "joint", "controls": ["none"]},
        {"mode": "mutual", "controls": ["sham"], "select": "best", "residual": False, "phi_grad": "exact"},
    ],
    ids=["joint", "mutual"],
)
def test_a_resumed_run_is_the_uninterrupted_one(place, files, changes: dict[str, object], calls: int) -> None:
    place.transfer.update(changes, save_every=5)
    place.plan["models"]["wide"]["data"] = "nets.py:data"
    place.run("-o", "whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, calls)
        stopped = place.run("-o", "cut", code=130)
    assert "--resume" in stopped.stderr
    assert not Path("cut/report.json").exists()
    if calls >= 10:  # five steps of two models
        assert "an unfinished run is there" in place.fails("-o", "cut", code=4)
    place.run("-o", "cut", "--resume")
    assert files("cut") == files("whole")


def test_another_plan_is_not_resumed(place) -> None:
    place.transfer["save_every"] = 2
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 9)
        place.run(code=130)
    for change in ("transfer.steps=13", "models.wide.batch=4", "seeds=2", "transfer.adapter.gate=0.2"):
        assert "another plan" in place.fails("--resume", "--set", change, code=4)
    Path("nets.py").write_text(Path("nets.py").read_text() + "\n")
    assert "another plan" in place.fails("--resume", code=4)
    place.run("--overwrite")


def test_damaged_states_are_not_resumed(place) -> None:
    place.transfer["save_every"] = 2
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 27)
        place.run(code=130)
    [state] = Path("out/.pxmerge/learned/transfer").glob("*.safetensors")
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    assert str(state) in place.fails("--resume", code=3)
    state.write_bytes(whole.replace(b"pxmerge_training_state", b"pxmerge_training_stat3"))
    assert "not the state of a run that was stopped; start over with --overwrite" in place.fails("--resume", code=3)
    state.write_bytes(whole)
    [finished] = Path("out/.pxmerge/learned/transfer").glob("*.json")
    finished.write_text("{}")
    assert "the result of a finished run cannot be read" in place.fails("--resume", code=3)


def test_folders_that_are_not_free(place) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep")
    assert "the output folder is not empty" in place.fails(code=4)
    assert "there is no unfinished run to resume" in place.fails("--resume", code=4)
    assert "mine.txt" in place.fails("--overwrite", code=4)
    assert Path("out/mine.txt").read_text() == "keep"
    assert "give one of them" in place.fails("--resume", "--overwrite")
    assert "the output is a file" in place.fails("-o", "out/mine.txt", code=4)


def test_a_refused_plan_leaves_no_folder(place) -> None:
    place.transfer["pairs"][0]["source"] = "nothing"
    place.fails(code=4)
    assert not Path("out").exists()


def test_a_run_that_diverges_keeps_the_last_good_state(place) -> None:
    place.transfer.update(save_every=2)
    plain = Side.learn

    def learn(side: Side, step: int) -> float:
        if side.name == "kernels" and step == 7:
            with torch.no_grad():
                side.module.head.weight.fill_(float("inf"))
        return plain(side, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Side, "learn", learn)
        line = place.fails(code=5)
    assert line.startswith(
        "out/transfer/last-good: the loss of 'kernels' is not finite at step 7 of the run 'transfer'"
    )
    assert "the models of step 6 are kept" in line
    kept = place.tensors("out/transfer/last-good/target")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())
    assert kept["norm.num_batches_tracked"] == 6
    assert place.tensors("out/transfer/last-good/source").keys() == {
        f"{layer}.{name}" for layer in ("first", "second", "unused") for name in ("weight", "bias")
    }


def test_a_metric_that_is_no_number_stops_the_run(place) -> None:
    place.plan["models"]["kernels"]["metric"] = "nets.py:nothing"
    assert "the nets.py:nothing of 'kernels' on validation data is nan" in place.fails(code=5)


@pytest.mark.parametrize(("name", "rate", "message"), [
    ("sgd", 1e30, "is not finite"),
    ("sgd", 1e39, "a step by the learning rate 1e+39 overflows for 'kernels' at step 0"),
    ("adamw", 1e38, "a step by the learning rate 1e+38 overflows for 'kernels' at step 0"),
])  # fmt: skip
def test_a_rate_far_too_high_diverges(place, name: str, rate: float, message: str) -> None:
    place.plan["models"]["kernels"]["optimizer"] = {"name": name, "lr": rate}
    line = place.fails(code=5)
    assert message in line and "are kept" in line
    kept = place.tensors("out/transfer/last-good/target")
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())


def test_a_rate_far_too_high_for_the_adapters_diverges(place) -> None:
    place.transfer["adapter"] = {**place.transfer.get("adapter", {}), "lr": 1e38}
    assert "overflows for the adapters at transfer 1" in place.fails(code=5)
