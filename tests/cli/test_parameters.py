from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from mergekit_px.cli._parameters import ParameterOption, parameter_options, parse_numbers
from mergekit_px.errors import UsageError
from mergekit_px.methods.declare import REGISTRY, Method, Params, PerSource, merge_method

Share = Annotated[float, Field(ge=0, le=1)]


class WideParams(Params):
    rate: Annotated[float, Field(gt=0, lt=2)] = 0.5
    """How fast."""
    steps: Annotated[int, Field(ge=1)] = 3
    density: Annotated[Share | tuple[Share, ...], PerSource()] = 0.2
    fair: bool = True
    rank: int | Literal["auto"] = "auto"
    scope: Literal["tensor", "model"] = "tensor"
    limit: float | None = None
    bins: tuple[int, ...] = (1, 2)
    share: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^\d+%$")] = 1
    name: str = "a"


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> Method:
    monkeypatch.setattr("mergekit_px.methods.declare.REGISTRY", dict(REGISTRY))

    def wide(sources: Sequence[Any], params: WideParams) -> Any:
        """Something wide."""

    wide.__globals__["WideParams"] = WideParams
    merge_method(space="weights", access="elementwise")(wide)
    from mergekit_px.methods import declare

    return declare.REGISTRY["wide"]


@pytest.fixture
def options(method: Method) -> dict[str, ParameterOption]:
    return {option.name: option for option in parameter_options(method)}


def test_each_parameter_has_a_kind(options: dict[str, ParameterOption]) -> None:
    assert {name: option.kind for name, option in options.items()} == {
        "rate": "numbers",
        "steps": "numbers",
        "density": "numbers",
        "fair": "flag",
        "rank": "numbers",
        "scope": "choice",
        "limit": "numbers",
        "bins": "numbers",
        "share": "numbers",
        "name": "text",
    }
    assert {name for name, option in options.items() if option.takes_several} == {"density", "bins"}


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("rate", "0.25", 0.25),
        ("rate", "1", 1),
        ("rate", "0.1,1,1.5", [0.1, 1, 1.5]),
        ("steps", "7", 7),
        ("fair", False, False),
        ("rank", "auto", "auto"),
        ("rank", "8", 8),
        ("scope", "model", "model"),
        ("density", ["0.5"], 0.5),
        ("density", ["0.5", "0.1,0.9"], {"x": 0.5, "y": [0.1, 0.9]}),
        ("bins", ["4", "5", "6"], [4, 5, 6]),
        ("share", "4", 4),
        ("share", "4%", "4%"),
        ("name", "0.5", "0.5"),
    ],
)
def test_words_become_values(options: dict[str, ParameterOption], name: str, given: Any, value: Any) -> None:
    found = options[name].value(given, ["x", "y"])
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("rate", "0", "--rate must be above 0 and below 2, not 0"),
        ("rate", "1,3", "--rate must be above 0 and below 2, not 3"),
        ("rate", "fast", "--rate: 'fast' is not a number"),
        ("steps", "0", "--steps must be at least 1"),
        ("steps", "1.5", "'1.5' is not a whole number"),
        ("density", ["0.5", "1.5"], "--density must be from 0 to 1, not 1.5"),
        ("density", ["0.1", "0.2", "0.3"], "--density has 3 values for 2 sources"),
        ("rank", "best", "'best' is not a number"),
        ("share", "0", "--share must be at least 1"),
        ("share", "0.5", "'0.5' is not a whole number"),
    ],
)
def test_a_bad_word_is_named_with_its_flag(
    options: dict[str, ParameterOption], name: str, given: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        options[name].value(given, ["x", "y"])


def test_help_tells_defaults_and_bounds(options: dict[str, ParameterOption]) -> None:
    helps = {name: option.as_parameter().annotation.__metadata__[0].help for name, option in options.items()}
    assert helps["rate"] == "How fast.  [default: 0.5; above 0 and below 2]"
    assert helps["fair"] == "  [default: fair]"
    assert helps["density"] == "  [default: 0.2; from 0 to 1; one value, or one for each source]"
    assert helps["bins"] == "  [default: 1, 2]"
    assert helps["limit"] == ""


@pytest.mark.parametrize(("word", "value"), [("2", 2), ("-2", -2), ("2.0", 2.0), ("1e3", 1000.0), ("0,1", [0, 1])])
def test_numbers_keep_their_type(word: str, value: Any) -> None:
    found = parse_numbers(word, "--t")
    assert (found, type(found)) == (value, type(value))
