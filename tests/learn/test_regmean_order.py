"""``pxmerge regmean-order`` against a dense loop in float64; resumed runs; models and data that do not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergekit_px.cli import main
from mergekit_px.errors import NonFiniteError
from mergekit_px.learn.life import run_learner
from mergekit_px.learn.regmean_order import run as order
from mergekit_px.testing.checkpoints import write_checkpoint

CODE = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 5)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


def net():
    return Net()
"""
NAMES = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "head"]
WEIGHTS = [2.0, 1.0, 1.0]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Three models in the current folder, each with its data; their tensors."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(CODE)
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (9, 4)}
    for name, rows, columns in zip(NAMES, (6, 4, 6, 4, 5), (4, 6, 4, 6, 4), strict=True):
        shapes[f"{name}.weight"] = (rows, columns)
        if "down" not in name:
            shapes[f"{name}.bias"] = (rows,)
    models = []
    for number in range(3):
        models.append({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
        write_checkpoint(Path(f"m{number}"), models[-1])
        mask = np.ones((30, 5), dtype=np.int64)
        mask[::2, 3:] = 0
        ids = rng.integers(0, 4 + 2 * number, (30, 5))
        np.savez(f"d{number}.npz", input_ids=ids, attention_mask=mask, labels=np.arange(30) % 5)
    return models


def settings(output: str, **more: Any) -> dict[str, Any]:
    given = {"sources": ["m0", "m1", "m2"], "data": ["d0.npz", "d1.npz", "d2.npz"], "weights": WEIGHTS}
    return given | {"model": "net.py:net", "allow_code": True, "output": output, "device": "cpu", "batch": 8} | more


def by_hand(models: list[dict[str, Tensor]], shrink: float, ridge: float) -> dict[str, Tensor]:
    """The merge, layer by layer; each model's layer sees what the merged layers below make of the model's data."""
    shares = torch.tensor(WEIGHTS, dtype=torch.float64) / sum(WEIGHTS)
    tensors = [{name: one.double() for name, one in model.items()} for model in models]
    merged = {name: sum(s * one[name] for s, one in zip(shares, tensors, strict=True)) for name in tensors[0]}

    def solved(name: str, inputs: list[Tensor]) -> None:
        grams = [rows.T @ rows / len(rows) for rows in inputs]
        grams = [shrink * gram + (1 - shrink) * gram.diag().diag() for gram in grams]
        grams = [share * gram for share, gram in zip(shares, grams, strict=True)]
        total = sum(grams)
        pull = ridge * total.diag().mean()
        right = pull * merged[f"{name}.weight"]
        right = right + sum(one[f"{name}.weight"] @ gram for one, gram in zip(tensors, grams, strict=True))
        merged[f"{name}.weight"] = right @ torch.linalg.inv(total + pull * torch.eye(len(total)).double())

    def block(one: dict[str, Tensor], layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = torch.tanh(x @ one[f"layers.{layer}.up.weight"].T + one[f"layers.{layer}.up.bias"])
        return inner, x + inner @ one[f"layers.{layer}.down.weight"].T

    data = [np.load(f"d{number}.npz") for number in range(3)]
    masks = [torch.from_numpy(one["attention_mask"]).bool() for one in data]
    states = [merged["embed.weight"][torch.from_numpy(one["input_ids"])] for one in data]
    for layer in range(2):
        inner = [block(one, layer, x)[0] for one, x in zip(tensors, states, strict=True)]
        solved(f"layers.{layer}.up", [x[mask] for x, mask in zip(states, masks, strict=True)])
        solved(f"layers.{layer}.down", [x[mask] for x, mask in zip(inner, masks, strict=True)])
        states = [block(merged, layer, x)[1] for x in states]
    solved("head", [x[:, 0] for x in states])
    return merged


@pytest.mark.parametrize(("shrink", "ridge"), [(0.9, 1e-6), (1.0, 0.1)])
def test_a_layer_is_measured_on_what_the_merged_layers_give(
    world: list[dict[str, Tensor]], shrink: float, ridge: float
) -> None:
    report = run_learner("regmean-order", **settings("out", shrink=shrink, ridge=ridge)).report.model_dump()
    found, expected = load_file("out/model/model.safetensors"), by_hand(world, shrink, ridge)
    for name, one in expected.items():
        torch.testing.assert_close(found[name].double(), one, rtol=2e-3, atol=2e-4)
    assert report["layers"] == ["layers.0", "layers.1", "head"] and report["examples"] == [30] * 3
    assert sorted(report["matrices"]) == sorted(f"{name}.weight" for name in NAMES)
    assert "embed.weight" in report["averaged"] and "head.bias" in report["averaged"]


def gpt2_by_hand(models: list[Any], ids: list[Tensor], shrink: float, ridge: float) -> dict[str, Tensor]:
    """The merge of GPT-2's blocks, whose weights are (in, out), by whole forward passes of float64."""
    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    states = [model.double().state_dict() for model in models]
    merged = {name: sum(s * one[name] for s, one in zip(shares, states, strict=True)) for name in states[0]}
    net = copy.deepcopy(models[0])
    parts = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    for layer in range(2):
        prefix = f"transformer.h.{layer}."
        grams: dict[str, list[Tensor]] = {part: [] for part in parts}
        for state, rows in zip(states, ids, strict=True):
            net.load_state_dict({name: state[name] if name.startswith(prefix) else one for name, one in merged.items()})
            hooks = [
                net.get_submodule(prefix + part).register_forward_pre_hook(
                    lambda module, given, seen=grams[part]: seen.append(given[0].flatten(0, 1))
                )
                for part in parts
            ]
            net(input_ids=rows)
            for hook in hooks:
                hook.remove()
        for part, inputs in grams.items():
            name = f"{prefix}{part}.weight"
            products = [rows.T @ rows / len(rows) for rows in inputs]
            products = [shrink * one + (1 - shrink) * one.diag().diag() for one in products]
            products = [share * one for share, one in zip(shares, products, strict=True)]
            total = sum(products)
            pull = ridge * total.diag().mean()
            right = sum(gram @ state[name] for gram, state in zip(products, states, strict=True)) + pull * merged[name]
            merged[name] = torch.linalg.inv(total + pull * torch.eye(len(total)).double()) @ right
    return merged


@torch.no_grad()
def test_weights_that_are_stored_in_by_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's, among which are square ones."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, n_positions=6, vocab_size=11, bos_token_id=0, eos_token_id=0
    )
    models, ids = [], []
    for number in range(3):
        torch.manual_seed(number)
        models.append(transformers.GPT2LMHeadModel(config).eval())
        for parameter in models[-1].parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        models[-1].save_pretrained(f"m{number}")
        ids.append(torch.randint(0, 5 + 3 * number, (40, 6)))
        np.savez(f"d{number}.npz", input_ids=ids[-1].numpy(), labels=ids[-1].numpy())
    report = run_learner("regmean-order", **settings("out", model=None, ridge=0.01)).report.model_dump()
    assert report["layers"] == ["transformer.h.0", "transformer.h.1"] and len(report["matrices"]) == 8
    found, expected = load_file("out/model/model.safetensors"), gpt2_by_hand(models, ids, 0.9, 0.01)
    for name, one in found.items():
        torch.testing.assert_close(one.double(), expected[name], rtol=2e-3, atol=2e-4)


def test_equal_models_stay_what_they_are(world: list[dict[str, Tensor]]) -> None:
    run_learner("regmean-order", **settings("out", sources=["m1"] * 2, data=["d0.npz"], weights=()))
    assert all(torch.equal(one, world[1][name]) for name, one in load_file("out/model/model.safetensors").items())


def test_a_resumed_run_is_the_uninterrupted_one(
    world: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_learner("regmean-order", **settings("whole"))
    with monkeypatch.context() as patch:
        merge = order._Merge.merge

        def stopped(self: Any, layer: Any, data: Any) -> list[str]:
            if layer.name == "layers.1":
                raise KeyboardInterrupt
            return merge(self, layer, data)

        patch.setattr(order._Merge, "merge", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_learner("regmean-order", **settings("parts"))
    assert not Path("parts/model").exists()
    run_learner("regmean-order", **settings("parts", resume=True))
    files = [Path(name, "model/model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    reports = [json.loads(Path(name, "report.json").read_text()) for name in ("whole", "parts")]
    assert reports[0]["matrices"] == reports[1]["matrices"]


def test_what_does_not_fit(world: list[dict[str, Tensor]], capsys: pytest.CaptureFixture[str]) -> None:
    line = ["regmean-order", "--model", "net.py:net", "--allow-code", "-o", "out", "-q", "--sources"]
    write_checkpoint(Path("other"), {**world[0], "head.bias": torch.zeros(6)})
    np.savez("pixels.npz", pixels=np.zeros((6, 4), np.float32), labels=np.arange(6) % 5)
    for words, code, message in [
        (["m0", "--data", "d0.npz"], 2, "at least two models are merged"),
        (["m0", "m1", "m2", "--data", "d0.npz", "d1.npz"], 2, "2 files for 3 models"),
        (["m0", "m1", "--data", "d0.npz", "--weights", "1"], 2, "1 weights for 2 models"),
        (["m0", "other", "--data", "d0.npz"], 4, "head.bias has shape [6] and [5] in m0"),
        (["m0", "m1", "--data", "pixels.npz"], 3, "the arrays (pixels) are not those of the model's forward pass"),
        (["m0", "m1", "--data", "d0.npz", "--memory", "1MB"], 4, "besides activations, "),
    ]:
        capsys.readouterr()
        assert main([*line, *words]) == code
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and message in said
        assert not Path("out").exists()


def test_activations_that_are_no_numbers(world: list[dict[str, Tensor]]) -> None:
    write_checkpoint(Path("huge"), {**world[0], "embed.weight": torch.full((9, 4), 3e38)})
    with pytest.raises(NonFiniteError):
        run_learner("regmean-order", **settings("out", sources=["huge", "m1", "m2"]))
    assert not Path("out").exists()
