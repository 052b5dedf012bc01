"""What the comparison with mergekit's results counts, and that its recipes are understood; mergekit is not run."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from mergekit_px.plan.build import build_plan
from mergekit_px.plan.options import PlanOptions
from mergekit_px.recipe.load import load_recipe


@pytest.fixture(scope="module")
def agreement(import_benchmark) -> ModuleType:
    return import_benchmark("agreement")


def test_ulps_are_counted_through_zero(agreement: ModuleType) -> None:
    least = torch.tensor(1, dtype=torch.int16).view(torch.bfloat16)
    left = torch.stack([torch.tensor(value, dtype=torch.bfloat16) for value in (1.0, 0.0, -1.0)] + [least, least])
    right = torch.stack(
        [torch.tensor(value, dtype=torch.bfloat16) for value in (1.0078125, -0.0, -1.015625)] + [-least, least]
    )
    assert agreement.ulps(left, right).tolist() == [1, 0, 2, 2, 0]


def test_elements_tied_at_the_threshold_are_found(agreement: ModuleType) -> None:
    base = torch.zeros(6)
    source = torch.tensor([3.0, -2.0, 2.0, 2.0, 1.0, 0.0])
    tied = [False, True, True, True, False, False]
    assert agreement.tied_at_threshold(source, base, 0.5).tolist() == tied
    assert not agreement.tied_at_threshold(source, base, 4 / 6).any()
    assert not agreement.tied_at_threshold(source, base, 1 / 6).any()
    assert not agreement.tied_at_threshold(source, base, 1.0).any()


def test_results_are_compared_element_by_element(agreement: ModuleType) -> None:
    ours = {"a": torch.ones(200, dtype=torch.bfloat16), "b": torch.ones(2, dtype=torch.bfloat16)}
    theirs = {name: value.clone() for name, value in ours.items()}
    assert agreement.compare(ours, theirs, {}) == agreement.Comparison(202, 202, 202, 0, 0)
    theirs["a"][0] = 1.0078125
    one = agreement.compare(ours, theirs, {})
    assert one == agreement.Comparison(202, 201, 202, 1, 0)
    assert one.agrees
    theirs["b"][1] = 2
    far = agreement.compare(ours, theirs, {})
    assert (far.near, far.worst, far.agrees) == (201, 128, False)
    aside = agreement.compare(ours, theirs, {"b": torch.tensor([False, True])})
    assert (aside.elements, aside.aside, aside.agrees) == (201, 1, True)
    theirs["a"][:4] = 1.0078125
    assert not agreement.compare(ours, theirs, {"b": torch.tensor([False, True])}).agrees


def test_what_cancels_is_compared_with_the_rounding_of_float32(agreement: ModuleType) -> None:
    ours = {"a": torch.tensor([1.0, 0.0, 0.0], dtype=torch.bfloat16)}
    theirs = {"a": torch.tensor([1.0, 2.0**-24, 2.0**-20], dtype=torch.bfloat16)}
    found = agreement.compare(ours, theirs, {})
    assert (found.equal, found.near) == (1, 2)
    assert found.worst > 1


def test_results_with_other_tensors_are_no_results_to_compare(agreement: ModuleType) -> None:
    ones = torch.ones(2, dtype=torch.bfloat16)
    for theirs in ({}, {"a": ones, "b": ones}, {"a": ones.float()}, {"a": ones[:1]}):
        with pytest.raises(ValueError, match=r"only one of them has|a: \[2\] torch.bfloat16"):
            agreement.compare({"a": ones}, theirs, {})


def test_every_recipe_is_understood(agreement: ModuleType, tmp_path: Path) -> None:
    agreement.make_checkpoints(tmp_path, torch.bfloat16)
    assert agreement.WIDE.issubset(agreement.CASES)
    for number, case in enumerate(agreement.CASES.values()):
        loaded = load_recipe(agreement.write_recipe(case, tmp_path))
        plan = build_plan(loaded, PlanOptions(output=tmp_path / f"out{number}"))
        assert {item.dtype.name for item in plan.items} == {"BF16"}
