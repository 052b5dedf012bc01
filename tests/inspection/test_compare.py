from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pipelines import write_pipeline
from safetensors.torch import save_file

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.cli import main
from mergekit_px.errors import InputError, UsageError
from mergekit_px.inspection import compare as module
from mergekit_px.inspection.compare import compare
from mergekit_px.testing.checkpoints import tiny_llama_tensors, write_checkpoint

Tensors = dict[str, torch.Tensor]


def save(path: Path, tensors: Tensors):
    save_file(tensors, path)
    return open_checkpoint(path, label=path.stem)


def random(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in {"a": (7, 5), "b": (11,)}.items()
    }


def flat(tensors: Tensors) -> np.ndarray:
    return np.concatenate([tensors[name].double().numpy().ravel() for name in sorted(tensors)])


@pytest.fixture(params=[3, 1 << 18], ids=["many chunks", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_totals_equal_dense_arithmetic(tmp_path: Path, chunk: None, dtype: torch.dtype) -> None:
    weights = [random(seed, dtype) for seed in range(3)]
    found = compare(*_split([save(tmp_path / f"{i}.safetensors", w) for i, w in enumerate(weights)]))
    reference, first, second = map(flat, weights)
    deltas = [first - reference, second - reference]
    for entry, values, delta in zip(found["total"]["models"], (first, second), deltas, strict=True):
        norm = np.linalg.norm(delta)
        assert entry["difference"] == pytest.approx(norm)
        assert entry["relative"] == pytest.approx(norm / np.linalg.norm(reference))
        assert entry["largest"] == np.abs(delta).max()
        cosine = values @ reference / np.linalg.norm(values) / np.linalg.norm(reference)
        assert entry["cosine"] == pytest.approx(cosine)
        assert (entry["tensors_equal"], entry["tensors"]) == (0, 2)
    between = deltas[0] @ deltas[1] / np.linalg.norm(deltas[0]) / np.linalg.norm(deltas[1])
    np.testing.assert_allclose(found["total"]["delta_cosines"], [[1, between], [between, 1]])
    assert found["total"]["sign_conflicts"] == pytest.approx(np.mean(deltas[0] * deltas[1] < 0))
    json.dumps(found, allow_nan=False)


def test_tensors_stand_in_the_order_of_their_difference(tmp_path: Path) -> None:
    base = {"small": torch.ones(4), "large": torch.ones(4), "same": torch.ones(4), "new": torch.zeros(4)}
    other = {
        "small": torch.full((4,), 1.1),
        "large": torch.full((4,), 3.0),
        "same": torch.ones(4),
        "new": torch.ones(4),
    }
    found = compare(save(tmp_path / "a.safetensors", base), [save(tmp_path / "b.safetensors", other)])
    assert [row["name"] for row in found["tensors"]] == ["new", "large", "small", "same"]
    assert [row["models"][0]["identical"] for row in found["tensors"]] == [False, False, False, True]
    assert found["total"]["sign_conflicts"] is None


def test_what_cannot_be_compared_is_listed(tmp_path: Path) -> None:
    base = {"common": torch.ones(2), "shape": torch.ones(2, 3), "mine": torch.ones(1)}
    other = {"common": torch.ones(2), "shape": torch.ones(3, 2), "yours": torch.ones(1)}
    found = compare(save(tmp_path / "a.safetensors", base), [save(tmp_path / "b.safetensors", other)])
    assert [row["name"] for row in found["tensors"]] == ["common"]
    assert found["missing"] == [{"name": "mine", "not_in": ["b"]}, {"name": "yours", "not_in": ["a"]}]
    assert found["mismatched"] == [{"name": "shape", "shapes": [[2, 3], [3, 2]]}]


def test_tensors_without_arithmetic_are_equal_or_not(tmp_path: Path, chunk: None) -> None:
    base = {"same": torch.arange(9), "other": torch.arange(9), "kind": torch.zeros(4, dtype=torch.int32)}
    other = {"same": torch.arange(9), "other": torch.arange(9) * 2, "kind": torch.zeros(4, dtype=torch.int8)}
    found = compare(save(tmp_path / "a.safetensors", base), [save(tmp_path / "b.safetensors", other)])
    assert {row["name"]: row["models"][0]["identical"] for row in found["tensors"]} == {
        "same": True,
        "other": False,
        "kind": False,
    }


def test_values_that_are_not_finite_give_no_number(tmp_path: Path) -> None:
    base, other = random(0), random(1)
    other["a"][0, 0] = float("nan")
    found = compare(save(tmp_path / "a.safetensors", base), [save(tmp_path / "b.safetensors", other)])
    assert found["tensors"][0]["name"] == "a"
    assert found["total"]["models"][0]["difference"] is None
    assert found["tensors"][1]["models"][0]["difference"] > 0
    json.dumps(found, allow_nan=False)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    base = {"scalar": torch.tensor(2.0), "empty": torch.empty(0, 3)}
    other = {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 3)}
    found = compare(save(tmp_path / "a.safetensors", base), [save(tmp_path / "b.safetensors", other)])
    measures = {row["name"]: row["models"][0] for row in found["tensors"]}
    assert measures["scalar"] == {
        "difference": 1.0,
        "relative": 0.5,
        "largest": 1.0,
        "cosine": pytest.approx(1.0),
        "identical": False,
    }
    assert measures["empty"]["identical"]


def test_a_pattern_narrows_and_progress_counts_every_byte(tmp_path: Path) -> None:
    models = [save(tmp_path / f"{i}.safetensors", random(i)) for i in range(2)]
    seen: list[tuple[int, int]] = []
    found = compare(models[0], models[1:], pattern="b*", progress=lambda *state: seen.append(state))
    assert [row["name"] for row in found["tensors"]] == ["b"]
    assert seen == [(2 * 11 * 4, 2 * 11 * 4)]


def test_nothing_to_compare_is_said(tmp_path: Path) -> None:
    model = save(tmp_path / "a.safetensors", random(0))
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(model, [])
    with pytest.raises(InputError, match="no tensor matches 'z'"):
        compare(model, [model], pattern="z")


def _split(checkpoints: list) -> tuple:
    return checkpoints[0], checkpoints[1:]


def test_encoded_tensors_are_compared_by_their_values(tmp_path: Path) -> None:
    codes = (torch.arange(32.0).reshape(4, 8) - 16).to(torch.float8_e4m3fn)
    save_file({"w.weight": codes, "w.weight_scale": torch.tensor([0.5])}, tmp_path / "fp8.safetensors")
    save_file({"w.weight": codes.float() * 0.5}, tmp_path / "plain.safetensors")
    save_file({"w.weight": codes.float() * 0.5 + 1}, tmp_path / "other.safetensors")
    models = [open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("plain", "fp8", "other")]
    found = compare(models[0], models[1:], spectral=True)
    assert [model["largest"] for model in found["total"]["models"]] == [0.0, 1.0]
    assert found["missing"] == [] and len(found["tensors"]) == 1
    assert any("decoded on reading" in note and "fp8.safetensors" in note for note in found["notes"])


def test_names_of_another_spelling_are_compared_as_one(tmp_path: Path) -> None:
    tensors = tiny_llama_tensors(seed=1)
    write_checkpoint(tmp_path / "a", tensors)
    write_checkpoint(tmp_path / "b", {f"module.{name}": tensor for name, tensor in tensors.items()})
    found = compare(open_checkpoint(tmp_path / "a"), [open_checkpoint(tmp_path / "b")])
    assert found["missing"] == [] and found["total"]["models"][0]["identical"]
    assert any("are read as those of" in note for note in found["notes"])


def test_pipelines_are_compared_component_by_component(tmp_path: Path) -> None:
    pipelines = [open_checkpoint(write_pipeline(tmp_path / str(seed), seed)) for seed in range(2)]
    found = compare(pipelines[0], pipelines[1:], pattern="vae/*")
    assert {row["name"] for row in found["tensors"]} == {"vae/layers.0.weight", "vae/out.weight"}


def test_layers_are_summed_and_drawn(tmp_path: Path) -> None:
    base = tiny_llama_tensors()
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", {name: tensor * 1.5 for name, tensor in base.items()})
    picture = tmp_path / "pictures" / "differences.svg"
    words = ["compare", str(tmp_path / "base"), str(tmp_path / "tuned"), "--quiet"]
    assert main([*words, "--picture", str(picture)]) == 0
    drawn = picture.read_text()
    for text in ("Differences to", "relative change", "mlp.up_proj", "layer"):
        assert f"<!-- {text}" in drawn
    assert main([*words, "--picture", "differences.gif"]) == 2
