"""What an adapter's files leave open, said in a recipe and on the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mergekit_px.adapters.binder import BindOptions
from mergekit_px.cli.adapter_inputs import AdapterOptions
from mergekit_px.recipe.model import ModelInput

UP = "model.layers.0.mlp.up_proj"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CHOICES: dict[str, Any] = {
    "keep_tied": True,
    "attention_output": "once",
    "residual_base": True,
    "component": "unet",
}


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_adapter(folder: str, factors: dict[str, torch.Tensor], **config: Any) -> None:
    Path(folder).mkdir()
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in factors.items()}, f"{folder}/adapter_model.safetensors"
    )
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    Path(folder, "adapter_config.json").write_text(json.dumps(fields))


def write_model(folder: str, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    Path(folder).mkdir()
    save_file(tensors, f"{folder}/model.safetensors")
    Path(folder, "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))


def result(folder: str = "out") -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/model.safetensors")


@pytest.fixture
def attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with an ``nn.MultiheadAttention`` and two LoRAs on it, as PEFT names them."""
    monkeypatch.chdir(tmp_path)
    write_model("vision", {"attn.in_proj_weight": draw(0, 12, 4), "attn.out_proj.weight": draw(1, 4, 4)})
    for seed, name in enumerate(("one", "two")):
        factors = {"attn.lora_A.weight": draw(10 + seed, 2, 4), "attn.lora_B.weight": draw(20 + seed, 12, 2)}
        factors["attn.base_layer.out_proj.lora_A.weight"] = draw(30 + seed, 2, 4)
        factors["attn.base_layer.out_proj.lora_B.weight"] = draw(40 + seed, 4, 2)
        write_adapter(name, factors, target_modules=["attn"])


def attention_change(seed: int) -> dict[str, torch.Tensor]:
    """One addition each; alpha is twice the rank."""
    return {
        "attn.in_proj_weight": 2 * draw(20 + seed, 12, 2) @ draw(10 + seed, 2, 4),
        "attn.out_proj.weight": 2 * draw(40 + seed, 4, 2) @ draw(30 + seed, 2, 4),
    }


def test_a_recipe_and_the_command_line_have_the_librarys_choices() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(BindOptions)}
    assert defaults.keys() == CHOICES.keys()
    of_models = ("model", "adapter", "rename")
    recipe = {name: info.default for name, info in ModelInput.model_fields.items() if name not in of_models}
    assert recipe == defaults
    assert AdapterOptions().bind_options() == BindOptions()
    typed = {name: "once" if name == "attention_output" else value for name, value in CHOICES.items()}
    assert AdapterOptions(**typed).chosen() == CHOICES
    assert AdapterOptions(**typed).bind_options() == BindOptions(**CHOICES)


@pytest.mark.parametrize(("words", "times"), [((), 2), (("--attention-output", "once"), 1)])
def test_how_often_the_output_of_an_attention_is_added(run, attention, words: tuple[str, ...], times: int) -> None:
    outcome = run("adapter", "apply", "vision", "one", *words, "-o", "out")
    assert outcome.code == 0, outcome.stderr
    change = attention_change(0)
    for name, factor in (("attn.in_proj_weight", 1), ("attn.out_proj.weight", times)):
        before = load_file("vision/model.safetensors")[name]
        torch.testing.assert_close(result()[name], before + factor * change[name])
    kept = yaml.safe_load(Path("out/pxmerge.yaml").read_text())["models"]["vision"]
    assert kept.get("attention_output", "as_trained") == ("once" if words else "as_trained")
    lock = json.loads(Path("out/pxmerge.lock.json").read_text())["inputs"]["vision"]
    assert lock["adapter_options"]["attention_output"] == kept.get("attention_output", "as_trained")
    assert run("run", "out/pxmerge.yaml", "-o", "again").code == 0
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


@pytest.mark.parametrize(("words", "times"), [((), 2), (("--attention-output", "once"), 1)])
@pytest.mark.parametrize("base", [(), ("--base", "vision")])
def test_merged_adapters_say_as_much_of_an_attention(
    run, attention, words: tuple[str, ...], times: int, base: tuple[str, ...]
) -> None:
    assert run("adapter", "merge", "one", "two", "--method", "cat", *base, *words, "-o", "both").code == 0
    assert run("adapter", "apply", "vision", "both", "-o", "out").code == 0
    for name, factor in (("attn.in_proj_weight", 1), ("attn.out_proj.weight", times)):
        change = (attention_change(0)[name] + attention_change(1)[name]) / 2
        before = load_file("vision/model.safetensors")[name]
        torch.testing.assert_close(result()[name], before + factor * change)


def test_other_formats_cannot_say_it(run, attention) -> None:
    for to in ("kohya", "diffusers"):
        refused = run("adapter", "convert", "one", "--to", to, "-o", "one.safetensors")
        assert refused.code == 3 and "nn.MultiheadAttention" in refused.stderr
    assert run("adapter", "convert", "one", "--to", "peft", "-o", "same").code == 0
    before, after = (load_file(f"{name}/adapter_model.safetensors") for name in ("one", "same"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def tied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A model whose head is its embedding, and a LoRA on the embedding; returns the embedding's change."""
    monkeypatch.chdir(tmp_path)
    write_model("small", {EMBED: draw(0, 10, 4), f"{UP}.weight": draw(1, 6, 4)}, tie_word_embeddings=True)
    a, b = draw(2, 2, 10), draw(3, 4, 2)
    on_embedding = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    write_adapter("words", on_embedding, target_modules=["embed_tokens"])
    return 2 * (b @ a).T


@pytest.mark.parametrize("command", ["apply", "merge"])
def test_a_tie_is_cut_or_kept(run, tied: torch.Tensor, command: str) -> None:
    line = ("apply", "small", "words") if command == "apply" else ("merge", "words", "--into", "small")
    before = load_file("small/model.safetensors")[EMBED]
    assert run("adapter", *line, "-o", "cut").code == 0
    torch.testing.assert_close(result("cut")[EMBED], before + tied)
    torch.testing.assert_close(result("cut")[HEAD], before)
    assert json.loads(Path("cut/config.json").read_text())["tie_word_embeddings"] is False
    assert run("adapter", *line, "--keep-tied", "-o", "kept").code == 0
    torch.testing.assert_close(result("kept")[EMBED], before + tied)
    assert HEAD not in result("kept")
    assert json.loads(Path("kept/config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("order", [("words", "head"), ("head", "words")])
def test_adapters_on_the_two_ends_of_a_tie_do_not_meet(run, tied: torch.Tensor, order: tuple[str, str]) -> None:
    write_adapter("head", {"lm_head.lora_A.weight": draw(5, 2, 4), "lm_head.lora_B.weight": draw(6, 10, 2)})
    before = load_file("small/model.safetensors")[EMBED]
    assert run("adapter", "apply", "small", *order, "-o", "out").code == 0
    torch.testing.assert_close(result()[EMBED], before + tied)
    torch.testing.assert_close(result()[HEAD], before + 2 * draw(6, 10, 2) @ draw(5, 2, 4))


def test_a_residual_base_is_declared(run, models) -> None:
    write_adapter(
        "pissa",
        {f"{UP}.lora_A.weight": draw(1, 2, 8), f"{UP}.lora_B.weight": draw(2, 12, 2)},
        init_lora_weights="pissa",
    )
    for command in (("apply", "base", "pissa", "-o", "out"), ("merge", "pissa", "pissa", "-o", "both")):
        refused = run("adapter", *command)
        assert refused.code == 3 and "--residual-base" in refused.stderr
        assert run("adapter", *command, "--residual-base").code == 0
    expected = models.weights["base"][f"{UP}.weight"] + 2 * draw(2, 12, 2) @ draw(1, 2, 8)
    torch.testing.assert_close(result()[f"{UP}.weight"], expected)
    assert run("adapter", "inspect", "pissa", "--json").document()["refusal"]
    assert run("adapter", "inspect", "pissa", "--residual-base", "--json").document()["refusal"] is None
    refused = run("adapter", "convert", "pissa", "--to", "kohya", "-o", "pissa.safetensors")
    assert refused.code == 3 and "--residual-base" not in refused.stderr and "let PEFT" in refused.stderr
    refused = run("ties", "--base", "base", "--sources", "pissa", "-o", "ties")
    assert refused.code == 3 and "residual_base" in refused.stderr
    allowed = run(
        "ties", "--base", "base", "--sources", "pissa", "-o", "ties", "--set", "models.pissa.residual_base=true"
    )
    assert allowed.code == 0, allowed.stderr


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file for two parts of a pipeline that share a name, and the two parts."""
    monkeypatch.chdir(tmp_path)
    factors = {}
    for seed, part in enumerate(("text_encoder", "text_encoder_2")):
        write_model(part, {"layers.0.q_proj.weight": draw(seed, 6, 4)})
        factors |= {f"{part}.layers.0.q_proj.lora_A.weight": draw(10 + seed, 2, 4)}
        factors |= {f"{part}.layers.0.q_proj.lora_B.weight": draw(20 + seed, 6, 2)}
    save_file(factors, "style.safetensors")


def test_one_part_of_a_pipeline_is_named(run, pipeline) -> None:
    refused = run("adapter", "apply", "text_encoder", "style.safetensors", "-o", "out")
    assert refused.code == 3 and "--component" in refused.stderr, refused.stderr
    done = run("adapter", "apply", "text_encoder_2", "style.safetensors", "--component", "text_encoder_2", "-o", "out")
    assert done.code == 0 and "left out" in done.stderr
    expected = draw(1, 6, 4) + draw(21, 6, 2) @ draw(11, 2, 4)
    torch.testing.assert_close(result()["layers.0.q_proj.weight"], expected)
    document = run(
        "adapter", "inspect", "style.safetensors", "--base", "text_encoder", "--component", "text_encoder", "--json"
    )
    assert document.document()["changes"] == ["layers.0.q_proj.weight"]
    refused = run("adapter", "apply", "text_encoder", "style.safetensors", "--component", "unet", "-o", "new")
    assert refused.code == 3 and "the file has text_encoder, text_encoder_2" in refused.stderr


def test_two_parts_do_not_become_one_adapter(run, pipeline) -> None:
    refused = run("adapter", "merge", "style.safetensors", "style.safetensors", "--to", "peft", "-o", "both")
    assert refused.code == 3 and "--component" in refused.stderr
    words = ("--component", "text_encoder", "--to", "peft", "-o", "both")
    assert run("adapter", "merge", "style.safetensors", "style.safetensors", *words).code == 0
    assert run("adapter", "apply", "text_encoder", "both", "-o", "out").code == 0
    torch.testing.assert_close(result()["layers.0.q_proj.weight"], draw(0, 6, 4) + draw(20, 6, 2) @ draw(10, 2, 4))


RECIPE = """\
pxmerge: 1
models:
  plain: ./base
  adapted: {model: ./base, adapter: ./one, SAID}
merge: {method: passthrough, sources: [adapted]}
"""


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("keep_tied: 1", "'models.adapted.keep_tied' must be true or false, not 1"),
        ("attention_output: twice", "'models.adapted.attention_output' must be as_trained or once, not 'twice'"),
        ("residual_bse: true", "unknown key 'residual_bse' in 'models.adapted'; did you mean 'residual_base'?"),
        ("component: [unet]", "'models.adapted.component' must be the name of a part of a pipeline"),
        ("component: ' '", "a component cannot be empty"),
    ],
)
def test_a_slip_is_named_at_its_place(run, models, said: str, message: str) -> None:
    Path("recipe.yaml").write_text(RECIPE.replace("SAID", said))
    outcome = run("plan", "recipe.yaml")
    assert (outcome.code, outcome.stderr.count("\n")) == (2, 1)
    assert outcome.stderr.startswith("error: recipe.yaml:4:") and message.split(";")[0] in outcome.stderr, (
        outcome.stderr
    )


def test_a_choice_without_an_adapter_is_refused(run, models) -> None:
    Path("recipe.yaml").write_text(RECIPE.replace(", adapter: ./one, SAID", ", keep_tied: true"))
    outcome = run("plan", "recipe.yaml")
    assert (outcome.code, outcome.stderr.count("\n")) == (2, 1)
    assert "recipe.yaml:4:" in outcome.stderr and "'keep_tied' is about adapters" in outcome.stderr


def test_a_choice_is_kept_when_a_recipe_is_tidied(run, models) -> None:
    said = "keep_tied: true, attention_output: once, residual_base: true, component: unet"
    Path("recipe.yaml").write_text(RECIPE.replace("SAID", said))
    outcome = run("convert", "recipe.yaml")
    assert yaml.safe_load(outcome.stdout)["models"]["adapted"] == {"model": "./base", "adapter": "./one", **CHOICES}


def test_another_choice_is_another_plan(run, attention) -> None:
    words = ("adapter", "apply", "vision", "one", "--dry-run", "--json")
    first, second = (run(*words, *more).document() for more in ((), ("--attention-output", "once")))
    assert first["plan_hash"] != second["plan_hash"]
