from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mergekit_px.learn.transfer.adapter import AdapterStack
from mergekit_px.learn.transfer.load import load_transfer_plan


@pytest.mark.parametrize(
    ("pair", "line"),
    [
        ({"target": "deep.wieght"}, "'kernels' has no tensor 'deep.wieght'; did you mean 'deep.weight'?"),
        ({"source": "frist.weight"}, "'wide' has no tensor 'frist.weight'; did you mean 'first.weight'?"),
        ({"target": "norm.weight"}, "shape [4] is no matrix, and only matrices and kernels are transferred"),
        ({"rank": [7, 4]}, "rank 7 is above that of a 6 x 36 matrix; it can be 6 at most, or full"),
        ({"rank": [3, 13]}, "rank 13 is above that of a 12 x 16 matrix"),
        ({"target": "norm.running_mean"}, "is no matrix"),
        ({"source": "unused.weight", "rank": 2}, "the loss of 'wide' gives 'unused.weight' no gradient"),
    ],
)
@pytest.mark.parametrize("mode", ["joint", "mutual"])
def test_pairs_that_cannot_be(place, pair: dict[str, object], line: str, mode: str) -> None:
    place.transfer["pairs"][0].update(pair)
    place.transfer["mode"] = mode
    message = place.fails(code=4)
    assert message.startswith("plan.yaml:1:")
    assert line in message


def test_a_source_without_gradients_can_be_frozen(place) -> None:
    place.plan["models"]["wide"]["model"] = "nets.py:fixed"
    assert "'first.weight' of 'wide' is no parameter that learns" in place.fails(code=4)
    place.plan["models"]["wide"]["weights"] = str(place.checkpoint("big", "fixed"))
    place.transfer["mode"] = "frozen"
    place.run()


def test_tied_tensors_are_one(place) -> None:
    place.plan["models"]["wide"]["model"] = "nets.py:tied"
    place.transfer["pairs"] = [
        {"target": "deep.weight", "source": "first.weight", "rank": 2},
        {"target": "conv.weight", "source": "again.weight", "rank": 2},
    ]
    assert "'again.weight' and 'first.weight' of 'wide' are one tied tensor" in place.fails(code=4)


@pytest.mark.parametrize(
    ("model", "line", "code"),
    [
        ({"data": "none.npz"}, "none.npz: no such data file", 3),
        ({"data": "nets.py:no_labels"}, "nets.py:no_labels: a batch has no 'labels', it has pixels", 3),
        ({"data": "nets.py:no_batches"}, "nets.py:no_batches: the validation data has no batches", 3),
        ({"data": "wide.npz"}, "wide.npz: the model cannot take the arrays (pixels [5] for an example)", 3),
        ({"data": "other.npz"}, "the arrays (image) are not those of the model's forward pass: it needs pixels", 3),
        ({"data": "four.npz"}, "four.npz: labels go from 0 to 3, the model has classes 0 to 2", 3),
        ({"data": "values.npz"}, "accuracy needs labels that are classes; write metric: loss", 3),
        ({"data": {"train": "long.npz", "validation": 0.6, "test": 0.6}}, "60 examples do not suffice", 2),
        ({"loss": "crossentropy"}, "there is no loss 'crossentropy'; give auto, cross_entropy, mse or file.py", 2),
        ({"metric": "f1"}, "there is no metric 'f1'; give accuracy, loss or file.py:function", 2),
        ({"loss": "nets.py:vector_loss"}, "nets.py:vector_loss: a loss is a tensor with one value", 2),
        ({"model": "digits-rnn"}, "'digits-rnn' names no function; write file.py:function", 2),
        ({"weights": "./nowhere"}, "./nowhere: no such file or folder", 3),
    ],
)
def test_models_and_data_that_cannot_be(place, model: dict[str, object], line: str, code: int) -> None:
    labels = np.arange(20) % 3
    np.savez("wide.npz", pixels=np.zeros((20, 5), np.float32), labels=labels)
    np.savez("other.npz", image=np.zeros((20, 1, 4, 4), np.float32), labels=labels)
    np.savez("four.npz", pixels=np.zeros((20, 1, 4, 4), np.float32), labels=np.arange(20) % 4)
    np.savez("values.npz", pixels=np.zeros((20, 1, 4, 4), np.float32), labels=np.eye(20, 3, dtype=np.float32))
    place.plan["models"]["kernels"].update(model)
    assert line in place.fails(code=code)


def test_code_needs_leave(place, capsys: pytest.CaptureFixture[str]) -> None:
    from mergekit_px.cli import main

    Path("plan.yaml").write_text(json.dumps(place.plan))
    assert main(["transfer", "plan.yaml"]) == 2
    assert "allow it with --allow-code" in capsys.readouterr().err


def test_memory_is_planned_from_headers(place) -> None:
    place.transfer["mode"] = "mutual"
    assert "--memory: the size of 'kernels' is known only when its function" in place.fails("--memory", "2GB", code=2)
    for name in ("wide", "kernels"):
        place.plan["models"][name]["weights"] = str(place.checkpoint(f"{name}-weights", name))
    message = place.fails("--memory", "400MB", code=4)
    # 353 numbers of kernels with two moments, 263 of wide with one (sgd), one adapter for each direction
    found = re.search(
        r"bytes a parameter \(weights 4.0, gradients and moments (\S+), adapters (\S+), one layer", message
    )
    assert found is not None, message
    assert float(found[1]) == round(4 * (3 * 353 + 2 * 263) / (353 + 263), 1)
    assert "write mode: frozen, or write lower ranks or adapter.max_width, or raise --memory" in message
    assert not Path("out").exists()
    adapters = float(found[2]) * (353 + 263) / 16
    shapes = [((3, 36), (4, 16)), ((4, 16), (3, 36))]
    settings = load_transfer_plan("plan.yaml").plan.transfers["transfer"].adapter.model_copy(update={"layers": 2})
    stacks = [AdapterStack(*pair, settings, seed=0, label="") for pair in shapes]
    assert adapters == pytest.approx(sum(one.numel() for stack in stacks for one in stack.parameters()), rel=1e-2)
    place.run("--memory", "2GB")
