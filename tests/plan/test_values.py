from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_px.errors import RecipeError
from mergekit_px.methods import find_method
from mergekit_px.plan.artefacts import Artefacts
from mergekit_px.plan.values import interpolate, resolve_params, resolve_weight, varies


def test_a_list_is_interpolated_linearly() -> None:
    assert interpolate([0.0, 0.5, 0.3], 0.0) == 0.0
    assert interpolate([0.0, 0.5, 0.3], 0.25) == 0.25
    assert interpolate([0.0, 0.5, 0.3], 0.5) == 0.5
    assert interpolate([0.0, 0.5, 0.3], 1.0) == 0.3
    assert interpolate([0.7], 0.4) == 0.7


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.floats(0, 1))
def test_interpolated_values_stay_between_their_neighbours(values: list[float], place: float) -> None:
    assert min(values) - 1e-9 <= interpolate(values, place) <= max(values) + 1e-9


@pytest.mark.parametrize("values", [[], ["a"], [True, 1.0]])
def test_only_numbers_can_be_interpolated(values: list[object]) -> None:
    with pytest.raises(ValueError, match="numbers"):
        interpolate(values, 0.5)


def test_values_by_source_become_a_tuple_in_the_sources_order() -> None:
    ties = find_method("ties")
    params = resolve_params(
        ties, {"density": {"code": 0.2, "math": [0.4, 0.8]}}, None, ["math", "code"], 0.5, "here", Artefacts(None)
    )
    assert params.density == pytest.approx((0.6, 0.2))  # type: ignore[attr-defined]


def test_one_value_serves_every_source() -> None:
    ties = find_method("ties")
    assert resolve_params(ties, {"density": 0.3}, None, ["a", "b"], 0, "here", Artefacts(None)).density == (0.3, 0.3)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"densty": 0.5}, "no parameter 'densty'"),
        ({"density": 1.5}, "from 0 to 1"),
        ({"density": ["x"]}, "numbers"),
    ],
)
def test_a_wrong_parameter_says_what_is_wrong_and_where(written: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        resolve_params(find_method("ties"), written, None, ["a", "b"], 0.0, "recipe.yaml:3:5", Artefacts(None))  # type: ignore[arg-type]
    assert str(caught.value).startswith("recipe.yaml:3:5: ")


def test_a_source_that_is_not_named_has_the_default() -> None:
    params = resolve_params(find_method("ties"), {"density": {"a": 0.5}}, None, ["a", "b"], 0, "here", Artefacts(None))
    assert params.density == (0.5, 0.2)  # type: ignore[attr-defined]


def test_a_variant_is_a_start_that_written_values_override() -> None:
    ties = find_method("ties")
    like = resolve_params(ties, {"density": 0.1}, "mergekit", ["a"], 0, "here", Artefacts(None))
    assert like.model_dump().items() >= {k: v for k, v in ties.presets["mergekit"].items() if k != "density"}.items()
    with pytest.raises(RecipeError, match="no variant like 'nobody'"):
        resolve_params(ties, {}, "nobody", ["a"], 0, "here", Artefacts(None))


def test_weights_are_finite_numbers() -> None:
    assert resolve_weight(None, 1.0, 0.0, "a", "here") == 1.0
    assert resolve_weight([0, 1], 1.0, 0.25, "a", "here") == 0.25
    for wrong in ("x", True, float("nan"), float("inf"), 1e39):
        with pytest.raises(RecipeError):
            resolve_weight(wrong, 1.0, 0.0, "a", "here")


def test_only_lists_vary_over_depth() -> None:
    assert varies({"a": [0, 1]})
    assert varies([0, 1])
    assert not varies({"a": 0.5})
