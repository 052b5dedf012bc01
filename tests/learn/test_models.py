from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.whole import read_tensors
from mergekit_px.errors import InputError, NonFiniteError, TensorMismatchError, UsageError
from mergekit_px.learn.models import load_model, user_function
from mergekit_px.plan.inputs import fetch_checkpoint


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tied_tensors() -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in Tied().state_dict().items() if name != "last.weight"}
    return {**state, "first.weight": state["first.weight"].bfloat16()}


def test_a_checkpoint_fills_the_model_and_comes_back_out(tmp_path: Path) -> None:
    tensors = tied_tensors()
    model = load_model(open_checkpoint(save(tmp_path / "m", tensors)), Tied)
    assert torch.equal(model.module.last.weight, tensors["first.weight"].float())
    assert model.tensor("first.weight") is model.module.first.weight
    assert model.tensor("nothing") is None
    back = model.tensors()
    assert list(back) == list(open_checkpoint(tmp_path / "m").tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    tensors = tied_tensors()
    del tensors["norm.bias"]
    tensors["extra"] = torch.zeros(1)
    tensors["norm.weight"] = torch.zeros(5)
    with pytest.raises(TensorMismatchError) as caught:
        load_model(open_checkpoint(save(tmp_path / "m", tensors)), Tied)
    text = str(caught.value)
    assert "it lacks norm.bias; the model has no extra; norm.weight is [5] there and [4] in the model" in text


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = tied_tensors()
    tensors["norm.weight"][1] = float("inf")
    with pytest.raises(NonFiniteError, match=r"norm.weight"):
        load_model(open_checkpoint(save(tmp_path / "m", tensors)), Tied)
    model = load_model(open_checkpoint(save(tmp_path / "n", tied_tensors())), Tied)
    model.module.norm.bias.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"norm.bias"):
        model.tensors()


CODE = """
from torch import nn
from dataclasses import dataclass
@dataclass
class Size:
    width: int = 4
def net(): return nn.Linear(Size().width, 2)
def word(): return "net"
def broken(): raise KeyError("width")
number = 3
"""


def test_code_runs_only_when_it_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n{CODE}")
    place = f"{tmp_path / 'nets.py'}:net"
    with pytest.raises(UsageError, match="allow it with --allow-code"):
        load_model(None, place)
    assert not (tmp_path / "ran").exists()
    model = load_model(None, place, allow_code=True)
    assert {name: tuple(tensor.shape) for name, tensor in model.tensors().items()} == {"weight": (2, 4), "bias": (2,)}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nets.py", "names no function; write file.py:function"),
        ("nets:net", "names no function"),
        ("none.py:net", "none.py: no such file"),
        ("nets.py:other", "nets.py: the file has no function other"),
        ("nets.py:number", "the file has no function number"),
        ("nets.py:word", "it returned str, not a torch.nn.Module"),
        ("nets.py:broken", "nets.py:broken: it raised KeyError: 'width'; PXMERGE_DEBUG=1 shows the traceback"),
        ("syntax.py:net", "it raised SyntaxError"),
    ],
)
def test_code_that_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(CODE)
    Path("syntax.py").write_text("def")
    with pytest.raises((UsageError, InputError)) as caught:
        load_model(None, place, allow_code=True)
    assert message in str(caught.value)


def test_errors_of_the_project_pass_through_user_code(tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text("from mergekit_px.errors import InputError\ndef f(): raise InputError('mine')")
    with pytest.raises(InputError, match="mine"):
        user_function(f"{tmp_path / 'raises.py'}:f", allow_code=True)()


def test_a_model_needs_something_to_be_made_from(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs weights or a function"):
        load_model(None)
    bare = save(tmp_path / "bare", tied_tensors())
    with pytest.raises(InputError, match=r"no config.json that names a class"):
        load_model(open_checkpoint(bare))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["NoSuchModel"], "auto_map": {"AutoModel": "evil.py"}}, "has no class NoSuchModel"),
        ({"architectures": ["os"]}, "has no class os"),
        ({}, "no class is named"),
    ],
)
def test_classes_that_transformers_lacks(tmp_path: Path, config: dict[str, object], message: str) -> None:
    pytest.importorskip("transformers")
    folder = save(tmp_path / "m", tied_tensors())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(InputError) as caught:
        load_model(fetch_checkpoint(str(folder)))
    assert message in str(caught.value)
    assert "code beside a checkpoint is never run" in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "m", tied_tensors())
    (folder / "config.json").write_text(json.dumps({"architectures": ["ViTModel"]}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        load_model(open_checkpoint(folder))
    assert 'pip install "pxmerge[models]"' in str(caught.value)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny vision transformer; its class has other tensor names than its files."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=4,
        patch_size=2,
        num_channels=1,
        num_labels=3,
    )
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    transformers.ViTForImageClassification(config).bfloat16().save_pretrained(folder)
    return folder


def test_a_transformers_model_keeps_the_names_of_its_files(vit: Path) -> None:
    model = load_model(open_checkpoint(vit))
    stored = read_tensors(open_checkpoint(vit))
    assert all(parameter.dtype is torch.float32 for parameter in model.module.parameters())
    assert set(model.names) == set(stored)
    back = model.tensors()
    assert list(back) == list(stored)
    assert all(torch.equal(back[name], tensor) for name, tensor in stored.items())
    name = next(name for name in stored if name.endswith("query.weight"))
    assert name not in model.module.state_dict()
    model.tensor(name).data.add_(1.0)
    assert torch.equal(model.tensors()[name], (stored[name].float() + 1.0).bfloat16())
    assert not torch.equal(model.module(torch.ones(1, 1, 4, 4)).logits, torch.zeros(1, 3))


def test_a_transformers_checkpoint_that_does_not_fit(vit: Path, tmp_path: Path) -> None:
    tensors = read_tensors(open_checkpoint(vit))
    del tensors["classifier.bias"]
    tensors["classifier.weight"] = torch.zeros(4, 8)
    tensors["other"] = torch.zeros(1)
    folder = save(tmp_path / "m", tensors)
    (folder / "config.json").write_bytes((vit / "config.json").read_bytes())
    with pytest.raises(TensorMismatchError) as caught:
        load_model(open_checkpoint(folder))
    text = str(caught.value)
    assert "it lacks classifier.bias; the model has no other" in text
    assert "classifier.weight is [4, 8] there and [3, 8] in the model" in text
