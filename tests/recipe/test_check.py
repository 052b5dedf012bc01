"""Names, graphs, values, outputs and methods that a recipe cannot mean."""

from __future__ import annotations

import pytest
from recipe_samples import METHODS, RECIPE

from mergekit_px.checkpoint.dtypes import DTYPES as STORAGE
from mergekit_px.checkpoint.dtypes import parse_dtype
from mergekit_px.checkpoint.layout import parse_size
from mergekit_px.errors import RecipeError, UsageError
from mergekit_px.recipe.check import DTYPES
from mergekit_px.recipe.graph import LONGEST_CHAIN
from mergekit_px.recipe.load import parse_recipe

HEAD = "models: {a: ./a, b: ./b, c: ./c}\n"


def error(text: str, *, methods: bool = True) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="r", methods=METHODS if methods else None)
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[mixed, base]", "[mixed, bse]", "16:43: no model or step is named 'bse'; did you mean 'base'?"),
        ("[mixed, base]", "[mixed, ./math-ft]", "models go by name here: write 'math'"),
        ("[mixed, base]", "[mixed, org/x]", "models go by name here: name it under models, as in models: {mine: org"),
        ("base: base\n", "base: bsae\n", "9:11: no model or step is named 'bsae'; did you mean 'base'?"),
        ("take: math", "take: mth", "15:36: no model or step is named 'mth'; did you mean 'math'?"),
        ("from: final", "from: finl", "18:9: no model or step is named 'finl'; did you mean 'final'?"),
        ("config_from: base", "config_from: bse", "22:16: no model is named 'bse'; did you mean 'base'?"),
        ("config_from: base", "config_from: mixed", "22:16: 'mixed' is a step, and 'config_from' takes a model"),
        ("config_from: base", "tokenizer_from: q", "22:19: no model is named 'q'; known are base, math, code"),
        ("[mixed, base]", "[final, base]", "16:36: steps depend on one another in a circle: final -> final"),
        ("base: base\n", "base: final\n", "9:11: steps depend on one another in a circle: mixed -> final -> mixed"),
        ("take: math", "take: final", "15:36: steps depend on one another in a circle: mixed -> final -> mixed"),
        ("{math: 0.6, code: 0.4}", "[]", "10:5: step 'mixed' has no sources; write sources: [a, b]"),
        ("{math: 0.6, code: 0.4}", "{}", "10:5: step 'mixed' has no sources"),
        ("    sources: {math: 0.6, code: 0.4}", "   ", "7:3: step 'mixed' has no sources"),
        ("{math: 0.6, code: 0.4}", "[math, code, math]", "10:27: source 'math' is given twice"),
        ("code: 0.4", "code: x", "10:32: a weight is a number, or a list of numbers over the layers, not 'x'"),
        ("code: 0.4", "code: [0.1, no]", "10:32: a weight is a number"),
        ("code: 0.4", "code: []", "10:32: a weight is a number"),
        ("code: 0.4", "code: true", "10:32: a weight is a number"),
        ("  mixed:", "  math:", "7:3: step 'math' has the name of a model; rename one of them"),
        ("  math: ./", "  my model: ./", "4:3: 'my model' cannot be a name; names are letters, digits"),
        ("  math: ./math-ft", "  math: ' '", "4:9: a path cannot be empty"),
        ("./code-lora", "['']", "5:39: a path cannot be empty"),
        ("{model: org/code-ft, adapter: ./code-lora}", "{}", "5:3: 'models.code' names neither a model nor an adapter"),
        ("layers: 8-15", "layers: 15-8", "13:36: '15-8' ends before it begins; write '8-15'"),
        ("layers: 8-15", "layers: all", "13:36: 'all' is not a layer range"),
        ("take: math", "take: math, drop: true", "15:42: a rule has either 'take' or 'drop'"),
        ("take: math", "take: math, method: linear", "15:30: a rule has either 'method' or 'take'"),
        ("take: math", "take: math, params: {density: 1}", "15:42: tensors that are taken have no params"),
        ("take: math", "drop: true, weights: {math: 1}", "15:42: tensors that are dropped have no weights"),
        (", take: math", "", "15:9: a rule that changes nothing; give it params, weights, method, take or drop"),
        ('match: "*norm*"', 'match: ""', "14:17: an empty glob matches nothing"),
        ('match: "*norm*"', "match: []", "14:17: an empty glob matches nothing"),
        ("params: {density: 0.3}", "weights: [1]", "1 weights for 2 sources; give one for each source, or {source"),
        ("params: {density: 0.3}", "weights: {mth: 1}", "'mth' is not a source here; did you mean 'math'?"),
        ("params: {density: 0.3}", "weights: {math: x}", "a weight is a number"),
        ("{density: 0.5}", "{density: {mth: 0.3}}", "11:24: 'mth' is not a source here; did you mean 'math'?"),
        ("{density: 0.5}", "{density: {}}", "11:23: 'density' is an empty mapping"),
        ("{density: 0.5}", "{density: []}", "11:23: an empty list has no value"),
        ("{density: 0.5}", "{density: [{math: 1}]}", "11:23: a list of values cannot hold mappings"),
        ("{density: 0.5}", "{density: {math: {code: 1}}}", "11:30: 'density' is nested too deep"),
        ("dtype: bfloat16", "dtype: bfloat", "20:10: merged tensors cannot be stored as 'bfloat'; did you mean 'bfloa"),
        ("dtype: bfloat16", "dtype: int8", "20:10: merged tensors cannot be stored as 'int8'"),
        ("5GB", "5XB", "21:15: '5XB' is not a size; write one such as 5GB"),
        ("5GB", "-3", "21:15: '-3' is not a size"),
        ("5GB", "0", "21:15: '0' is not a size"),
        ("path: ./merged", "path: ''", "19:9: 'output.path' is empty"),
        ("org/merged", "' '", "23:16: 'output.push.repo' is empty"),
        ("method: ties", "method: tie", "8:13: unknown merge method 'tie'; did you mean 'ties'?"),
        ("method: linear", "method: liner", "14:35: unknown merge method 'liner'; did you mean 'linear'?"),
        ("density: 0.5", "densty: 0.5", "11:14: unknown ties parameter 'densty' in 'steps.mixed.params'; did you mean"),
        ("density: 0.5", "density: 1.5", "11:23: 'density' of ties: must be from 0 to 1, not 1.5"),
        ("density: 0.5", "density: [0.5, 2]", "11:29: 'density' of ties: must be from 0 to 1, not 2"),
        (
            "density: 0.5",
            "density: {math: 0.1, code: [1, x]}",
            "11:45: a list is interpolated over the layers and hold",
        ),
        ("density: 0.5", "scope: {math: model}", "11:21: 'scope' of ties is one value for all sources"),
        ("density: 0.5", "scope: nowhere", "11:21: 'scope' of ties: must be one of model, tensor, not 'nowhere'"),
        ("params: {density: 0.3}", "params: {densty: 0.3}", "unknown ties parameter 'densty' in 'steps.mixed.rules.0"),
        ("method: linear}", "method: linear, params: {density: 1}}", "unknown linear parameter 'density'"),
        ("method: linear}", "method: slerp, params: {t: 3}}", "'t' of slerp: must be from 0 to 1, not 3"),
        ("method: linear}", "method: passthrough}", "passthrough takes exactly 1 source besides the base, and 2 are"),
        ("[mixed, base]", "[mixed]", "16:26: slerp takes exactly 2 sources besides the base, and 1 are given"),
        ("[mixed, base]", "{mixed: 1, base: 1}", "16:36: slerp takes no weights; give the sources as a list"),
        ("base: base\n", "base: base\n    like: mergkit\n", "10:11: ties has no variant like 'mergkit'; did you mean"),
        ("{method: slerp,", "{like: peft, method: slerp,", "slerp has no variant like 'peft'; leave 'like' out"),
    ],
)
def test_what_a_recipe_cannot_mean(old: str, new: str, message: str) -> None:
    assert old in RECIPE
    assert message in error(RECIPE.replace(old, new, 1))


def test_without_a_catalog_methods_are_not_looked_at() -> None:
    text = RECIPE.replace("method: ties", "method: unheard_of").replace("density: 0.5", "depth: 9")
    assert parse_recipe(text).recipe.steps["mixed"].method == "unheard_of"


def test_a_method_may_be_written_with_hyphens() -> None:
    text = HEAD + "merge: {method: task-arithmetic, sources: [a, b]}"
    assert parse_recipe(text, methods=METHODS).recipe.steps["merge"].method == "task-arithmetic"


def test_a_parameter_that_is_a_list_itself_is_not_interpolated() -> None:
    text = RECIPE.replace("density: 0.5", "ranks: [a, 3]")
    assert parse_recipe(text, methods=METHODS).recipe.steps["mixed"].params == {"ranks": ["a", 3]}


def test_parameters_of_a_rule_may_be_those_of_an_earlier_rules_method() -> None:
    rules = "[{match: x, method: slerp, params: {t: 1}}, {layers: 3, params: {t: 0.5, density: 0.1}}]"
    text = HEAD + f"merge: {{method: ties, sources: [a, b], base: c, rules: {rules}}}"
    assert len(parse_recipe(text, methods=METHODS).recipe.steps["merge"].rules) == 2
    assert "unknown ties parameter 'normalize'" in error(text.replace("density", "normalize"))


SLICES = """\
models: {a: ./a, b: ./b, c: ./c}
merge:
  method: ties
  base: c
  params: {density: {a: 0.5, b: [0.1, 0.9]}}
  rules: [{match: "*norm*", weights: {a: 2}}]
  slices:
    - sources: [{model: a, layers: 0-3, weight: 0.5, params: {density: 0.2}}, {model: c, layers: 2-5}]
    - sources: [{model: b, layers: "4-"}, {model: a, layers: [1, 1, 2]}]
      base: b
      params: {scope: tensor}
      rules: [{layers: none, params: {density: {a: 1}}}]
"""


def test_slices() -> None:
    step = parse_recipe(SLICES, methods=METHODS).recipe.steps["merge"]
    assert step.slices is not None
    assert [source.layers for piece in step.slices for source in piece.sources] == ["0-3", "2-5", "4-", [1, 1, 2]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  slices:", "  sources: [a]\n  slices:", "8:3: a step has either sources or slices"),
        (SLICES[SLICES.index("  slices:") :], "  slices: []", "7:3: 'slices' is empty"),
        ("layers: 2-5", "layers: 2-4", "8:7: the sources of a slice must have as many layers each, not 4 of 'a', 3 of"),
        ("layers: 0-3", "layers: 3-0", "8:36: '3-0' ends before it begins"),
        ("model: c, layers: 2-5", "model: cc, layers: 2-5", "8:87: no model or step is named 'cc'"),
        ("base: b\n", "base: d\n", "10:13: no model or step is named 'd'"),
        ("weight: 0.5", "weight: half", "8:49: a weight is a number"),
        ("params: {density: 0.2}", "params: {density: {a: 1}}", "'density' is given for one source here"),
        ("params: {density: 0.2}", "params: {scope: tensor}", "'scope' of ties is one value for all sources"),
        ("params: {density: 0.2}", "params: {density: 2}", "'density' of ties: must be from 0 to 1, not 2"),
        ("{scope: tensor}", "{scop: tensor}", "unknown ties parameter 'scop' in 'steps.merge.slices.1.params'"),
        ("params: {density: {a: 1}}", "params: {density: {d: 1}}", "'d' is not a source here; known are b, a"),
        ("weights: {a: 2}", "weights: {d: 2}", "'d' is not a source here; known are a, c, b"),
        ("layers: none", "layers: nne", "12:24: 'nne' is not a layer range"),
        (
            "model: a, layers: 0-3, weight: 0.5",
            "model: c, layers: 0-3, weight: 0.5",
            "8:7: ties takes at least 1 source besides the base, and 0 are given",
        ),
    ],
)
def test_slices_that_cannot_be_meant(old: str, new: str, message: str) -> None:
    assert old in SLICES
    assert message in error(SLICES.replace(old, new, 1))


def test_models_and_steps_cannot_be_empty() -> None:
    assert error("models: {}\nmerge: {method: linear, sources: [a]}") == "r:1:1: 'models' is empty"
    assert error(HEAD + "steps: {}") == "r:2:1: 'steps' is empty"


def test_long_circles_are_found_and_shown_short() -> None:
    steps = ", ".join(f"s{n}: {{method: linear, sources: [s{(n + 1) % 1000}]}}" for n in range(1000))
    message = error(f"{HEAD}steps: {{{steps}}}", methods=False)
    assert "in a circle: s" in message and message.endswith(" ...")
    assert len(message) < 200


def test_long_chains_are_refused() -> None:
    def chain(length: int) -> str:
        steps = ", ".join(f"s{n}: {{method: linear, sources: [{f's{n - 1}' if n else 'a'}, b]}}" for n in range(length))
        return f"{HEAD}steps: {{{steps}}}"

    assert len(parse_recipe(chain(LONGEST_CHAIN)).recipe.steps) == LONGEST_CHAIN
    assert f"more than {LONGEST_CHAIN} steps" in error(chain(LONGEST_CHAIN + 1), methods=False)


def test_dtypes_are_those_that_can_be_computed_and_stored() -> None:
    known = {spelling for spelling in DTYPES if parse_dtype(spelling).arithmetic}
    assert known == DTYPES
    for dtype in STORAGE.values():
        spellings = {dtype.name.lower(), dtype.torch_name}
        assert (spellings <= DTYPES) == dtype.arithmetic, dtype.name


@pytest.mark.parametrize("size", ["5GB", "5 gb", "1.5GiB", "200mb", "7B", "123456", 123456, "5G", "10**9", "GB", "5XB"])
def test_sizes_are_those_that_the_layout_reads(size: str | int) -> None:
    try:
        parse_size(size)
    except UsageError:
        assert "is not a size" in error(
            f"{HEAD}merge: {{method: linear, sources: [a]}}\noutput: {{shard_size: {size}}}"
        )
    else:
        text = f"{HEAD}merge: {{method: linear, sources: [a]}}\noutput: {{shard_size: {size}}}"
        assert str(parse_recipe(text).recipe.output.shard_size) == str(size)
