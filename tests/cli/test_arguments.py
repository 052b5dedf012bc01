from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_px.cli._arguments import Several, expand_lists, is_numbers
from mergekit_px.errors import UsageError

OPTIONS = {
    "--sources": Several("--sources"),
    "--weights": Several("--weights", "numbers"),
    "--set": Several("--set", "assignments"),
}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--sources a b c", "--sources=a --sources=b --sources=c"),
        ("--sources a --sources b", "--sources=a --sources=b"),
        ("--sources=a b", "--sources=a --sources=b"),
        ("--sources a b --base c -o d", "--sources=a --sources=b --base c -o d"),
        ("--weights 0.5 -0.3 .2 1e-3", "--weights=0.5 --weights=-0.3 --weights=.2 --weights=1e-3"),
        ("--weights 0.0,0.5,-0.3 1", "--weights=0.0,0.5,-0.3 --weights=1"),
        ("--weights 0.5 0.3 recipe.yaml", "--weights=0.5 --weights=0.3 recipe.yaml"),
        ("--weights nan -Inf x", "--weights=nan --weights=-Inf x"),
        ("--set a=1 b=2 recipe.yaml", "--set=a=1 --set=b=2 recipe.yaml"),
        ("recipe.yaml --set a.b=[1,2]", "recipe.yaml --set=a.b=[1,2]"),
        ("--weights 1 --normalize 2", "--weights=1 --normalize 2"),
        ("--sources a -- --weights 1 2", "--sources=a -- --weights 1 2"),
        ("--sources a b -q", "--sources=a --sources=b -q"),
        ("", ""),
    ],
)
def test_lists_are_written_out(words: str, expected: str) -> None:
    assert expand_lists(words.split(), OPTIONS) == expected.split()


def test_a_word_of_another_form_is_left_for_the_command_to_refuse() -> None:
    assert expand_lists(["--weights", "much"], OPTIONS) == ["--weights", "much"]


@pytest.mark.parametrize("words", ["--sources", "--sources --base b", "x --weights --set a=1"])
def test_a_list_without_values_is_refused(words: str) -> None:
    with pytest.raises(UsageError, match="needs at least one value"):
        expand_lists(words.split(), OPTIONS)


@pytest.mark.parametrize("word", ["1", "-1", "+.5", "1e-5", "3.", "0.1,0.2", "-1,-2"])
def test_numbers(word: str) -> None:
    assert is_numbers(word)


@pytest.mark.parametrize("word", ["", "-", "--1", "a", "1a", "1,", ",1", "1e", "nane", "-o"])
def test_other_words(word: str) -> None:
    assert not is_numbers(word)


@given(st.lists(st.text(alphabet="abc./=1", min_size=1), min_size=1))
def test_no_value_is_lost_or_changed(values: list[str]) -> None:
    expanded = expand_lists(["--sources", *values, "--base", "x"], OPTIONS)
    assert [word.removeprefix("--sources=") for word in expanded[:-2]] == values
    assert expanded[-2:] == ["--base", "x"]
