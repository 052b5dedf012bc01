"""Merges by one call: equal to the command line, explorable, and clear about what cannot be meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_llamas
from safetensors.torch import load_file

import mergekit_px as px
from mergekit_px.cli import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_llamas(tmp_path, "a", "b")
    return tmp_path


def test_one_call_merges_as_the_command_does(folder: Path) -> None:
    result = px.merge(["a", folder / "b"], "ties", base="base", weights=[0.6, 0.4], density=0.3, output="merged")
    words = "ties --base base --sources a b --weights 0.6 0.4 --density 0.3 -o told -q"
    assert main(words.split()) == 0
    assert Path("merged/model.safetensors").read_bytes() == Path("told/model.safetensors").read_bytes()
    assert repr(result).startswith("<RunResult merged: ") and "\n" not in repr(result)
    again = px.merge(["a", folder / "b"], "ties", base="base", weights=[0.6, 0.4], density=0.3, output="merged")
    assert again.up_to_date and px.verify("merged").is_intact


def test_files_and_memory_share_names(folder: Path) -> None:
    states = {name: load_file(folder / name / "model.safetensors") for name in ("base", "a", "b")}
    in_memory = px.merge_state_dicts(
        {"a": states["a"], "b": states["b"]}, "task_arithmetic", base=states["base"], weights={"b": 0.3, "a": 0.7}
    )
    px.merge({"x": "a", "y": "b"}, "task_arithmetic", base="base", weights={"y": 0.3, "x": 0.7}, output="out")
    written = load_file("out/model.safetensors")
    assert all((written[name] == tensor).all() for name, tensor in in_memory.items())


def test_recipes_from_files_and_mappings() -> None:
    recipe: dict[str, Any] = {"pxmerge": 1, "models": {"a": "a", "b": "b"}, "merge": {"method": "linear"}}
    recipe["merge"]["sources"] = ["a", "b"]
    plan = px.plan_recipe(recipe, output="planned", memory="2GB")
    assert repr(plan) == f"<Plan: model of {len(plan.items)} tensors from a, b -> planned>"
    html = plan._repr_html_()
    assert html.startswith("<table>") and "linear" in html and "<script" not in html
    Path("recipe.yaml").write_text("pxmerge: 1\nmodels: {a: a, b: b}\nmerge: {method: linear, sources: [a, b]}\n")
    assert px.plan_recipe("recipe.yaml").hash == plan.hash
    assert repr(px.load_recipe("recipe.yaml")) == "<LoadedRecipe recipe.yaml: a, b -> merge>"
    assert px.run_recipe(px.load_recipe("recipe.yaml"), output="planned").output == Path("planned")


def test_inspection_by_one_call() -> None:
    assert px.inspect("a")["tensors"]
    assert px.compare("base", "a", "b")["models"] == ["a", "b"]
    with pytest.raises(px.PxmergeError, match="one model alone"):
        px.compare("a")


def test_names_can_be_explored() -> None:
    assert set(dir(px)) == set(px.__all__) >= {"merge", "compare", "merge_state_dicts"}
    assert all(hasattr(px, name) for name in px.__all__)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: px.merge("a"), "sources are a list of models, not str"),
        (lambda: px.merge([{"w": 1}]), "a model is a path or a name on the Hub, not dict"),
        (lambda: px.merge(["a", "b"], weights=[1.0]), "1 weights for 2 sources"),
        (lambda: px.merge(["a", "b"], weights={"c": 1.0}), "a weight is given for 'c'"),
        (lambda: px.merge(["a", "b"], "tiess"), "did you mean 'ties'"),
        (lambda: px.merge(["a", "b"], "ties", base="base", densty=0.3), "did you mean 'density'"),
        (lambda: px.merge(["a", "b"], resume=True, overwrite=True), "resume keeps what is there"),
        (lambda: px.merge(["a", "b"], output=3), "output is a path, not int"),
        (lambda: px.merge(["a", "b"], dtype=torch.float16), "dtype is the name of a dtype, as 'bfloat16', not dtype"),
        (lambda: px.merge(["a", "b"], memory=3.5), "memory is a whole number, not float"),
        (lambda: px.merge(["a", "b"], threads=0), "threads must be at least 1, not 0"),
        (lambda: px.merge(["a", "b"], device=3), "device is auto, cpu, cuda or cuda:1, not int"),
        (lambda: px.merge(["a", "b"], strict="yes"), "strict is True or False, not str"),
        (lambda: px.compare(["a", "b"]), "models are given one by one, not as a list; write compare"),
        (lambda: px.compare("a", 3), "a model is a path or a name on the Hub, not int"),
        (lambda: px.advise("a"), "models are a list of models, not str; write"),
        (lambda: px.inspect(3), "a model is a path or a name on the Hub, not int"),
        (lambda: px.verify(None), "a merge is a path, not NoneType"),
        (lambda: px.load_recipe({}), "a recipe is a path, not dict; run_recipe and plan_recipe take a mapping too"),
        (lambda: px.parse_recipe(3), "a recipe is a text, not int"),
        (lambda: px.open_checkpoint(3), "a model is a path or a name on the Hub, not int"),
        (lambda: px.find_method(3), "a merge method is its name, not int"),
        (lambda: px.run_learner(3), "a learner is its name, not int"),
        (lambda: px.run_command(), "there is no command ''; pxmerge --help lists them"),
        (lambda: px.plan_recipe(3), "not int"),
        (lambda: px.plan_recipe({}, colour="red"), "there is no option 'colour'"),
        (lambda: px.merge(["a", "b"], "linear", outputs="c"), "merge has no argument 'outputs'; did you mean 'output'"),
        (lambda: px.build_plan("recipe.yaml"), "plan_recipe takes files and mappings"),
        (lambda: px.merge_state_dicts(["a", "b"]), "this is str; merge.. merges files"),
        (lambda: px.merge_state_dicts({"a": {}, "b": {}}, weights={"c": 1.0}), "a weight is given for 'c'"),
    ],
)
def test_what_cannot_be_meant_is_said_in_words(call: Any, message: str) -> None:
    with pytest.raises(px.PxmergeError, match=message):
        call()
    assert not Path("merged").exists()
