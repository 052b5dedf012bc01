"""mergekit configs that are refused, and what is said of them."""

from __future__ import annotations

import pytest

from mergekit_px.errors import RecipeError
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.recipe.load import parse_recipe

PAIR = "[{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 2, density: 0.5}}]"
LINEAR = f"merge_method: linear\nmodels: {PAIR}\n"
SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.5}\n"


def error(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="m.yml", methods=method_catalog())
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SLERP + "chat_template: chatlm", "there is no chat template 'chatlm'; did you mean 'chatml'?"),
        (SLERP + "modules: {default: {models: []}}", "m.yml:3:1: either modules or models, not both"),
        (SLERP.replace("0.5", "[[0, 0.5], 1]"), "m.yml:4:18: 't' must be a finite number, not [0, 0.5]"),
        (SLERP.replace("models: [{model: b}]", "models: {model: b}"), "'models' must be a list, not a mapping"),
        (SLERP + "dtype: [float16]", "'dtype' cannot be ['float16']"),
        ("merge_method: linear\nmodules: {}", "m.yml:2:10: 'modules' is empty"),
        ("genome: {models: [a, b]}\ntasks: []", "m.yml:1:1: this is a genome of mergekit-evolve; `pxmerge search`"),
        ("layer_slices: [{model: a, start: 0, end: 2}]", "m.yml:1:1: this is a config of bakllama"),
        (
            "merge_method: linear\nmodules: {default: {modls: []}}",
            "unknown key 'modls' in the module 'default'; did you",
        ),
        ("merge_method: linear\nmodules: {default: {}}", "'models' or 'slices' is missing"),
        (
            "merge_method: linear\nmodules: {default: {models: []}, vision_tower: {models: []}}",
            "the module 'default' is the whole model, and stands alone",
        ),
        ("base_model: a\nexperts: []\ngate_mode: hidden", "m.yml:2:10: 'experts' must be a list of experts, not []"),
        (
            "base_model: a\nexperts: [{source_model: b}]\ngate_mode: hiden",
            "m.yml:3:12: 'gate_mode' cannot be 'hiden'; did you mean 'hidden'",
        ),
        ("base_model: a\nexperts: [{source_modle: b}]", "unknown key 'source_modle' in an expert; did you mean"),
        (
            f"merge_method: nuslerp\nmodels: {PAIR}\nparameters: {{nuslerp_row_wise: [{{filter: a, value: true}}, "
            "{value: false}]}",
            "m.yml:3:52: not supported yet: nuslerp_row_wise of several values",
        ),
        (f"merge_method: arcee_fusion\nbase_model: c\nmodels: {PAIR}", "arcee_fusion takes two sources, the base"),
        (SLERP.replace("slerp", "ram+"), "m.yml:1:15: unknown merge method 'ram+'; did you mean 'ram'?"),
        ("merge_method: model_stock\nbase_model: c\nmodels: [{model: a}]", "model_stock takes at least 2 sources"),
        (
            f"merge_method: nearswap\nbase_model: c\nmodels: {PAIR}\nparameters: {{t: 1}}",
            "nearswap takes one source be",
        ),
        (
            SLERP.replace("slerp", "dare-ties"),
            "m.yml:1:15: unknown merge method 'dare-ties'; did you mean 'dare_ties'?",
        ),
        (SLERP + "---\nname: second", "m.yml:6:1: a recipe is one document"),
        (LINEAR + "parameters: {normalize: [true, perhaps]}", "'normalize' must be true or false, not 'perhaps'"),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [1, 3], "
            "parameters: {weight: [{filter: layers.2., value: 1}, {value: 0}]}}]}]",
            "not supported yet: the filter 'layers.2.' of 'weight' with layers that change their number",
        ),
        (
            LINEAR + "tokeniser_source: a",
            "m.yml:3:1: unknown key 'tokeniser_source' in the config; did you mean 'token",
        ),
        (LINEAR + "parametrs: {}", "unknown key 'parametrs' in the config; did you mean 'parameters'?"),
        (LINEAR.replace("density", "densty"), "unknown key 'densty' in 'parameters'; did you mean 'density'?"),
        (
            LINEAR.replace("merge_method", "merge_methd"),
            "unknown key 'merge_methd' in the config; did you mean 'merge_m",
        ),
        (LINEAR.replace("merge_method: linear\n", ""), "'merge_method' is missing"),
        (LINEAR.replace("model: a", "modl: a"), "unknown key 'modl' in an entry of 'models'; did you mean 'model'?"),
        (LINEAR.replace("model: a", "model: 3"), "a model is a path or org/name, not 3"),
        (LINEAR.replace("model: a", "model: b"), "model 'b' is given twice"),
        (LINEAR.replace("weight: 1", "weight: x"), "'weight' must be a finite number, not 'x'"),
        (LINEAR.replace("weight: 1", "weight: nan"), "'weight' must be a finite number, not 'nan'"),
        (LINEAR.replace("weight: 1", "weight: []"), "'weight' is an empty list"),
        (LINEAR.replace("weight: 1", "weight: [1, {value: 2}]"), "'weight' mixes values with filters"),
        (LINEAR.replace("weight: 1", "weight: {valu: 2}"), "unknown key 'valu' in 'weight'; did you mean 'value'?"),
        (LINEAR.replace("weight: 1", "weight: {filter: x}"), "'value' is missing in 'weight'"),
        (LINEAR.replace("weight: 1", "weight: {filter: 3, value: 1}"), "a filter is text, not 3"),
        (LINEAR.replace("weight: 1", "density: 1"), "linear needs the parameter 'weight' for 'a'"),
        (
            "merge_method: linear\nmodels: [{model: a, weight: 1}]",
            "m.yml:2:10: linear needs the parameter 'weight' for 'a'; write 'weight' under 'parameters:'",
        ),
        (LINEAR + "parameters: {normalize: perhaps}", "'normalize' must be true or false, not 'perhaps'"),
        (LINEAR + "dtype: bfloat", "'dtype' cannot be 'bfloat'; did you mean 'bfloat16'?"),
        (LINEAR + "slices: []", "m.yml:3:1: either models or slices, not both"),
        ("merge_method: linear", "m.yml:1:1: 'models' or 'slices' is missing"),
        ("merge_method: linear\nmodels: []", "'models' is empty"),
        ("merge_method: linear\nmodels: {a: 1}", "'models' must be a list, not a mapping"),
        (SLERP.replace("base_model: a\n", ""), "slerp needs a base_model"),
        (SLERP.replace("{t: 0.5}", "{}"), "slerp needs the parameter 't'"),
        (SLERP.replace("t: 0.5", "t: 1.5"), "'t' of slerp: must be from 0 to 1, not 1.5"),
        (
            SLERP.replace("[{model: b}]", "[{model: b}, {model: c}]"),
            "slerp takes two sources, the base_model counted, and",
        ),
        (
            SLERP.replace("slerp", "nearswap").replace("[{model: b}]", "[{model: a}]"),
            "nearswap needs a model besides the base",
        ),
        (
            "merge_method: passthrough\nmodels: [{model: a}, {model: b}]",
            "passthrough takes one source, and 2 are given",
        ),
        (
            "merge_method: ties\nbase_model: a\nslices: [{sources: [{model: b, layer_range: [0, 1]}]}]",
            "base_model 'a' is not among the sources of the slice",
        ),
        ("merge_method: linear\nslices: [{sources: [{model: b}]}]", "'layer_range' is missing"),
        (
            "merge_method: linear\nslices: [{sources: [{model: b, layer_range: [3, 3]}]}]",
            "the slices have no layers at all",
        ),
        ("merge_method: linear\nslices: [{sources: [{model: b, layer_range: [-1, 3]}]}]", "must be [first, end] with"),
        ("merge_method: linear\nslices: [{sources: [{model: b, layer_range: 0-3}]}]", "must be [first, end] with"),
        (
            "merge_method: linear\nslices: [{sources: "
            "[{model: a, layer_range: [0, 3]}, {model: b, layer_range: [0, 2]}]}]",
            "the sources of a slice must have as many layers each, not 3, 2",
        ),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    assert message in error(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [{model: a}]", "'merge_method' is missing"),
        ("slices: []", "'merge_method' is missing"),
        ("pxmerge: 1\nmerge_method: linear", "unknown key 'merge_method'; known are pxmerge, models"),
        ("models: {a: a}\nmerge: {}\nbase_model: a", "unknown key 'base_model'"),
        ("models: {a: a}", "'steps' is missing"),
    ],
)
def test_what_is_wrong_is_told_in_the_terms_of_the_dialect(text: str, message: str) -> None:
    assert message in error(text)
