from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergekit_px.testing import fine_tune, tiny_llama_config, tiny_llama_tensors, write_checkpoint

Weights = dict[str, torch.Tensor]
BASE = tiny_llama_tensors(layers=1, dtype=torch.float32)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def save(step: int) -> Weights:
    weights = fine_tune(BASE, step, size=0.5)
    # As trainers do: first a name that says that it is not whole.
    write_checkpoint(Path(f"run/tmp-checkpoint-{step}"), weights, config=tiny_llama_config(layers=1))
    Path(f"run/tmp-checkpoint-{step}").rename(f"run/checkpoint-{step}")
    return weights


def mean(saved: list[Weights]) -> Weights:
    return {name: torch.stack([each[name].double() for each in saved]).mean(dim=0) for name in saved[0]}


def expect(found: Path | str, wanted: Weights) -> None:
    for name, value in load_file(Path(found) / "model.safetensors").items():
        assert torch.equal(value.float(), wanted[name].float()), name


def test_a_mean_that_takes_what_is_new_is_the_mean_of_all(run) -> None:
    saved = []
    for step in range(1, 13):
        saved.append(save(step))
        outcome = run("average", "run", "--into", "state", "-o", "out", *(["--overwrite"] if step > 1 else []))
        assert outcome.code == 0, outcome.stderr
    expect("out", mean(saved))
    single = run("average", "run", "-o", "single")
    assert single.code == 0
    assert Path("single/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    assert load_file("out/model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert load_file("state/sum-12/model.safetensors")["model.norm.weight"].dtype == torch.float64
    assert sorted(path.name for path in Path("state").iterdir()) == ["running-mean.json", "sum-12"]
    assert run("verify", "out").code == 0 and run("verify", "state/sum-12").code == 0


def test_several_new_ones_are_taken_at_once_and_nothing_twice(run) -> None:
    saved = [save(step) for step in (10, 20)]
    assert run("average", "run", "--into", "state").code == 0
    saved += [save(step) for step in (30, 40, 50)]
    outcome = run("average", "run/checkpoint-*", "--into", "state", "--json")
    assert outcome.document()["steps"] == [10, 20, 30, 40, 50]
    outcome = run("average", "run", "--into", "state", "-o", "out")
    assert outcome.code == 0 and "nothing is new" in outcome.stderr
    expect("out", mean(saved))
    Path("run/checkpoint-50").rename("gone")
    outcome = run("average", "run", "--into", "state", "-o", "other")
    assert outcome.code == 3 and "the checkpoint of step 50" in outcome.stderr
    assert run("average", "run", "--into", "state", "-o", "other", "--dtype", "float64").code == 0
    expect("other", mean(saved))


def test_ema(run) -> None:
    wanted = None
    for step in range(1, 5):
        weights = save(step)
        if wanted is None:
            wanted = {name: value.double() for name, value in weights.items()}
        else:
            wanted = {name: 0.75 * value + 0.25 * weights[name].double() for name, value in wanted.items()}
        if step != 2:  # 2 and 3 are taken together
            assert run("average", "run", "--into", "state", "--weights", "ema:0.75").code == 0
    assert wanted is not None
    expect("state/sum-4", wanted)
    refused = run("average", "run", "--into", "state")
    assert refused.code == 2 and "begun with --weights ema:0.75" in refused.stderr


def test_following_a_run_takes_checkpoints_as_they_become_whole(run, monkeypatch) -> None:
    monkeypatch.setattr("mergekit_px.cli.running_mean._POLL_SECONDS", 0.1)
    monkeypatch.setattr("mergekit_px.cli.running_mean._SETTLED_SECONDS", 0.2)
    saved: list[Weights] = []

    def train() -> None:
        for step in (100, 200, 300):
            time.sleep(0.3)
            saved.append(save(step))

    trainer = threading.Thread(target=train)
    trainer.start()
    outcome = run("average", "run", "--into", "state", "--follow", "--to", 300, "-o", "out")
    trainer.join()
    assert outcome.code == 0, outcome.stderr
    expect("out", mean(saved))
    assert json.loads(Path("state/running-mean.json").read_text())["steps"] == [100, 200, 300]


def test_a_half_written_checkpoint_is_waited_for(run, monkeypatch) -> None:
    monkeypatch.setattr("mergekit_px.cli.running_mean._POLL_SECONDS", 0.1)
    saved = [save(1), save(2)]
    file = Path("run/checkpoint-2/model.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])

    def finish() -> None:
        time.sleep(0.5)
        file.write_bytes(whole)

    trainer = threading.Thread(target=finish)
    trainer.start()
    assert run("average", "run", "--into", "state", "--follow", "--to", 2).code == 0
    trainer.join()
    assert run("average", "run", "--into", "state", "-o", "out").code == 0
    expect("out", mean(saved))


def test_a_run_that_fails_leaves_the_older_mean(run, monkeypatch) -> None:
    saved = [save(1)]
    assert run("average", "run", "--into", "state").code == 0
    save(2)
    tensors = load_file("run/checkpoint-2/model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, "run/checkpoint-2/model.safetensors")
    assert run("average", "run", "--into", "state").code == 5
    expect("state/sum-1", saved[0])
    assert json.loads(Path("state/running-mean.json").read_text())["steps"] == [1]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("run --follow", 2, "--follow goes with --into"),
        ("run --into state --last 2", 2, "do not go with --into"),
        ("run --into state --weights cosine", 2, "needs all checkpoints at once"),
        ("run --into run", 3, "no running mean but other files"),
        ("run --into damaged", 3, "damaged"),
        ("empty --into state", 3, "no checkpoints"),
    ],
)
def test_mistakes(run, words: str, code: int, message: str) -> None:
    save(1)
    Path("empty").mkdir()
    Path("damaged").mkdir()
    Path("damaged/running-mean.json").write_text('{"weights": "uniform", "folder": "../run", "steps": [1]}')
    outcome = run("average", *words.split())
    assert outcome.code == code and message in outcome.stderr
    assert outcome.stderr.count("\n") == 1 and not Path("state").exists()


def test_ctrl_c_says_the_command_that_goes_on(run, monkeypatch) -> None:
    save(1)

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mergekit_px.cli.running_mean._SETTLED_SECONDS", 0.0)
    monkeypatch.setattr("mergekit_px.cli.running_mean.time.sleep", interrupted)
    outcome = run("average", "run", "--into", "state", "--follow", "-o", "out")
    assert outcome.code == 130
    assert "pxmerge average run --into state -o out --overwrite --follow" in outcome.stderr
    assert json.loads(Path("state/running-mean.json").read_text())["steps"] == [1]
    assert run("average", "run", "--into", "state").code == 0
