"""Forms of mergekit configs beyond one merge: idle keys, several documents, chat templates."""

from __future__ import annotations

import pytest

from mergekit_px.errors import RecipeError
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.recipe.chat_template import jinja_text
from mergekit_px.recipe.load import parse_recipe
from mergekit_px.recipe.loaded import LoadedRecipe


def load(text: str) -> LoadedRecipe:
    return parse_recipe(text, name="m.yml", methods=method_catalog())


TWO = "models: [{model: a, parameters: {weight: 0.4}}, {model: b, parameters: {weight: 0.6}}]\n"


def test_keys_that_mean_nothing_to_mergekit_are_told() -> None:
    loaded = load(f"merge_method: linear\n{TWO}normalize: true\nrandom_seed: 0\nx-shared: &x {{weight: 1}}\n")
    told = " ".join(loaded.differences)
    for key in ("normalize", "random_seed", "x-shared"):
        assert f"'{key}' in the config has no effect" in told
    assert "belongs under 'parameters'" in told


@pytest.mark.parametrize("slip", ["merge_methd", "base-model", "dtpye", "paramaters"])
def test_slips_of_the_pen_are_no_dead_keys(slip: str) -> None:
    with pytest.raises(RecipeError, match="did you mean"):
        load(f"merge_method: linear\n{TWO}{slip}: x\n")


def test_idle_keys_below_the_top_level() -> None:
    text = (
        "merge_method: sce\nbase_model: c\nparameters: {int_space: cs}\nslices:\n  - depth_note: x\n    sources:\n"
        "      - {model: a, layer_range: [0, 2], revision: main, weight: 1}\n"
        "      - {model: b, layer_range: [0, 2], parameters: {dtype: x}}\n      - {model: c, layer_range: [0, 2]}\n"
    )
    loaded = load(text)
    told = {sentence: place for sentence, place in loaded.idle}
    assert told == {
        "'int_space' in 'parameters' has no effect, there or here.": "m.yml:3:14",
        "'depth_note' in a slice has no effect, there or here.": "m.yml:5:5",
        "'revision' in a source has no effect, there or here; write model@revision.": "m.yml:7:41",
        "'weight' in a source has no effect, there or here; it belongs under 'parameters'.": "m.yml:7:57",
        "'dtype' in 'parameters' has no effect, there or here.": "m.yml:8:54",
    }
    assert set(told) <= set(loaded.differences)
    assert load(f"merge_method: linear\n{TWO}").idle == ()


@pytest.mark.parametrize("layers", ["[2, 2]", "[4, 1]"])
def test_a_slice_without_layers_is_told(layers: str) -> None:
    first, second = (f"{{sources: [{{model: a, layer_range: {one}}}]}}" for one in ("[0, 3]", layers))
    loaded = load(f"merge_method: passthrough\nslices: [{first}, {second}]\n")
    told = "A slice whose 'layer_range' ends where it begins, or before, has no effect, there or here."
    assert dict(loaded.idle) == {told: "m.yml:2:56"}
    assert not load(f"merge_method: passthrough\nslices: [{first}]\n").idle


@pytest.mark.parametrize(
    ("flags", "rules"),
    [
        ("[true, false]", [([1.0, 1.0], "tensor")]),
        ("[true, false, false, true]", [([1 / 3, 1.0], "tensor"), ([1.0, 1.0], "rows")]),
        ("[true, true, no, 0]", [([2 / 3, 1.0], "tensor")]),
        ("[true, true]", []),
        ("[true]", []),
    ],
)
def test_true_and_false_over_the_layers(flags: str, rules: list[tuple[list[float], str]]) -> None:
    """Each holds from its own depth to that of the next."""
    models = "base_model: c\nmodels: [{model: a}, {model: b}]\n"
    step = load(f"merge_method: model_stock\n{models}parameters: {{filter_wise: {flags}}}\n").recipe.steps["merge"]
    assert step.params["along"] == "rows"
    found = [(rule.depth, rule.params["along"]) for rule in step.rules if rule.layers is None]
    assert found == rules
    outside = [rule.params["along"] for rule in step.rules if rule.layers == "none"]
    assert outside == (["rows"] if rules else [])


def test_filters_on_true_and_false_over_the_layers() -> None:
    models = "base_model: c\nmodels: [{model: a}, {model: b}]\n"
    value = "[{filter: mlp, value: [true, false]}, {value: no}]"
    step = load(f"merge_method: model_stock\n{models}parameters: {{filter_wise: {value}}}\n").recipe.steps["merge"]
    assert step.params == {"along": "tensor"}
    assert [(rule.match, rule.layers, rule.depth, rule.params["along"]) for rule in step.rules] == [
        ("*mlp*", None, None, "rows"),
        ("*mlp*", None, [1.0, 1.0], "tensor"),
        ("*mlp*", "none", None, "rows"),
    ]


def test_a_base_alone_is_the_result() -> None:
    config = "merge_method: {}\nbase_model: {}\nmodels: [{{model: {}, parameters: {{weight: 1, density: 0.5}}}}]\n"
    for method in ("task_arithmetic", "dare_ties", "sce", "ramplus_tl"):
        loaded = load(config.format(method, "b+lora", "b+lora"))
        assert loaded.recipe.steps["merge"].method == "passthrough"
        assert loaded.recipe.models["b-lora"].adapter == "lora"
        assert any("the result is 'b+lora' itself" in sentence for sentence in loaded.differences)


def test_a_slice_without_layers_gives_what_is_outside_of_them() -> None:
    slices = "[{sources: [{model: a, layer_range: [0, 4]}]}, {sources: [{model: b, layer_range: [6, 2]}]}]"
    step = load(f"merge_method: passthrough\nslices: {slices}\n").recipe.steps["merge"]
    assert step.slices is not None
    assert [piece.sources[0].layers for piece in step.slices] == ["0-3", "none"]


def test_the_default_module_is_the_whole_model() -> None:
    inner = "{default: {models: [{model: a, parameters: {weight: 1}}, {model: b}], parameters: {weight: 2}}}"
    loaded = load(f"merge_method: linear\nparameters: {{weight: 3, normalize: false}}\nmodules: {inner}\n")
    step = loaded.recipe.steps["merge"]
    assert (step.sources, step.params) == ({"a": 1, "b": 2}, {"normalize": False})


def test_modules_become_steps_and_are_put_together() -> None:
    text = """\
merge_method: linear
modules:
  multi_modal_projector: {models: [{model: b, parameters: {weight: 1}}, {model: a, parameters: {weight: 0}}]}
  audio: {models: [{model: a, parameters: {weight: 1}}]}
  vision_tower: {models: [{model: c, parameters: {weight: 1}}, {model: a, parameters: {weight: 0}}]}
  text_decoder:
    slices: [{sources: [{model: a, layer_range: [0, 2], parameters: {weight: 1}}]}]
"""
    recipe = load(text).recipe
    assert list(recipe.steps) == [
        *("merge-text_decoder", "merge-audio", "merge-vision_tower", "merge-multi_modal_projector", "merge"),
    ]
    assert recipe.steps["merge-text_decoder"].slices is not None
    assert recipe.steps["merge"].source_names() == ["merge-text_decoder"]
    taken = {rule.take: rule.match for rule in recipe.steps["merge"].rules}
    assert taken["merge-audio"] == ["audio.*", "*.audio.*"]
    assert list(taken)[-1] == "merge-multi_modal_projector"
    told = load(text).differences
    assert any("in none of the modules" in sentence for sentence in told)
    assert sum("Config and tokenizer come from" in sentence for sentence in told) <= 1
    misspelt = load(text.replace("vision_tower", "vision_towr"))
    assert [sentence for sentence, _ in misspelt.idle if "did you mean 'vision_tower'?" in sentence]


def test_documents_become_steps() -> None:
    text = f"name: first/part\nmerge_method: linear\n{TWO}---\nmerge_method: task_arithmetic\nbase_model: c\n"
    loaded = load(text + "models: [{model: first/part, parameters: {weight: 0.5}}]\n")
    assert list(loaded.recipe.models) == ["a", "b", "c"]
    assert list(loaded.recipe.steps) == ["part", "merge"]
    assert loaded.recipe.steps["merge"].source_names() == ["part"]
    assert loaded.recipe.output.from_ == "merge"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"merge_method: linear\n{TWO}---\nmerge_method: linear\n{TWO}", r":4:1: two documents without a name"),
        (f"name: x\nmerge_method: linear\n{TWO}---\nname: x\nmerge_method: linear\n{TWO}", "two documents are named"),
        (f"merge_method: linear\n{TWO}---\npxmerge: 1\n", "one document"),
    ],
)
def test_documents_that_cannot_be_told_apart(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(text)


@pytest.mark.parametrize("value", ["chatml", "llama3", "mistral", "exaone", "alpaca"])
def test_named_chat_templates_are_jinja(value: str) -> None:
    jinja2 = pytest.importorskip("jinja2")
    name = load(f"merge_method: linear\n{TWO}chat_template: {value}\n").recipe.output.chat_template
    assert name == value
    template = jinja_text(name)
    text = jinja2.Template(template).render(
        messages=[{"role": "user", "content": "two?"}, {"role": "assistant", "content": "four."}],
        bos_token="<s>",
        eos_token="</s>",
        add_generation_prompt=True,
    )
    assert text.index("two?") < text.index("four.")


def test_chat_templates_of_ones_own_and_unknown_ones() -> None:
    loaded = load(f"merge_method: linear\n{TWO}chat_template: '{{{{ messages }}}}'\n")
    assert loaded.recipe.output.chat_template == "{{ messages }}"
    assert load(f"merge_method: linear\n{TWO}chat_template: auto\n").recipe.output.chat_template is None
    with pytest.raises(RecipeError, match="did you mean 'chatml'"):
        load(f"merge_method: linear\n{TWO}chat_template: chat-ml\n")
    own = "{% generation %}{{ messages | tojson }}{% endgeneration %}{% for m in [] %}{% continue %}{% endfor %}"
    assert load(f"merge_method: linear\n{TWO}chat_template: '{own}'\n").recipe.output.chat_template == own


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m }}", "Unexpected end of template"),
        ("{{ messages | tojsn }}", "No filter named 'tojsn'"),
        ("{{ messages[0 }}", "its line 1"),
    ],
)
def test_a_chat_template_that_jinja_cannot_read(template: str, message: str) -> None:
    native = (
        f"models: {{a: a, b: b}}\nmerge: {{method: linear, sources: [a, b]}}\noutput: {{chat_template: '{template}'}}"
    )
    for text, line in ((f"merge_method: linear\n{TWO}chat_template: '{template}'\n", ":"), (native, ":3:")):
        with pytest.raises(RecipeError) as error:
            load(text)
        assert message in str(error.value) and line in str(error.value)


def test_a_mixture_of_experts_is_a_step_with_a_mixture() -> None:
    loaded = load(
        "base_model: a\nexperts_per_token: 1\ndtype: bfloat16\narchitecture: qwen\ncolour: red\n"
        "experts:\n  - {source_model: b@main, positive_prompts: [x], negative_prompts: [y]}\n"
        "  - {source_model: a, positive_prompts: [z], noise_scale: 0.1, residual_scale: 0.5, colour: red}\n"
        "shared_experts: [{source_model: c, positive_prompts: [all]}]\n"
    )
    step = loaded.recipe.steps["merge"]
    assert (step.method, step.sources) == ("passthrough", ["a"]) and loaded.recipe.output.dtype == "bfloat16"
    assert step.mixture is not None and step.mixture.model_dump(exclude_defaults=True) == {
        "family": "qwen2_moe",
        "experts_per_token": 1,
        "router": {"kind": "hidden"},
        "experts": [
            {"model": "b", "prompts": ["x"], "negative_prompts": ["y"]},
            {"model": "a", "prompts": ["z"], "noise": 0.1, "scale": 0.5},
        ],
        "shared": {"model": "c", "prompts": ["all"]},
    }
    assert [place for _, place in loaded.idle] == ["m.yml:5:1", "m.yml:8:85"]


def test_sce_of_one_model_is_that_model() -> None:
    loaded = load("merge_method: sce\nbase_model: c\nmodels: [{model: c}, {model: a}]\n")
    assert (loaded.recipe.steps["merge"].method, loaded.recipe.steps["merge"].sources) == ("passthrough", ["a"])
    assert any("sce of one model is that model" in told for told in loaded.differences)
    with pytest.raises(RecipeError, match="one model has no such variance"):
        load("merge_method: sce\nbase_model: c\nmodels: [{model: a}]\nparameters: {select_topk: [0.5, 1]}\n")


def test_idle_keys_of_tokenizers() -> None:
    loaded = load(
        f"merge_method: linear\nbase_model: a\n{TWO}tokenizer: {{source: base, colour: red, tokens: "
        "{x: {source: b, why: y}}}\n"
    )
    assert {sentence.split(" has no")[0] for sentence, _ in loaded.idle} == {
        "'colour' in 'tokenizer'",
        "'why' in the entry of 'x'",
    }


def test_slices_of_a_second_stack_name_it() -> None:
    part = "slices: [{sources: [{model: a, layer_range: [0, 2]}]}]"
    loaded = load(f"merge_method: passthrough\nmodules:\n  decoder: {{{part}}}\n  encoder: {{{part}}}\n")
    steps = loaded.recipe.steps
    assert steps["merge-encoder"].stack == ["encoder.*", "*.encoder.*"]
    assert steps["merge-decoder"].stack == ["decoder.*", "*.decoder.*"]
