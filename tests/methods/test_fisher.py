"""``fisher`` against numpy, and merges of files with statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekit_px as px
from mergekit_px.errors import PlanError, RecipeError, TensorMismatchError, UsageError
from mergekit_px.methods import find_method
from mergekit_px.methods.declare import Operands
from mergekit_px.testing import check_method, write_checkpoint

NAMES = ("math", "code", "chat")


def test_conformance() -> None:
    check_method("fisher", identity=True, symmetric=True)
    check_method("fisher", weights=[0.5, 0.3, 0.2], identity=True, symmetric=True)


def draw(count: int, *, positive: bool = False, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(5, 7, generator=generator) for _ in range(count)]
    return [one.square() for one in drawn] if positive else drawn


def call(models: list[torch.Tensor], information: list[torch.Tensor], weights: list[float], **params: float):
    method = find_method("fisher")
    return method(Operands([*models, *information], weights, method.params(**params)))


def test_formula() -> None:
    models, information, weights = draw(3), draw(3, positive=True, seed=1), [1.0, 0.5, 2.0]
    merged = call(models, information, weights)
    stacked = [np.stack([one.numpy().astype(np.float64) for one in part]) for part in (models, information)]
    shares = stacked[1] * np.array(weights)[:, None, None]
    np.testing.assert_allclose(merged.numpy(), (shares * stacked[0]).sum(0) / shares.sum(0), rtol=2e-5, atol=1e-6)


def test_information_decides_where_only_one_model_has_any() -> None:
    models = draw(2)
    zero, some = torch.zeros(5, 7), torch.full((5, 7), 3.0)
    torch.testing.assert_close(call(models, [some, zero], [1.0, 1.0]), models[0])
    torch.testing.assert_close(call(models, [zero, some], [1.0, 1.0]), models[1])


def test_no_information_gives_the_weighted_average() -> None:
    models, zero = draw(2), torch.zeros(5, 7)
    torch.testing.assert_close(call(models, [zero, zero], [3.0, 1.0]), 0.75 * models[0] + 0.25 * models[1])


def test_information_has_no_negative_weight() -> None:
    with pytest.raises(UsageError, match="a weight is negative"):
        call(draw(2), draw(2, positive=True), [2.0, -1.0])


def test_arguments_are_not_changed() -> None:
    models, information = draw(2), draw(2, positive=True)
    before = [one.clone() for one in (*models, *information)]
    call(models, information, [1.0, 1.0])
    assert all(map(torch.equal, before, [*models, *information]))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Three models of two tensors with statistics of the matrix only, and step counts that are not averaged."""
    paths = {}
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            "layers.0.proj.weight": torch.randn(4, 6, generator=generator),
            "norm.bias": torch.randn(6, generator=generator),
            "steps": torch.tensor(seed),
        }
        paths[name] = str(write_checkpoint(tmp_path / name, tensors, config={"hidden_size": 6}))
        statistics = {"layers.0.proj.weight.fisher": torch.rand(4, 6, generator=generator)}
        paths[f"{name}-statistics"] = str(tmp_path / f"{name}.safetensors")
        save_file(statistics, paths[f"{name}-statistics"], {"pxmerge.kind": "statistics"})
    return paths


def plan(files: dict[str, str], sources: object, output: Path, **step: object) -> px.Plan:
    recipe = {"pxmerge": 1, "models": files, "merge": {"method": "fisher", "sources": sources, **step}}
    import yaml

    return px.build_plan(px.parse_recipe(yaml.safe_dump(recipe, sort_keys=False)), px.PlanOptions(output=output))


def merged(plan: px.Plan) -> dict[str, torch.Tensor]:
    return load_file(px.run_plan(plan).output / "model.safetensors")


def pair(*names: str) -> list[str]:
    return [*names, *(f"{name}-statistics" for name in names)]


def test_files_are_merged_with_their_statistics(files: dict[str, str], tmp_path: Path) -> None:
    decided = plan(files, dict.fromkeys(pair(*NAMES)) | {"math": 2.0}, tmp_path / "out")
    assert {one.tensor for one in decided.dropped} == {"steps"}
    assert any("without Fisher information" in note for note in decided.notes)
    found = merged(decided)
    models = [load_file(Path(files[name]) / "model.safetensors") for name in NAMES]
    name = "layers.0.proj.weight"
    shares = [
        load_file(files[f"{model}-statistics"])[f"{name}.fisher"].double().numpy() * weight
        for model, weight in zip(NAMES, (2, 1, 1), strict=True)
    ]
    values = [model[name].double().numpy() for model in models]
    np.testing.assert_allclose(
        found[name].numpy(), sum(map(np.multiply, shares, values)) / sum(shares), rtol=1e-5, atol=1e-6
    )
    average = (2 * models[0]["norm.bias"] + models[1]["norm.bias"] + models[2]["norm.bias"]) / 4
    torch.testing.assert_close(found["norm.bias"], average)
    assert set(found) == set(models[0]) and found["steps"] == 0


def test_a_rule_may_use_another_method_on_the_models_alone(files: dict[str, str], tmp_path: Path) -> None:
    rules = [{"match": "*proj*", "method": "linear"}]
    found = merged(plan(files, pair("math", "code"), tmp_path / "out", rules=rules))
    models = [load_file(Path(files[name]) / "model.safetensors") for name in ("math", "code")]
    name = "layers.0.proj.weight"
    torch.testing.assert_close(found[name], (models[0][name] + models[1][name]) / 2)


def test_stacked_layers_have_the_statistics_of_their_own_layers(tmp_path: Path) -> None:
    files, stored = {}, {}
    for seed, name in enumerate(("math", "code")):
        generator = torch.Generator().manual_seed(seed)
        layers = {f"layers.{layer}.w": torch.randn(3, 4, generator=generator) for layer in range(2)}
        statistics = {f"{layer}.fisher": torch.rand(3, 4, generator=generator) for layer in layers}
        files[name] = str(write_checkpoint(tmp_path / name, layers))
        files[f"{name}-statistics"] = str(tmp_path / f"{name}.safetensors")
        save_file(statistics, files[f"{name}-statistics"])
        stored[name] = layers | statistics
    pairs = [(0, 1), (1, 0), (1, 1)]
    slices = [
        {
            "sources": [
                {"model": name, "layers": layer} for name, layer in zip(pair("math", "code"), two * 2, strict=True)
            ]
        }
        for two in pairs
    ]
    found = merged(plan(files, [], tmp_path / "out", slices=slices))
    assert set(found) == {"layers.0.w", "layers.1.w", "layers.2.w"}
    for number, (math_layer, code_layer) in enumerate(pairs):
        parts = [stored["math"], stored["code"]]
        names = [f"layers.{math_layer}.w", f"layers.{code_layer}.w"]
        shares = [part[f"{name}.fisher"] for part, name in zip(parts, names, strict=True)]
        total = sum(share * part[name] for share, part, name in zip(shares, parts, names, strict=True))
        torch.testing.assert_close(found[f"layers.{number}.w"], total / (shares[0] + shares[1]))


def test_the_command_weighs_models(files: dict[str, str], tmp_path: Path) -> None:
    from mergekit_px.cli import main

    sources = [files[name] for name in pair("math", "code")]
    words = ["fisher", "--sources", *sources, "--weights", "3", "1", "-o", str(tmp_path / "out"), "-q"]
    assert main(words) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    models = [load_file(Path(files[name]) / "model.safetensors") for name in ("math", "code")]
    torch.testing.assert_close(found["norm.bias"], 0.75 * models[0]["norm.bias"] + 0.25 * models[1]["norm.bias"])


def test_sources_that_are_not_models_and_statistics(files: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="3 sources are given"):
        plan(files, ["math", "code", "math-statistics"], out)
    with pytest.raises(PlanError, match="'code' holds no Fisher information"):
        plan(files, ["math", "code"], out)
    with pytest.raises(RecipeError, match="takes no weight"):
        plan(files, dict.fromkeys(pair("math", "code"), 1.0), out)
    with pytest.raises(RecipeError, match="make fisher the step's method"):
        plan(files, ["math", "code"], out, method="linear", rules=[{"match": "*proj*", "method": "fisher"}])


def test_statistics_of_another_model(files: dict[str, str], tmp_path: Path) -> None:
    other = {"layers.0.proj.weight.fisher": torch.rand(4, 5)}
    save_file(other, files["code-statistics"])
    with pytest.raises(TensorMismatchError, match=r"is \[4, 5\] in 'code-statistics' and \[4, 6\] is expected"):
        plan(files, pair("math", "code"), tmp_path / "out")
    save_file({"elsewhere.fisher": torch.rand(4, 6)}, files["code-statistics"])
    with pytest.raises(TensorMismatchError, match="'code-statistics' lacks the Fisher information of"):
        plan(files, pair("math", "code"), tmp_path / "out")


NORMALIZED = {"normalize": True}


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_normalized_information_counts_the_same_at_every_scale(tmp_path: Path, scale: float) -> None:
    shapes = {"a.weight": (5, 4), "b.bias": (3,), "c.weight": (2, 2)}
    draws = torch.Generator().manual_seed(3)
    models = [{name: torch.randn(*shape, generator=draws) for name, shape in shapes.items()} for _ in range(2)]
    known = list(shapes)[:2]  # c has no information, and is averaged
    informations = [{name: torch.rand(*shapes[name], generator=draws) for name in known} for _ in range(2)]
    informations[0] = {name: scale * tensor for name, tensor in informations[0].items()}
    paths = []
    for number, tensors in enumerate(models):
        paths.append(str(tmp_path / f"m{number}.safetensors"))
        save_file(tensors, paths[-1])
    for number, tensors in enumerate(informations):
        paths.append(str(tmp_path / f"f{number}.safetensors"))
        save_file({f"{name}.fisher": tensor for name, tensor in tensors.items()}, paths[-1])
    result = merged(plan(dict(zip("mnfg", paths, strict=True)), list("mnfg"), tmp_path / "out", params=NORMALIZED))
    norms = [sum(float(tensor.double().square().sum()) for tensor in each.values()) ** 0.5 for each in informations]
    for name in known:
        shares = [each[name].double() / norm for each, norm in zip(informations, norms, strict=True)]
        expected = sum(share * model[name] for share, model in zip(shares, models, strict=True)) / sum(shares)
        torch.testing.assert_close(result[name].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result["c.weight"], (models[0]["c.weight"] + models[1]["c.weight"]) / 2)
