"""``regmean`` against numpy, and what its solution must satisfy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_px.cli import main
from mergekit_px.errors import NonFiniteError, UsageError
from mergekit_px.methods import find_method
from mergekit_px.methods.declare import Operands
from mergekit_px.testing import check_method, write_checkpoint


def test_conformance() -> None:
    check_method("regmean", identity=True, symmetric=True)
    check_method("regmean", weights=[0.5, 0.3, 0.2], identity=True, symmetric=True)


def draw(count: int, shape: tuple[int, int] = (5, 7)) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights, and inputs of 40 rows with correlated columns."""
    generator = torch.Generator().manual_seed(count)
    models = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    mixing = [torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64) for _ in range(count)]
    inputs = [torch.randn(40, shape[1], generator=generator, dtype=torch.float64) @ mix for mix in mixing]
    return models, inputs


def grams(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [one.T @ one / len(one) for one in inputs]


def call(models: list[torch.Tensor], found: list[torch.Tensor], weights: list[float], **params: float) -> torch.Tensor:
    method = find_method("regmean")
    return method(Operands([*models, *found], weights, method.params(**params)))


@pytest.mark.parametrize("shrink", [0.0, 0.9, 1.0])
def test_formula(shrink: float) -> None:
    models, inputs = draw(3)
    weights = [0.5, 0.3, 0.2]
    merged = call(models, grams(inputs), weights, shrink=shrink, ridge=1e-12)
    left, right = 0.0, 0.0
    for model, seen, weight in zip(models, inputs, weights, strict=True):
        gram = (seen.T @ seen / len(seen)).numpy()
        gram = np.where(np.eye(7, dtype=bool), gram, shrink * gram)
        left, right = left + weight * model.numpy() @ gram, right + weight * gram
    np.testing.assert_allclose(merged.numpy(), left @ np.linalg.inv(right), rtol=1e-7, atol=1e-9)


def test_it_is_the_least_squares_solution_on_the_inputs() -> None:
    models, inputs = draw(2)
    merged = call(models, grams(inputs), [1.0, 1.0], shrink=1.0, ridge=1e-12)
    stacked = np.concatenate([one.numpy() for one in inputs])
    outputs = np.concatenate([seen.numpy() @ model.numpy().T for model, seen in zip(models, inputs, strict=True)])
    np.testing.assert_allclose(merged.numpy(), np.linalg.lstsq(stacked, outputs)[0].T, rtol=1e-6, atol=1e-8)


def test_inputs_that_never_occur_get_the_average() -> None:
    models, inputs = draw(2)
    for one in inputs:
        one[:, 3] = 0
    merged = call(models, grams(inputs), [3.0, 1.0])
    torch.testing.assert_close(merged[:, 3], 0.75 * models[0][:, 3] + 0.25 * models[1][:, 3])
    nothing = [torch.zeros(7, 7, dtype=torch.float64)] * 2
    torch.testing.assert_close(call(models, nothing, [3.0, 1.0]), 0.75 * models[0] + 0.25 * models[1])


def test_equal_models_are_kept_to_the_bit() -> None:
    models, inputs = draw(2)
    assert torch.equal(call([models[0]] * 2, grams(inputs), [1.0, 1.0]), models[0])


def test_what_cannot_be_solved() -> None:
    models, inputs = draw(2)
    with pytest.raises(NonFiniteError, match="not positive"):
        call(models, [-gram for gram in grams(inputs)], [1.0, 1.0])
    with pytest.raises(UsageError, match="a weight is negative"):
        call(models, grams(inputs), [2.0, -1.0])


def test_files_with_more_inputs_than_outputs_are_merged(tmp_path: Path) -> None:
    models, inputs = draw(2, (3, 8))
    words = []
    for number, model in enumerate(models):
        tensors = {"proj.weight": model.float(), "proj.bias": torch.full((3,), float(number))}
        words.append(str(write_checkpoint(tmp_path / f"model{number}", tensors)))
    for number, gram in enumerate(grams(inputs)):
        words.append(str(tmp_path / f"{number}.safetensors"))
        save_file({"proj.weight.gram": gram.float()}, words[-1])
    out = tmp_path / "out"
    assert main(["regmean", "--sources", *words, "--shrink", "1", "-o", str(out), "-q"]) == 0
    merged = load_file(out / "model.safetensors")
    expected = call(models, grams(inputs), [1.0, 1.0], shrink=1.0)
    torch.testing.assert_close(merged["proj.weight"], expected.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged["proj.bias"], torch.full((3,), 0.5))


def test_a_step_can_be_the_anchor(tmp_path: Path) -> None:
    models, inputs = draw(2)
    found = grams(inputs)
    lines = ""
    for number, (model, gram) in enumerate(zip(models, found, strict=True)):
        folder = write_checkpoint(tmp_path / f"m{number}", {"proj.weight": model.float()})
        save_file({"proj.weight.gram": gram.float()}, tmp_path / f"s{number}.safetensors")
        lines += f"  m{number}: {folder}\n  s{number}: {tmp_path / f's{number}.safetensors'}\n"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"models:\n{lines}steps:\n"
        "  anchor: {method: linear, sources: {m0: 2, m1: -1}, params: {normalize: false}}\n"
        "  out: {method: regmean, base: anchor, sources: [m0, m1, s0, s1],"
        " params: {shrink: 1.0, ridge: 0.3}}\n"
    )
    assert main(["run", str(recipe), "-o", str(tmp_path / "out"), "-q"]) == 0
    anchor, total = (2 * models[0] - models[1]).numpy(), sum(found).numpy() / 2
    pull = 0.3 * np.diag(total).mean() * np.eye(len(total))
    wanted = (sum((m @ g).numpy() for m, g in zip(models, found, strict=True)) / 2 + anchor @ pull) @ np.linalg.inv(
        total + pull
    )
    merged = load_file(tmp_path / "out" / "model.safetensors")["proj.weight"]
    np.testing.assert_allclose(merged.numpy(), wanted, rtol=1e-3, atol=1e-4)


def test_the_memory_of_larger_statistics_is_counted(tmp_path: Path) -> None:
    import mergekit_px as px

    paths = {}
    for number in range(2):
        paths[f"m{number}"] = str(write_checkpoint(tmp_path / f"m{number}", {"proj.weight": torch.zeros(1, 1500)}))
        paths[f"s{number}"] = str(tmp_path / f"s{number}.safetensors")
        save_file({"proj.weight.gram": torch.eye(1500)}, paths[f"s{number}"])
    models = "".join(f"  {name}: {path}\n" for name, path in paths.items())
    recipe = f"models:\n{models}merge: {{method: regmean, sources: [m0, m1, s0, s1]}}\n"
    plan = px.build_plan(px.parse_recipe(recipe), px.PlanOptions(output=tmp_path / "out"))
    assert plan.budget.largest >= 3 * 8 * 1500 * 1500
