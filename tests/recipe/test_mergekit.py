"""mergekit configs: how they are recognised, what they become, what is told and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_px.errors import RecipeError
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.recipe.dump import dump_recipe
from mergekit_px.recipe.load import parse_recipe
from mergekit_px.recipe.loaded import LoadedRecipe


def load(text: str) -> LoadedRecipe:
    return parse_recipe(text, name="m.yml", methods=method_catalog())


def body(text: str) -> str:
    """The translated step, as it is dumped."""
    dumped = dump_recipe(load(text).recipe)
    return dumped[dumped.index("\nmerge:") + 1 :]


def error(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(text)
    return str(caught.value)


TIES = """\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""


def test_ties_with_gradients_and_filters() -> None:
    loaded = load(TIES)
    assert (
        dump_recipe(loaded.recipe)
        == """\
pxmerge: 1
models:
  Llama-2-13B-fp16: TheBloke/Llama-2-13B-fp16
  orca_mini_v3_13b: psmathur/orca_mini_v3_13b
  Platypus2-13B: garage-bAInd/Platypus2-13B
  WizardMath-13B-V1-0: WizardLM/WizardMath-13B-V1.0
merge:
  method: ties
  base: Llama-2-13B-fp16
  sources: {orca_mini_v3_13b: 1.0, Platypus2-13B: [0, 0.3, 0.7, 1], WizardMath-13B-V1-0: 0}
  params:
    density: {orca_mini_v3_13b: [1, 0.7, 0.1], Platypus2-13B: 0.5, WizardMath-13B-V1-0: 0.33}
    divide_by: weights
  like: mergekit
  rules:
    - {layers: none, params: {density: {orca_mini_v3_13b: 1}}, weights: {Platypus2-13B: 0}}
    - {match: "*mlp*", weights: {WizardMath-13B-V1-0: 0.5}}
output:
  dtype: float16
"""
    )
    assert loaded.dialect == "mergekit"
    assert loaded.source == TIES
    told = " ".join(loaded.differences)
    assert "'int8_mask' has no effect on the result of ties" in told
    assert "rounds the inputs to float16 first and computes in float16" in told
    assert "tie at the trim threshold" in told


def test_places_point_into_the_config() -> None:
    loaded = load(TIES)
    assert loaded.where("steps", "merge", "params", "divide_by") == "m.yml:20:14"
    assert loaded.where("steps", "merge", "method") == "m.yml:17:15"
    assert loaded.where("steps", "merge", "rules", 1) == "m.yml:15:18"
    assert loaded.where("steps", "merge", "params", "density", "Platypus2-13B") == "m.yml:8:16"
    assert loaded.where("models", "orca_mini_v3_13b") == "m.yml:2:5"
    assert loaded.where("output", "dtype") == "m.yml:22:8"


def test_layers_scaled_and_stacked() -> None:
    text = """\
slices:
  - sources: [{model: org/a, layer_range: [0, 20]}]
  - sources:
      - model: org/a
        layer_range: [10, 11]
        parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.5}, {value: 1.0}]}
merge_method: passthrough
dtype: float32
"""
    assert (
        body(text)
        == """\
merge:
  method: passthrough
  slices:
    - sources:
        - {model: a, layers: 0-19}
    - sources:
        - {model: a, layers: 10}
      params: {scale: 1.0}
      rules:
        - {match: "*down_proj*", params: {scale: 0.5}}
        - {match: "*o_proj*", params: {scale: 0.0}}
output:
  dtype: float32
"""
    )


def test_slices_with_bases_of_their_own() -> None:
    text = """\
merge_method: ties
base_model: org/base
slices:
  - sources:
      - {model: org/base, layer_range: [0, 8]}
      - {model: org/m1, layer_range: [4, 12], parameters: {weight: 0.5, density: 0.2}}
      - {model: org/m2, layer_range: [0, 8], parameters: {weight: [0.1, 0.9]}}
  - base_model: org/m2
    sources:
      - {model: org/m1, layer_range: [8, 9], parameters: {weight: 1}}
      - {model: org/m2, layer_range: [8, 9]}
    parameters: {lambda: [0.1, 0.5], density: 0.3}
"""
    assert (
        body(text)
        == """\
merge:
  method: ties
  base: base
  like: mergekit
  slices:
    - sources:
        - {model: base, layers: 0-7}
        - {model: m1, layers: 4-11, weight: 0.5, params: {density: 0.2}}
        - {model: m2, layers: 0-7, weight: [0.1, 0.9], params: {density: 1.0}}
    - sources:
        - {model: m1, layers: 8, weight: 1, params: {density: 0.3}}
        - {model: m2, layers: 8}
      base: m2
      params: {scale: [0.1, 0.5]}
      rules:
        - {layers: none, params: {scale: 0.1}}
"""
    )


PAIR = "[{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 2, density: 0.5}}]"


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("linear", "{}", {}),
        ("linear", "{normalize: false}", {"normalize": False}),
        ("linear", "{normalize: 'no'}", {"normalize": False}),
        ("linear", "{normalize: 1}", {"normalize": True}),
        ("task_arithmetic", "{lambda: 0.5, normalize: true}", {"scale": 0.5, "normalize": True}),
        ("task_arithmetic", "{lambda: '5e-1'}", {"scale": 0.5}),
        ("ties", "{normalize: false}", {"density": {"a": 1.0, "b": 0.5}, "divide_by": "nothing"}),
        ("ties", "{normalize: on, rescale: yes}", {"divide_by": "weights", "rescale": "l1"}),
        ("dare_linear", "{density: 0.1, rescale: false}", {"density": {"a": 0.1, "b": 0.5}, "rescale": "none"}),
        ("dare_ties", "{normalize: true, lambda: 2}", {"divide_by": "weights", "scale": 2}),
    ],
)
def test_parameters_and_their_names_here(method: str, parameters: str, expected: dict[str, Any]) -> None:
    text = f"merge_method: {method}\nbase_model: c\nmodels: {PAIR}\nparameters: {parameters}\n"
    step = load(text.replace("base_model: c\n", "") if method == "linear" else text).recipe.steps["merge"]
    assert {key: step.params.get(key) for key in expected} == expected
    assert step.sources == {"a": 1, "b": 2}
    assert step.base == (None if method == "linear" else "c")
    assert step.like == ("mergekit" if method in ("ties", "dare_linear", "dare_ties") else None)


@pytest.mark.parametrize(
    ("text", "step"),
    [
        (
            f"merge_method: breadcrumbs\nbase_model: c\nmodels: {PAIR}\nparameters: {{gamma: 0.1}}",
            "sources: {a: 1, b: 2}, like: mergekit, params: {density: {a: 1.0, b: 0.5}, gamma: 0.1}, base: c",
        ),
        (
            f"merge_method: breadcrumbs_ties\nbase_model: c\nmodels: {PAIR}\nparameters: {{normalize: true}}",
            "sources: {a: 1, b: 2}, like: mergekit, params: {density: {a: 1.0, b: 0.5}, divide_by: weights}, base: c",
        ),
        (
            f"merge_method: nuslerp\nmodels: {PAIR}\nparameters: {{nuslerp_flatten: true}}",
            "sources: {a: 1, b: 2}, params: {along: tensor}",
        ),
        (
            f"merge_method: nuslerp\nmodels: {PAIR}\nparameters: {{nuslerp_flatten: false}}",
            "sources: {a: 1, b: 2}, params: {along: rows}",
        ),
        (
            f"merge_method: nuslerp\nmodels: {PAIR}\nparameters: {{nuslerp_flatten: false, nuslerp_row_wise: true}}",
            "sources: {a: 1, b: 2}, params: {along: columns}",
        ),
        (
            f"merge_method: model_stock\nbase_model: c\nmodels: {PAIR}\nparameters: {{filter_wise: 'yes'}}",
            "sources: [a, b], params: {along: rows}, base: c",
        ),
        (
            "merge_method: della_linear\nbase_model: c\nparameters: {rescale: false, normalize: true}\nmodels: "
            "[{model: a, parameters: {weight: 1, epsilon: 0.1}}, {model: b, parameters: {weight: 2, density: 0.5}}]",
            "sources: {a: 1, b: 2}, like: mergekit, base: c, params: {density: {a: 1.0, b: 0.5}, "
            "epsilon: {a: 0.1, b: 0.15}, rescale: none, normalize: true}",
        ),
        (
            f"merge_method: della\nbase_model: c\nmodels: {PAIR}\nparameters: {{normalize: true, epsilon: 0.2}}",
            "sources: {a: 1, b: 2}, like: mergekit, base: c, params: {density: {a: 1.0, b: 0.5}, epsilon: 0.2, "
            "divide_by: weights}",
        ),
        (
            "merge_method: arcee_fusion\nbase_model: c\nmodels: [{model: a}, {model: c}]",
            "sources: [c, a], like: mergekit",
        ),
        (
            f"merge_method: ram\nbase_model: c\nmodels: {PAIR}\nparameters: {{epsilon: 0.2}}",
            "sources: [a, b], base: c, params: {threshold: 0.2}",
        ),
        (
            f"merge_method: ramplus_tl\nbase_model: c\nmodels: {PAIR}\nparameters: {{r: 0.3, alpha: 1}}",
            "sources: [a, b], base: c, params: {growth: 0.3, clip: 1}, like: mergekit",
        ),
        (
            f"merge_method: multislerp\nmodels: {PAIR}\nparameters: {{normalize_weights: false}}",
            "sources: {a: 1, b: 2}, params: {normalize: false}",
        ),
        (
            "merge_method: nearswap\nbase_model: c\nmodels: [{model: a}]\nparameters: {t: 0.1}",
            "sources: [a], params: {t: 0.1}, base: c",
        ),
        (
            "merge_method: model_stock\nbase_model: c\nmodels: [{model: a}, {model: c}, {model: b}]",
            "sources: [a, b], base: c",
        ),
    ],
)
def test_other_methods(text: str, step: str) -> None:
    method = {"ramplus_tl": "ram_plus"}.get(text.split()[1], text.split()[1])
    expected = parse_recipe(f"models: {{a: a, b: b, c: c}}\nmerge: {{method: {method}, {step}}}").recipe.steps
    assert load(text).recipe.steps == expected


def test_the_base_of_a_method_without_weights_takes_part() -> None:
    text = "merge_method: karcher\nbase_model: c\nmodels: [{model: a}, {model: b}]"
    assert load(text).recipe.steps["merge"].source_names() == ["a", "b", "c"]
    assert load(text.replace("model: b}", "model: c}")).recipe.steps["merge"].source_names() == ["a", "c"]


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_a_base_turns_interpolation_to_that_of_task_vectors(method: str) -> None:
    step = load(f"merge_method: {method}\nbase_model: c\nmodels: {PAIR}").recipe.steps["merge"]
    assert (step.method, step.base, step.sources) == (f"{method}_deltas", "c", {"a": 1, "b": 2})
    slices = (
        "[{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]}, {base_model: c, sources: "
        "[{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}, {model: c, layer_range: [0, 1]}]}]"
    )
    mixed = f"merge_method: {method}\nslices: {slices}\nparameters: {{weight: 1}}"
    assert "not supported yet: slices with and without a base_model in one merge" in error(mixed)


def test_first_match_wins_and_what_no_filter_matches_falls_through() -> None:
    text = """\
merge_method: slerp
base_model: org/a
slices:
  - sources: [{model: org/a, layer_range: [0, 4]}, {model: org/b, layer_range: [0, 4]}]
    parameters: {t: [{filter: q_proj, value: 0.1}, {filter: attn, value: 0.2}]}
  - sources: [{model: org/a, layer_range: [4, 8]}, {model: org/b, layer_range: [4, 8]}]
parameters: {t: [{filter: "a[b]*", value: 0.3}, {value: 0.4}, {filter: never, value: 1}]}
"""
    step = load(text).recipe.steps["merge"]
    assert step.slices is not None
    assert [(rule.match, rule.params["t"]) for rule in step.slices[0].rules] == [
        ("*a[[]b][*]*", 0.3),
        ("*attn*", 0.2),
        ("*q_proj*", 0.1),
    ]
    assert step.slices[0].params == step.slices[1].params == {"t": 0.4}
    assert [rule.match for rule in step.slices[1].rules] == ["*a[[]b][*]*"]


def test_the_base_of_linear_takes_part_where_mergekit_gives_it_a_weight() -> None:
    text = "merge_method: linear\nbase_model: c\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n"
    loaded = load(text)
    assert loaded.recipe.steps["merge"].sources == {"a": 0.5, "b": 0.5, "c": 0.5}
    assert loaded.recipe.output.config_from == "c"
    loaded = load(f"merge_method: linear\nbase_model: c\nmodels: {PAIR}\n")
    assert loaded.recipe.steps["merge"].sources == {"a": 1, "b": 2}
    assert loaded.recipe.output.config_from == "c"
    assert any("linear does not use the base_model" in told for told in loaded.differences)


@pytest.mark.parametrize(
    ("lines", "dtype"),
    [
        ("dtype: bfloat16", "bfloat16"),
        ("dtype: float32\nout_dtype: torch.bfloat16", "bfloat16"),
        ("out_dtype: float16", "float16"),
        ("dtype: null", None),
    ],
)
def test_the_output_has_the_dtype_that_is_asked_for(lines: str, dtype: str | None) -> None:
    assert load(f"merge_method: linear\nmodels: {PAIR}\n{lines}\n").recipe.output.dtype == dtype


@pytest.mark.parametrize(
    ("lines", "expected", "told"),
    [
        ("chat_template: auto", None, "the one that most models share"),
        ("chat_template: ''", None, ""),
    ],
)
def test_chat_templates_that_come_along(lines: str, expected: str | None, told: str) -> None:
    loaded = load(f"merge_method: task_arithmetic\nbase_model: c\nmodels: {PAIR}\n{lines}\n")
    assert loaded.recipe.output.chat_template == expected
    assert told in " ".join(loaded.differences)


LINEAR = f"merge_method: linear\nmodels: {PAIR}\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LINEAR, "those of a model picked at random"),
        (LINEAR, "widest of the inputs' dtypes"),
        (LINEAR, "Every tensor of the inputs is kept"),
        (LINEAR, "refused; mergekit merges what there is"),
        (LINEAR + "dtype: float64", "mergekit uses float64"),
        (LINEAR + "parameters: {t: 3, int8_mask: true}", "'t' has no effect on the result of linear"),
        (LINEAR + "name: mine", "Every tensor"),
        (LINEAR.replace("weight: 1}", "weight: 1, normalize: false}"), "'normalize' of 'a' has no effect"),
        (
            LINEAR.replace("weight: 1}", "weight: {filter: mlp, value: 1}}"),
            "Tensors that no filter of 'weight' matches",
        ),
        (f"merge_method: dare_ties\nbase_model: c\nmodels: {PAIR}", "Other elements are dropped"),
        (f"merge_method: dare_ties\nbase_model: c\nmodels: {PAIR}", "L1 norm is below 1e-7"),
        (f"merge_method: ties\nbase_model: a\nmodels: {PAIR}", "'weight' of the base model 'a' has no effect"),
        (
            f"merge_method: task_arithmetic\nbase_model: c\nmodels: {PAIR}\nparameters: {{normalize: true}}",
            "Weights that add up to zero cannot be normalized",
        ),
        ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.5}", "straight line"),
        ("merge_method: passthrough\nbase_model: c\nmodels: [{model: a}]", "passthrough does not use the base_model"),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 2]}], residual_weight: 0.1}]",
            "'residual_weight' has no effect",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}]",
            "embeddings are made as in the first slice",
        ),
        (
            "merge_method: linear\nparameters: {weight: 1}\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}, "
            "{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]}]",
            "uses only as many as the first slice has",
        ),
    ],
)
def test_differences_are_told(text: str, told: str) -> None:
    differences = load(text).differences
    assert any(told in sentence for sentence in differences), differences
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in differences)
    assert len(set(differences)) == len(differences)


def test_nothing_is_told_of_arithmetic_in_float32() -> None:
    told = " ".join(load(LINEAR + "dtype: float32\nout_dtype: bfloat16").differences)
    assert "float32" not in told and "bfloat16" not in told


SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.5}\n"


@pytest.mark.parametrize("text", [LINEAR, SLERP, TIES])
def test_configs_are_recognised(text: str) -> None:
    assert load(text).dialect == "mergekit"


def test_references_given_as_mappings() -> None:
    model = "{model: {path: org/m, revision: v1}, lora: ./l, override_architecture: X}"
    text = f"merge_method: linear\nmodels: [{{model: {model}, parameters: {{weight: 1}}}}]"
    (entry,) = load(text).recipe.models.values()
    assert (entry.model, entry.adapter) == ("org/m@v1", "./l")
    assert "unknown key 'lra'; did you mean 'lora'?" in error(text.replace("lora", "lra"))
    assert "a path is text, or {path: text, revision: text}" in error(text.replace("path: org/m", "pth: org/m"))
