"""LoRA fine-tunes as what task vectors are taken from: the same as the models that they make, nothing merged first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from mergekit_px.cli import main

from .conftest import learned, mixed, save_arrays


@pytest.fixture
def adapters(family: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """In the current folder a base, two LoRAs of it, one with a whole module beside, and the models that they make."""
    kind, folder = family
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "base", "base")
    for which in (1, 2):
        torch.manual_seed(which)
        model = transformers.AutoModelForCausalLM.from_pretrained("base")
        whole = {"modules_to_save": ["norm"]} if which == 2 else {}
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **whole)
        tuned = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, one in tuned.named_parameters():
                if "modules_to_save" in name:
                    one.add_(0.1)
        tuned.save_pretrained(f"lora{which}")
        learned("adapter", "apply", "base", f"lora{which}", "-o", f"model{which}")
    save_arrays("data.npz", mixed(kind, 60, 7))
    return kind


pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

LLAMA = pytest.mark.parametrize("family", ["llama"], indirect=True)


@LLAMA
@pytest.mark.parametrize("more", [[], ["--stream"]])
def test_coefficients_of_adapters_are_those_of_their_models(adapters: str, more: list[str]) -> None:
    reports = []
    for name in ("lora", "model"):
        learned("ofasd", "--base", "base", "--sources", f"{name}1", f"{name}2", "--data", "data.npz",
                "-o", f"of-{name}", "--steps", "10", "--evaluate-every", "5", "--controls", "cheap", *more)  # fmt: skip
        reports.append(json.loads(Path(f"of-{name}/report.json").read_text()))
    for block, values in reports[0]["coefficients"].items():
        assert values == pytest.approx(reports[1]["coefficients"][block], abs=1e-4), block
    for name in ("lora", "model"):
        learned("run", f"of-{name}/recipe.yaml", "-o", f"merged-{name}")
    first, second = (load_file(f"merged-{name}/model.safetensors") for name in ("lora", "model"))
    assert all(torch.allclose(one, second[key], atol=1e-4) for key, one in first.items())
    assert any("adapter_model" in file for file in reports[0]["inputs"]["sources"][0]["files"])


@LLAMA
def test_an_adapter_on_the_hub_is_a_source(adapters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from hub_server import FakeHub, point_client_at

    huggingface_hub.close_session()
    with FakeHub() as hub:
        point_client_at(hub, tmp_path / "home", monkeypatch)
        hub.add("org/lora", {one.name: one.read_bytes() for one in Path("lora1").iterdir() if one.is_file()})
        reports = []
        for place in ("lora1", "org/lora"):
            learned("ofasd", "--base", "base", "--sources", place, "--data", "data.npz", "--steps", "2", "--controls",
                    "none", "-o", f"out-{len(reports)}")  # fmt: skip
            reports.append(json.loads(Path(f"out-{len(reports)}/report.json").read_text()))
        huggingface_hub.close_session()
    assert reports[1]["sources"] == ["org/lora"] and reports[0]["coefficients"] == reports[1]["coefficients"]


@LLAMA
def test_an_adapter_is_aligned_as_the_model_that_it_makes(adapters: str) -> None:
    reports = []
    for name in ("lora", "model"):
        learned("align", "--source-base", "base", "--source-model", f"{name}1", "--base", "model2", "--data",
                "data.npz", "-o", f"al-{name}", "--steps", "4", "--controls", "cheap")  # fmt: skip
        reports.append(json.loads(Path(f"al-{name}/report.json").read_text()))
    assert reports[0]["test"] == pytest.approx(reports[1]["test"], abs=1.0)
    assert set(reports[0]["test"]) == {"zero-shot", "naive", "aligned"}
    first, second = (load_file(f"al-{name}/task_vector/model.safetensors") for name in ("lora", "model"))
    assert all(torch.allclose(one.float(), second[key].float(), atol=1e-4) for key, one in first.items())


@LLAMA
def test_narrow_keys_and_values_are_turned_and_what_stays_is_named(adapters: str) -> None:
    learned("align", "--source-base", "base", "--source-model", "model1", "--base", "model2",
            "--data", "data.npz", "-o", "out", "--steps", "2", "--controls", "none")  # fmt: skip
    report = json.loads(Path("out/report.json").read_text())
    assert report["rotations"]["matrices"] == 2 * (1 + 2 + 2 + 1)  # q and o from one side, k and v from both
    assert {name.split(".")[-2] for name in report["rotations"]["stay"]} == {
        "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"
    }  # fmt: skip
    assert set(report["test"]) == {"aligned"} and set(report["not_scored"]) > {"naive", "sham"}


@LLAMA
def test_an_adapter_of_another_base_is_refused(adapters: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2))
    other.save_pretrained("gpt")
    words = ["ofasd", "--base", "gpt", "--sources", "lora1", "--data", "data.npz", "-o", "out"]
    assert main(words) != 0
    assert "lora1" in capsys.readouterr().err.splitlines()[-1] and not Path("out").exists()
