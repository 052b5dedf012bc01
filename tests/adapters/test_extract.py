"""Adapters from the difference of two checkpoints, loadable by PEFT, and back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mergekit_px.adapters.extract import ExtractedAdapter, ExtractOptions, extract_adapter
from mergekit_px.adapters.open import open_adapter
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.errors import OutputError, TensorMismatchError, UsageError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.filterwarnings("ignore")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 12)
        self.lin = nn.Linear(12, 20)
        self.untouched = nn.Linear(12, 12)
        self.conv = nn.Conv2d(4, 6, 3)
        self.norm = nn.LayerNorm(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class StoredInOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(20, 12), Conv1D(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def pair(folder: Path, make: type[nn.Module] = Small, keep: str = "untouched") -> tuple[nn.Module, nn.Module]:
    """A base and a fine-tune on disk."""
    torch.manual_seed(0)
    base, tuned = make(), make()
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if keep not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_file(base.state_dict(), folder / "base.safetensors")
    save_file(tuned.state_dict(), folder / "tuned.safetensors")
    return base, tuned


def extract(folder: Path, **options: Any) -> ExtractedAdapter:
    files = (open_checkpoint(folder / f"{name}.safetensors") for name in ("base", "tuned"))
    return extract_adapter(*files, ExtractOptions(**options))


def apply(folder: Path, adapter: Path) -> dict[str, torch.Tensor]:
    tensors, stored = load_file(folder / "base.safetensors"), load_file(adapter / "adapter_model.safetensors")
    result = dict(tensors)
    for target, patch in open_adapter(adapter).bind(open_checkpoint(folder / "base.safetensors")).items():
        factors = {role: stored[tensor.name] for role, tensor in patch.factors.items()}
        result[target] = patch.merged(None if patch.source is None else tensors[patch.source], factors)
    return result


@pytest.mark.parametrize("make", [Small, StoredInOut])
def test_full_rank_gives_the_fine_tune_back(make: type[nn.Module], tmp_path: Path) -> None:
    _, tuned = pair(tmp_path, make)
    extract(tmp_path, rank=1000).save(tmp_path / "adapter", base_model_name="org/base")
    for name, tensor in apply(tmp_path, tmp_path / "adapter").items():
        torch.testing.assert_close(tensor, tuned.state_dict()[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [Small, StoredInOut])
def test_peft_loads_what_is_extracted(make: type[nn.Module], tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, make)
    extract(tmp_path, rank=1000).save(tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    assert set(merged) == set(tuned.state_dict())
    for name, tensor in tuned.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-5, rtol=0)


def test_each_module_gets_its_leading_directions(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    found = extract(tmp_path, rank=3)
    modules = {module.name: module for module in found.modules}
    assert set(modules) == {"wte", "lin", "conv"}
    for name in modules:
        delta = (tuned.state_dict()[f"{name}.weight"] - base.state_dict()[f"{name}.weight"]).double()
        matrix = (delta.T if name == "wte" else delta.flatten(1)).numpy()
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        module = modules[name]
        got = module.scale * module.b.flatten(1).double().numpy() @ module.a.flatten(1).double().numpy()
        np.testing.assert_allclose(got, (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
        report = next(report for report in found.reports if report.name == name)
        assert report.captured_energy == pytest.approx((s[:3] ** 2).sum() / (s**2).sum(), rel=1e-5)
        assert report.norm == pytest.approx(np.linalg.norm(matrix), rel=1e-5)


def test_a_share_of_the_energy_decides_the_rank(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    found = extract(tmp_path, rank=None, energy=0.6)
    for report in found.reports:
        delta = tuned.state_dict()[f"{report.name}.weight"] - base.state_dict()[f"{report.name}.weight"]
        s = np.linalg.svd(delta.flatten(1).double().numpy(), compute_uv=False)
        shares = np.cumsum(s**2) / (s**2).sum()
        assert report.rank == int((shares < 0.6).sum()) + 1
    bounded = extract(tmp_path, rank=None, energy=1.0, max_rank=2)
    assert {report.rank for report in bounded.reports} == {2}


def test_ranks_by_module_and_mixed_ranks_load_in_peft(tmp_path: Path) -> None:
    base, _ = pair(tmp_path)
    found = extract(tmp_path, rank={"*": 2, "lin.*": 5, "conv.*": 0, "norm*": 0, "*bias": 0})
    assert {module.name: module.rank for module in found.modules} == {"wte": 2, "lin": 5}
    assert set(found.dropped) == {"conv.weight", "conv.bias", "lin.bias", "norm.weight", "norm.bias"}
    found.save(tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in apply(tmp_path, tmp_path / "adapter").items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-5, rtol=0)


def test_what_has_no_factors_is_saved_dropped_or_refused(tmp_path: Path) -> None:
    pair(tmp_path)
    saved = extract(tmp_path)
    assert set(saved.whole) == {"lin.bias", "conv.bias", "norm.weight", "norm.bias"}
    saved.save(tmp_path / "adapter", task_type="CAUSAL_LM")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["modules_to_save"], config["bias"], config["task_type"]) == (["norm"], "all", "CAUSAL_LM")
    dropped = extract(tmp_path, rest="drop")
    assert dropped.whole == {} and set(dropped.dropped) == set(saved.whole)
    with pytest.raises(TensorMismatchError, match="has no low-rank form"):
        extract(tmp_path, rest="error")


def test_a_larger_vocabulary_is_saved_whole(tmp_path: Path) -> None:
    save_file({"m.embed_tokens.weight": torch.zeros(4, 3)}, tmp_path / "base.safetensors")
    save_file({"m.embed_tokens.weight": torch.ones(5, 3)}, tmp_path / "tuned.safetensors")
    found = extract(tmp_path)
    assert list(found.whole) == ["m.embed_tokens.weight"]
    found.save(tmp_path / "adapter")
    assert apply(tmp_path, tmp_path / "adapter")["m.embed_tokens.weight"].shape == (5, 3)


def test_half_precision_and_folders_in_the_way(tmp_path: Path) -> None:
    pair(tmp_path)
    found = extract(tmp_path, dtype="bfloat16", rest="drop")
    assert {module.a.dtype for module in found.modules} == {torch.bfloat16}
    found.save(tmp_path / "adapter")
    with pytest.raises(OutputError, match="not empty"):
        found.save(tmp_path / "adapter")
    found.save(tmp_path / "adapter", overwrite=True)


def test_checkpoints_that_do_not_match(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(4, 3), "b": torch.zeros(1)}, tmp_path / "base.safetensors")
    save_file({"a.weight": torch.zeros(4, 3)}, tmp_path / "tuned.safetensors")
    with pytest.raises(TensorMismatchError, match="b is missing"):
        extract(tmp_path)
    save_file({"a.weight": torch.zeros(4, 4), "b": torch.zeros(1)}, tmp_path / "tuned.safetensors")
    with pytest.raises(TensorMismatchError, match=r"a\.weight is \[4, 3\] there and \[4, 4\] here"):
        extract(tmp_path)


@pytest.mark.parametrize(
    "options", [{"rank": None}, {"rank": 4, "energy": 0.5}, {"rank": None, "energy": 0.0}, {"rank": -1}], ids=str
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ExtractOptions(**options)
