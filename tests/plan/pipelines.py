"""Models in several folders, tiny: pipelines of diffusers and sentence-transformers models with a dense layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mergekit_px.testing.checkpoints import tiny_llama_config, tiny_llama_tensors, write_checkpoint

COMPONENTS = {
    "unet": ("diffusers", "UNet2DConditionModel", "diffusion_pytorch_model"),
    "vae": ("diffusers", "AutoencoderKL", "diffusion_pytorch_model"),
    "text_encoder": ("transformers", "CLIPTextModel", "model"),
}


def write_pipeline(folder: Path, seed: int, *, without: str = "", classes: Mapping[str, str] | None = None) -> Path:
    """A pipeline of three components with weights, a scheduler and a tokenizer."""
    folder.mkdir(parents=True)
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.38.0"}
    generator = torch.Generator().manual_seed(seed)
    for name, (library, kind, stem) in COMPONENTS.items():
        if name == without:
            continue
        kind = (classes or {}).get(name, kind)
        index[name] = [library, kind]
        (folder / name).mkdir()
        config = {"_class_name": kind} if library == "diffusers" else {"architectures": [kind], "dtype": "float32"}
        (folder / name / "config.json").write_text(json.dumps(config))
        shapes = {"layers.0.weight": (4, 3), "out.weight": (2,)}
        tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        save_file(tensors, folder / name / f"{stem}.safetensors", metadata={"format": "pt"})
    for name, file in (("scheduler", "scheduler_config.json"), ("tokenizer", "vocab.json")):
        index[name] = ["diffusers", "DDIMScheduler"] if name == "scheduler" else ["transformers", "CLIPTokenizer"]
        (folder / name).mkdir()
        (folder / name / file).write_text(json.dumps({"made": seed} if name == "scheduler" else {"a": 0}))
    index["safety_checker"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_sentence_model(folder: Path, seed: int, *, transformer: str = "", pickled: bool = False) -> Path:
    """A Llama with pooling and a dense layer of its own."""
    listed = {"Transformer": transformer, "Pooling": "1_Pooling", "Dense": "2_Dense", "Normalize": "3_Normalize"}
    write_checkpoint(folder / transformer, tiny_llama_tensors(seed=seed), config=tiny_llama_config())
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(listed.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"made": name}))
    dense = {"linear.weight": torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))}
    if pickled:
        torch.save(dense, folder / "2_Dense" / "pytorch_model.bin")
    else:
        save_file(dense, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})
    return folder


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor under a folder, as ``file's folder/name``."""
    return {
        f"{path.parent.relative_to(folder).as_posix()}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
