"""A configuration against its own file: modules it leaves out, layers that are missing, updates of zero."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mergekit_px.cli import main

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

pytestmark = pytest.mark.filterwarnings("ignore")

LAYERS = 3


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        names = ("q_proj", "v_proj", "out_proj")
        block = [nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in names}) for _ in range(LAYERS)]
        self.model = nn.ModuleDict({"layers": nn.ModuleList(block)})
        self.head = nn.Linear(4, 4, bias=False)


PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file(dict(Stack().state_dict()), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def write_adapter(
    folder: Path, config: dict[str, Any], modules: dict[str, float] | None = None, **more: torch.Tensor
) -> Path:
    """Factors for q_proj and v_proj of all layers, or for these modules, with what B is multiplied by."""
    modules = modules or {f"model.layers.{n}.{name}": 1.0 for n in range(LAYERS) for name in ("q_proj", "v_proj")}
    torch.manual_seed(1)
    tensors = dict(more)
    for name, factor in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, 4)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(4, 2) * factor
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | config))
    return folder


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = Stack()
    model.load_state_dict(load_file(base))
    return dict(peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict())


def applied(base: Path, adapter: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["adapter", "apply", str(base), str(adapter), "-o", str(out)])
    return code, capsys.readouterr().err


LEAVING_OUT = {
    "layers, a list": ("layers_to_transform", {"layers_to_transform": [0, 2]}),
    "layers, a number": ("layers_to_transform", {"layers_to_transform": 0}),
    "layers by their list's name": ("layers_to_transform", {"layers_to_transform": [1], "layers_pattern": ["layers"]}),
    "excluded names": ("exclude_modules", {"exclude_modules": ["v_proj"]}),
    "an excluded path": ("exclude_modules", {"exclude_modules": ["model.layers.1.q_proj"]}),
    "an excluded pattern": ("exclude_modules", {"exclude_modules": r".*layers\.0\..*"}),
    "saved whole": ("modules_to_save", {"modules_to_save": ["v_proj"]}),
}


@pytest.mark.parametrize("command", ["apply", "merge"])
@pytest.mark.parametrize("case", LEAVING_OUT)
def test_what_the_configuration_leaves_out_is_refused_by_name(
    case: str, command: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    field, config = LEAVING_OUT[case]
    adapter = write_adapter(tmp_path / "adapter", config)
    words = ["apply", str(base), str(adapter)] if command == "apply" else ["merge", str(adapter)]
    assert main(["adapter", *words, "-o", str(tmp_path / "out")]) == 3
    line = capsys.readouterr().err
    assert f"which '{field}' leaves out" in line and "tensors for model.layers." in line
    assert not (tmp_path / "out").exists()
    if field != "modules_to_save":  # of these PEFT loads no file at all
        before, by_peft = load_file(base), merged_by_peft(base, adapter)
        changed = sum(not torch.equal(before[name], tensor) for name, tensor in by_peft.items())
        assert 0 < changed < 2 * LAYERS


@pytest.mark.parametrize(
    "config",
    [
        {"layers_to_transform": [0, 1, 2]},
        {"layers_to_transform": []},
        {"layers_to_transform": [2, 1, 0], "layers_pattern": "layers"},
        {"layers_to_transform": [9], "target_modules": [f"model.layers.{n}.{x}_proj" for n in range(3) for x in "qv"]},
        {"exclude_modules": ["head", "proj"]},
        {"exclude_modules": "layers"},
        {"target_modules": r".*\.(q|v)_proj"},
    ],
    ids=str,
)
def test_what_leaves_nothing_out_equals_peft(
    config: dict[str, Any], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "adapter", config)
    code, told = applied(base, adapter, tmp_path / "out", capsys)
    assert code == 0 and "target_modules" not in told
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in merged_by_peft(base, adapter).items():
        torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=0)


def test_targets_that_do_not_name_what_is_there_are_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = {f"model.layers.{n}.{name}": 1.0 for n in range(2) for name in ("q_proj", "out_proj")}
    adapter = write_adapter(tmp_path / "adapter", {}, modules)
    code, told = applied(base, adapter, tmp_path / "out", capsys)
    assert code == 0
    assert "'target_modules' does not name model.layers.0.out_proj, model.layers.1.out_proj;" in told
    # the third layer is missing as PEFT warns too, and so is every v_proj
    assert "'target_modules' names model.layers.0.v_proj and 3 more, and the file has nothing for them" in told


@pytest.mark.parametrize("field", ["lora_alpha", "r"])
@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "4", True])
def test_a_rank_or_alpha_that_is_no_number_is_refused(
    field: str, value: object, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "adapter", {field: value})
    code, told = applied(base, adapter, tmp_path / "out", capsys)
    assert code == 3 and f"'{field}' is " in told and "not a number" in told


@pytest.mark.parametrize(
    ("config", "promised"),
    [
        ({"modules_to_save": ["head"]}, "'modules_to_save' names head, and the file does not hold it"),
        ({"trainable_token_indices": [1, 2]}, "'trainable_token_indices' names rows, and the file has none"),
        ({"use_rslora": "false"}, "'use_rslora' is 'false', not true or false"),
    ],
)
def test_what_is_promised_and_not_there_is_refused(
    config: dict[str, Any], promised: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = applied(base, write_adapter(tmp_path / "adapter", config), tmp_path / "out", capsys)
    assert code == 3 and promised in told


@pytest.mark.parametrize("way", ["apply", "merge", "task vector"])
@pytest.mark.parametrize(
    ("config", "factor", "idle"),
    [
        ({}, 0.0, True),
        ({"lora_alpha": 0}, 1.0, True),
        ({"lora_alpha": 0, "alpha_pattern": {"0.q_proj": 4}}, 1.0, False),
        ({"alpha_pattern": {"[qv]_proj": 0}}, 1.0, True),
        ({}, 1.0, False),
    ],
    ids=str,
)
def test_updates_of_zero_are_told(
    config: dict[str, Any],
    factor: float,
    idle: bool,
    way: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    modules = {f"model.layers.{n}.{name}": factor for n in range(LAYERS) for name in ("q_proj", "v_proj")}
    adapter, other = (write_adapter(tmp_path / name, config, modules) for name in ("adapter", "other"))
    words = {
        "apply": ["adapter", "apply", str(base), str(adapter)],
        "merge": ["adapter", "merge", str(adapter), str(other), "--weights", "1", "1"],
        "task vector": ["ties", "--base", str(base), "--sources", str(adapter), str(other)],
    }[way]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert (f"{adapter}: it changes nothing" in told) is idle
    assert ("the merged adapter changes nothing" in told) is (idle and way == "merge")


def test_keys_of_a_pattern_that_fit_nothing_are_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = {"base_model.model.model.layers.0.q_proj": 9, "1.q_proj": 7, "k_proj": 1}
    code, told = applied(base, write_adapter(tmp_path / "a", {"alpha_pattern": pattern}), tmp_path / "out", capsys)
    assert code == 0
    assert "base_model.model.model.layers.0.q_proj, k_proj in 'alpha_pattern' fits no module" in told


def test_merged_factors_are_finite(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write_adapter(tmp_path / "bad", {}, {"model.layers.0.q_proj": float("nan")})
    good = write_adapter(tmp_path / "good", {}, {"model.layers.0.q_proj": 1e30})
    for method in ("cat", "linear", "svd", "ties", "robust"):
        assert main(["adapter", "merge", str(good), str(bad), "--method", method, "-o", str(tmp_path / "out")]) == 5
        assert f"{bad}: model.layers.0.q_proj: a factor holds NaN or infinity" in capsys.readouterr().err
    assert main(["adapter", "merge", str(good), "--dtype", "float16", "-o", str(tmp_path / "out")]) == 5
    assert "model.layers.0.q_proj, merged: a factor holds NaN or infinity; write it in a wider type" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_an_adapter_where_a_model_is_wanted_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_adapter(tmp_path / "folder", {})
    file = tmp_path / "lora.safetensors"
    save_file({f"lora_unet_x.lora_{end}.weight": torch.ones(2, 2) for end in ("down", "up")}, file)
    for adapter in (folder, file):
        for words in (
            ["extract", str(base), str(adapter)],
            ["extract", str(adapter), str(base)],
            ["merge", str(folder), "--base", str(adapter)],
            ["merge", str(folder), "--into", str(adapter)],
            ["convert", str(folder), "--to", "peft", "--base", str(adapter)],
        ):
            assert main(["adapter", *words, "-o", str(tmp_path / "out")]) == 3
            assert f"{adapter}: it is an adapter, and a model is wanted here" in capsys.readouterr().err


def test_two_adapters_in_one_file_are_said_to_be_two(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "adapter", {}, {"model.layers.0.q_proj": 1.0})
    tensors = load_file(adapter / "adapter_model.safetensors")
    both = {name.replace(".weight", f".{one}.weight"): t.clone() for name, t in tensors.items() for one in ("x", "y")}
    save_file(both, adapter / "adapter_model.safetensors")
    code, told = applied(base, adapter, tmp_path / "out", capsys)
    assert code == 3 and "several adapters in one file: x, y" in told


def test_a_module_replaced_and_adapted_is_said_to_be_replaced(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT saves embeddings and heads whole beside their own factors."""
    whole = {"base_model.model.head.weight": load_file(base)["head.weight"]}
    adapter = write_adapter(tmp_path / "adapter", {"target_modules": ["head"]}, {"head": 1.0}, **whole)
    code, _ = applied(base, adapter, tmp_path / "applied", capsys)
    assert code == 0
    for name, tensor in merged_by_peft(base, adapter).items():
        got = load_file(tmp_path / "applied" / "model.safetensors")[name]
        torch.testing.assert_close(got, tensor, atol=1e-6, rtol=0)
    assert main(["adapter", "merge", str(adapter), "--base", str(base), "-o", str(tmp_path / "out")]) == 3
    assert "head.weight is replaced, not changed by a low-rank update" in capsys.readouterr().err


def test_tasks_that_differ_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(write_adapter(tmp_path / task, {"task_type": task})) for task in ("CAUSAL_LM", "SEQ_CLS")]
    assert main(["adapter", "merge", *paths, "-o", str(tmp_path / "out")]) == 0
    assert "different tasks (CAUSAL_LM, SEQ_CLS); the merged one names none" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] is None
