"""Bounds of settings, in the one wording that help, pages and errors share."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from mergekit_px.declare.fields import bounds_of, breach, fields, forms, in_words, problems
from mergekit_px.methods import load_methods


class Inner(BaseModel):
    size: int = Field(default=1, ge=1)


class Settings(BaseModel):
    share: float = Field(default=0.5, ge=0, le=1)
    rate: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    steps: int | None = Field(default=None, ge=1, lt=10)
    many: list[Annotated[float, Field(le=2)]] = []
    inner: Inner = Inner()
    name: str = ""


@pytest.mark.parametrize(
    ("field", "words"),
    [("share", "from 0 to 1"), ("rate", "above 0"), ("steps", "at least 1 and below 10"), ("name", "")],
)
def test_bounds_are_told_in_words(field: str, words: str) -> None:
    assert in_words(bounds_of(forms(fields(Settings)[field]))) == words


def test_references_are_written_out() -> None:
    assert fields(Settings)["inner"]["properties"]["size"]["minimum"] == 1


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"share": 2}, "must be from 0 to 1"),
        ({"share": -1}, "must be from 0 to 1"),
        ({"steps": 10}, "must be at least 1 and below 10"),
        ({"many": [1, 3]}, "must be at most 2"),
        ({"name": 3}, "must be text"),
    ],
)
def test_a_breach_is_told_by_the_bounds_of_its_field(given: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(given, strict=True)
    assert problems(Settings, caught.value) == [(next(iter(given)), problem)]


def test_numbers_are_checked_as_pydantic_does() -> None:
    for method in load_methods().values():
        for name, entry in fields(method.params).items():
            scalars = [form for form in forms(entry) if form.get("type") in ("number", "integer")]
            bounds = bounds_of(scalars)
            for number in {-1.0, 0.0, 0.5, 1.0, 2.0} if len(scalars) == 1 == len(forms(entry)) else set():
                try:
                    method.params.model_validate({name: int(number) if number.is_integer() else number})
                except ValidationError as error:
                    if "from_float" not in str(error.errors()[0]["type"]):
                        assert breach(number, bounds) is not None, (method.name, name, number)
                else:
                    assert breach(number, bounds) is None, (method.name, name, number)
