"""YAML text to values with places: the core schema of YAML 1.2, and everything that is refused."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_px.errors import RecipeError
from mergekit_px.located.yaml_text import DEEPEST, MOST_NODES, node_of, parse_yaml


def data(text: str) -> object:
    return parse_yaml(text, "r.yaml").data()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("1e-5", 1e-5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("+3", 3),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2001-12-14", "2001-12-14"),
        ("8-15", "8-15"),
        ("1e", "1e"),
        ("true", True),
        ("FALSE", False),
        ("tRue", "tRue"),
        ("~", None),
        ("null", None),
        ("", None),
        ("'null'", "null"),
        ('"1"', "1"),
        ("${HOME}/x", "${HOME}/x"),
        ("=", "="),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    found = data(f"key: {text}\n")
    assert found == {"key": value}
    assert type(found["key"]) is type(value)  # type: ignore[index]


def test_keys_are_always_text() -> None:
    assert data("no: 1\n1: 2\n~: 3\ntrue: 4\n") == {"no": 1, "1": 2, "~": 3, "true": 4}


def test_aliases_and_merge_keys() -> None:
    text = "a: &x {p: 1, q: [1, 2]}\nb: *x\nc: {<<: *x, p: 3}\nd: {<<: [{p: 5}, *x], r: 1}\n"
    assert data(text) == {
        "a": {"p": 1, "q": [1, 2]},
        "b": {"p": 1, "q": [1, 2]},
        "c": {"p": 3, "q": [1, 2]},
        "d": {"p": 5, "q": [1, 2], "r": 1},
    }
    assert data('"<<": 1') == {"<<": 1}


def test_places_are_lines_and_columns_from_one() -> None:
    root = parse_yaml("a:\n  b: [x, {c: 1}]\n", "r.yaml")
    inner = root.value["a"].value["b"].value[1]  # type: ignore[call-overload, index, union-attr]
    assert str(root.place) == "r.yaml:1:1"
    assert str(inner.place) == "r.yaml:2:10"
    assert str(inner.keys["c"]) == "r.yaml:2:11"
    assert str(inner.value["c"].place) == "r.yaml:2:14"


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a: 1\nb: 2\na: 3\n", "3:1", "key 'a' is given twice; the first one is at r.yaml:1:1"),
        ("a: {b: 1, b: 1}", "1:11", "key 'b' is given twice"),
        ("a: !!python/object/apply:os.system [ls]", "1:4", "not allowed"),
        ("a: !include x", "1:4", "not allowed"),
        ("a: !!str 1", "1:4", "not allowed"),
        ("a: 1\n---\nb: 2\n", "3:1", "only one document"),
        ("? [a]\n: 1", "1:3", "a key must be plain text"),
        ("{{x}}: 1", "1:1", "a key must be plain text"),
        ("a: &x [1, *x]", "1:11", "inside of what it refers to"),
        ("a: *x", "1:4", "refers to nothing"),
        ("a: b: c", "1:5", "mapping values are not allowed here"),
        ("a:\n\tb: 1", "2:1", "indent with spaces"),
        ("a: [1, 2", "1:9", "expected ',' or ']'"),
        ("a: 'x", "1:6", "unexpected end of stream"),
        ("a: .inf", "1:4", "not a finite number"),
        ("a: -.INF", "1:4", "not a finite number"),
        ("a: .nan", "1:4", "not a finite number"),
        ("a: 1e999", "1:4", "too large"),
        ("a: " + "9" * 5000, "1:4", "more than 40 digits"),
        ("a: x\x07", "1:5", "U+0007"),
        ('a: "\\ud800"', "1:4", "surrogate"),
        ('a: "\\0"', "1:4", "zero byte"),
        ("<<: 1", "1:5", "'<<' merges mappings"),
        ("@x: 1", "1:1", "quotes"),
    ],
)
def test_what_is_refused_is_located(text: str, where: str, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "r.yaml")
    assert caught.value.where == f"r.yaml:{where}"
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_escape_beyond_unicode_is_refused() -> None:
    with pytest.raises(RecipeError, match="names no character"):
        parse_yaml('a: "\\UFFFFFFFF"', "r.yaml")


def test_aliases_that_blow_up_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    began = time.perf_counter()
    with pytest.raises(RecipeError, match=f"more than {MOST_NODES} values"):
        parse_yaml("\n".join(lines), "r.yaml")
    assert time.perf_counter() - began < 5


def test_aliases_cannot_nest_deeper_than_the_text_could() -> None:
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 60)]
    with pytest.raises(RecipeError, match=f"deeper than {DEEPEST} levels"):
        parse_yaml("\n".join(lines), "r.yaml")


@pytest.mark.parametrize("text", ["[" * 400_000, "- " * 400_000, "{a: " * 200_000, "a:\n" + " " * 50 + "b: 1"])
def test_deep_nesting_is_refused_at_once(text: str) -> None:
    try:
        found = parse_yaml(text, "r.yaml").data()
    except RecipeError as error:
        assert f"deeper than {DEEPEST} levels" in str(error)
    else:
        assert found == {"a": {"b": 1}}


def test_a_long_text_is_refused() -> None:
    with pytest.raises(RecipeError, match="longer than 1000000 characters"):
        parse_yaml("# " + "x" * 1_000_000, "r.yaml")


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "~"])
def test_an_empty_text_is_nothing(text: str) -> None:
    assert parse_yaml(text, "r.yaml").value is None


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    # JSON's escapes above U+FFFF are pairs of surrogates, which YAML does not join
    | st.text(st.characters(max_codepoint=0xD7FF, exclude_characters="\0")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(max_codepoint=0xD7FF, exclude_characters="\0")), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_json_reads_as_what_it_is(value: object) -> None:
    assert parse_yaml(json.dumps({"key": value}), "r.yaml").data() == {"key": value}


@given(PLAIN)
def test_python_data_reads_as_what_it_is(value: object) -> None:
    assert node_of(value, "recipe").data() == value


@pytest.mark.parametrize("value", [{1: 2}, {"a": object()}, {"a": float("nan")}, {"a": {1, 2}}, [b"x"]])
def test_python_data_that_no_recipe_can_hold(value: object) -> None:
    with pytest.raises(RecipeError):
        node_of(value, "recipe")


def test_python_data_in_a_circle() -> None:
    circle: list[object] = []
    circle.append(circle)
    with pytest.raises(RecipeError, match="nested deeper"):
        node_of(circle, "recipe")
