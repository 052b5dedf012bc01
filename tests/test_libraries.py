"""What diffusers and sentence-transformers save merges as a whole, loads there again, and computes what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_px.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries say of one another is no concern here

TEXT = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}


def merge(folder: Path, *words: str) -> Path:
    out = folder / "out"
    assert main(["linear", "--sources", str(folder / "a"), str(folder / "b"), "-o", str(out), "-q", *words]) == 0
    return out


def check_mean(merged: torch.nn.Module, one: torch.nn.Module, other: torch.nn.Module) -> None:
    a, b, c = (model.state_dict() for model in (one, other, merged))
    assert a.keys() == c.keys()
    assert any(not torch.equal(a[name], b[name]) for name in a)
    for name, tensor in c.items():
        expected = (a[name] + b[name]) / 2 if tensor.is_floating_point() else a[name]
        torch.testing.assert_close(tensor, expected)


def pipeline(seed: int, folder: Path) -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    channels = {"block_out_channels": (4, 8), "norm_num_groups": 2}
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        **channels,
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        **channels,
    )
    encoder = CLIPTextModel(CLIPTextConfig(**TEXT, bos_token_id=0, eos_token_id=2, pad_token_id=1))
    vocabulary = folder / "vocab.json"
    tokens = ["<|startoftext|>", "!", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", *(f"{x}</w>" for x in "abcdefgh")]
    vocabulary.write_text(json.dumps({token: place for place, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(vocabulary), str(folder / "merges.txt"), model_max_length=77)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
    )


@pytest.mark.parametrize("words", [(), ("--shard-size", "20KB")])
def test_a_pipeline_of_diffusers_draws_with_the_mean_of_all_its_weights(tmp_path: Path, words: tuple[str, ...]) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipes = [pipeline(seed, tmp_path) for seed in range(2)]
    for name, pipe in zip("ab", pipes, strict=True):
        pipe.save_pretrained(tmp_path / name)
    merged = diffusers.StableDiffusionPipeline.from_pretrained(merge(tmp_path, *words), local_files_only=True)
    for name in ("unet", "vae", "text_encoder"):
        check_mean(*(getattr(pipe, name) for pipe in (merged, *pipes)))
        getattr(pipes[0], name).load_state_dict(getattr(merged, name).state_dict())
    drawn = []
    for pipe in (merged, pipes[0]):
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        images = pipe("a b", height=16, width=16, num_inference_steps=1, generator=noise, output_type="np").images
        drawn.append(torch.from_numpy(images))
    assert torch.equal(*drawn) and drawn[0].std() > 0


def test_a_component_of_diffusers_is_loaded_as_one(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipes = [pipeline(seed, tmp_path) for seed in range(2)]
    for name, pipe in zip("ab", pipes, strict=True):
        pipe.save_pretrained(tmp_path / name)
    models = {name: {"model": str(tmp_path / name), "component": "vae"} for name in "ab"}
    recipe = {"models": models, "merge": {"method": "linear", "sources": ["a", "b"]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"), "-q"]) == 0
    check_mean(diffusers.AutoencoderKL.from_pretrained(tmp_path / "out"), *(pipe.vae for pipe in pipes))


def sentence_model(seed: int) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    def build(folder: Path) -> Any:
        torch.manual_seed(seed)
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two"]))
        start = folder / f"start{seed}"
        BertModel(BertConfig(**TEXT)).save_pretrained(start)
        BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(start)
        body = Transformer(str(start))
        dense = Dense(in_features=32, out_features=8)
        return SentenceTransformer(modules=[body, Pooling(32), dense, Normalize()], device="cpu")

    return build


def test_a_sentence_transformer_with_a_dense_layer_embeds_with_the_mean(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    models = [sentence_model(seed)(tmp_path) for seed in range(2)]
    for name, model in zip("ab", models, strict=True):
        model.save(str(tmp_path / name))
    merged = library.SentenceTransformer(str(merge(tmp_path, "--dtype", "float32")), device="cpu")
    check_mean(merged, *models)
    models[0].load_state_dict(merged.state_dict())
    found, expected = (model.encode(["one two", "two"], convert_to_tensor=True) for model in (merged, models[0]))
    assert found.shape == (2, 8)
    torch.testing.assert_close(found, expected)
