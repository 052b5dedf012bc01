"""Layers by number, as recipes write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_px.errors import RecipeError
from mergekit_px.recipe.layer_range import HIGHEST, parse_layers


@pytest.mark.parametrize(
    ("value", "layers"),
    [
        (7, [7]),
        ("7", [7]),
        ("8-10", [8, 9, 10]),
        (" 8 - 10 ", [8, 9, 10]),
        ("3-3", [3]),
        ("9-", [9, 10, 11]),
        ([5, 0, 9], [5, 0, 9]),
        (["0-1", 7], [0, 1, 7]),
        ([2, 2], [2, 2]),
        ("12-", []),
        ("10-14", [10, 11, 12, 13, 14]),
    ],
)
def test_layers_of_a_model_of_twelve(value: object, layers: list[int]) -> None:
    selection = parse_layers(value)  # type: ignore[arg-type]
    assert selection.to_list(12) == layers
    assert [layer for layer in range(12) if selection.contains(layer)] == sorted({n for n in layers if n < 12})
    assert not selection.contains(None)


def test_none_is_what_is_outside_the_layers() -> None:
    selection = parse_layers("none")
    assert selection.contains(None)
    assert not any(selection.contains(layer) for layer in range(5))
    assert selection.to_list(5) == []


@pytest.mark.parametrize(
    ("value", "length"), [(7, 1), ("8-15", 8), ([0, "3-5"], 4), ("20-", None), ([0, "3-"], None), ("none", 0)]
)
def test_length_where_it_is_known(value: object, length: int | None) -> None:
    assert parse_layers(value).length() == length  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("15-8", "'15-8' ends before it begins; write '8-15'"),
        ("", "is not a layer range"),
        ("x", "is not a layer range"),
        ("-5", "is not a layer range"),
        ("1-2-3", "is not a layer range"),
        ("1..3", "is not a layer range"),
        ("٣", "is not a layer range"),
        (-1, "counted from 0"),
        (True, "is not a layer range"),
        (1.0, "is not a layer range"),
        ([], "selects no layer"),
        ([[1]], "is not a layer range"),
        (["none"], "is not a layer range"),
        (HIGHEST + 1, "counted from 0"),
        (f"0-{HIGHEST + 1}", "counted from 0"),
        ("9" * 30, "is not a layer range"),
        ("x" * 1000, "is not a layer range"),
    ],
)
def test_what_is_no_layer_range(value: object, what: str) -> None:
    with pytest.raises(RecipeError, match=what) as caught:
        parse_layers(value, where="r.yaml:3:4")  # type: ignore[arg-type]
    assert caught.value.where == "r.yaml:3:4"
    assert len(str(caught.value)) < 250


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 60))
def test_a_closed_range_is_what_lies_between_its_ends(first: int, more: int, layer: int) -> None:
    selection = parse_layers(f"{first}-{first + more}")
    assert selection.contains(layer) == (first <= layer <= first + more)
    assert selection.length() == len(selection.to_list(1)) == more + 1
