"""Forms of mergekit configs beyond one merge: idle keys, several documents, chat templates."""

from __future__ import annotations

import pytest

from mergekit_px.errors import RecipeError
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.recipe.load import parse_recipe
from mergekit_px.recipe.loaded import LoadedRecipe


def load(text: str) -> LoadedRecipe:
    return parse_recipe(text, name="m.yml", methods=method_catalog())


TWO = "models: [{model: a, parameters: {weight: 0.4}}, {model: b, parameters: {weight: 0.6}}]\n"


def test_keys_that_mean_nothing_to_mergekit_are_told() -> None:
    loaded = load(f"merge_method: linear\n{TWO}normalize: true\nrandom_seed: 0\nx-shared: &x {{weight: 1}}\n")
    told = " ".join(loaded.differences)
    for key in ("normalize", "random_seed", "x-shared"):
        assert f"'{key}' at the top level has no effect" in told
    assert "belongs under 'parameters'" in told


@pytest.mark.parametrize("slip", ["merge_methd", "base-model", "dtpye", "paramaters"])
def test_slips_of_the_pen_are_no_dead_keys(slip: str) -> None:
    with pytest.raises(RecipeError, match="did you mean"):
        load(f"merge_method: linear\n{TWO}{slip}: x\n")


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


@pytest.mark.parametrize("value", ["chatml", "llama3", "mistral", "alpaca"])
def test_named_chat_templates_are_jinja(value: str) -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = load(f"merge_method: linear\n{TWO}chat_template: {value}\n").recipe.output.chat_template
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
