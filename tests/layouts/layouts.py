"""Layouts that people keep models in: each writes one model under a folder and says what it means.

``RIGHT``: name -> (folder, seed) -> (the input of a recipe, its tensors by the names of the result).
``REFUSED``: name -> (function that writes two inputs, what the refusal says).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pipelines import all_tensors, write_pipeline, write_sentence_model
from quantise import awq, bnb4, compressed_integers, floats8, gptq, mxfp4, nvfp4, quantisation
from safetensors.torch import save_file

from mergekit_px.testing.checkpoints import tiny_llama_config, tiny_llama_tensors, write_checkpoint

Tensors = Mapping[str, torch.Tensor]
Request = str | dict[str, Any]

W = "model.layers.0.mlp.up_proj.weight"


def llama(seed: int) -> dict[str, torch.Tensor]:
    return tiny_llama_tensors(seed=seed)


def plain(folder: Path, seed: int, *, shards: int = 1, **files: str) -> tuple[Request, Tensors]:
    write_checkpoint(folder, llama(seed), config=tiny_llama_config(), shards=shards)
    for name, text in files.items():
        (folder / name.replace("_dot_", ".")).write_text(text)
    return str(folder), llama(seed)


def numbered_without_an_index(folder: Path, seed: int) -> tuple[Request, Tensors]:
    plain(folder, seed, shards=3)
    (folder / "model.safetensors.index.json").unlink()
    return str(folder), llama(seed)


def one_file(folder: Path, seed: int) -> tuple[Request, Tensors]:
    folder.mkdir()
    save_file(llama(seed), folder / "any name.safetensors")
    return str(folder / "any name.safetensors"), llama(seed)


def pickled(name: str) -> Callable[[Path, int], tuple[Request, Tensors]]:
    def write(folder: Path, seed: int) -> tuple[Request, Tensors]:
        folder.mkdir()
        torch.save(llama(seed), folder / name)
        (folder / "config.json").write_text(json.dumps(tiny_llama_config()))
        return str(folder), llama(seed)

    return write


def pickled_shards(folder: Path, seed: int) -> tuple[Request, Tensors]:
    folder.mkdir()
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    tensors = llama(seed)
    weight_map = {name: names[place % 2] for place, name in enumerate(tensors)}
    for file in names:
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return str(folder), tensors


def respelled(spelling: Callable[[str], str]) -> Callable[[Path, int], tuple[Request, Tensors]]:
    """The first model plain, the second in another spelling of the names."""

    def write(folder: Path, seed: int) -> tuple[Request, Tensors]:
        spelled = {spelling(name) if seed else name: tensor for name, tensor in llama(seed).items()}
        write_checkpoint(folder, spelled, config=tiny_llama_config())
        return str(folder), llama(seed)

    return write


def renamed_by_hand(folder: Path, seed: int) -> tuple[Request, Tensors]:
    spelled = {f"core.{name}" if seed else name: tensor for name, tensor in llama(seed).items()}
    write_checkpoint(folder, spelled, config=tiny_llama_config())
    return ({"model": str(folder), "rename": {"core.*": "*"}} if seed else str(folder)), llama(seed)


def layer_norms_of_old(folder: Path, seed: int) -> tuple[Request, Tensors]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"encoder.layer.0.LayerNorm.{leaf}": torch.randn(4, generator=generator) for leaf in ("weight", "bias")}
    leaves = {"weight": "gamma", "bias": "beta"} if seed else {}
    stored = {
        f"{name.rpartition('.')[0]}.{leaves.get(name.rpartition('.')[2], name.rpartition('.')[2])}": tensor
        for name, tensor in tensors.items()
    }
    write_checkpoint(folder, stored)
    return str(folder), tensors


def tied_and_stored_twice(folder: Path, seed: int) -> tuple[Request, Tensors]:
    tensors = llama(seed)
    head = tensors.pop("lm_head.weight")
    stored = tensors | ({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} if seed else {})
    write_checkpoint(folder, stored, config=tiny_llama_config() | {"tie_word_embeddings": True})
    assert head.shape == tensors["model.embed_tokens.weight"].shape
    return str(folder), tensors


def permuted_tokens(folder: Path, seed: int) -> tuple[Request, Tensors]:
    tensors = llama(seed)
    rows = tensors["model.embed_tokens.weight"].shape[0]
    order = [*range(rows - 2), rows - 1, rows - 2] if seed else [*range(rows)]
    vocabulary = {f"t{token}": place for place, token in enumerate(order)}
    stored = {
        name: tensor[order] if name in ("model.embed_tokens.weight", "lm_head.weight") else tensor
        for name, tensor in tensors.items()
    }
    write_checkpoint(folder, stored, config=tiny_llama_config())
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary}}))
    return str(folder), tensors


def mixed_dtypes(folder: Path, seed: int) -> tuple[Request, Tensors]:
    dtype = (torch.float64, torch.bfloat16)[seed]
    tensors = {"w": torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).to(dtype), "n": torch.arange(3)}
    write_checkpoint(folder, tensors)
    return str(folder), tensors


def encoded(make: Callable[[np.random.Generator], tuple[Tensors, Any]], name: str = W, config: Any = None) -> Any:
    """``make`` gives the stored tensors by what follows the name, and the values."""

    def write(folder: Path, seed: int) -> tuple[Request, Tensors]:
        stored, values = make(np.random.default_rng(seed))
        kept = {name.removesuffix("weight") + end[1:] if end.startswith("!") else name + end: tensor
                for end, tensor in stored.items()}  # fmt: skip
        write_checkpoint(folder, kept | {"model.norm.weight": torch.ones(4)}, config=config)
        return str(folder), {name: torch.from_numpy(np.asarray(values, dtype=np.float32).copy())}

    return write


def float8(leaf: str, shape: tuple[int, ...], side: int | None = None) -> Any:
    def make(rng: np.random.Generator) -> tuple[Tensors, Any]:
        codes, scales = floats8(rng, (256, 128)), rng.uniform(0.5, 2, shape).astype(np.float32)
        grid = scales if side is None else np.repeat(np.repeat(scales, side, 0), side, 1)
        return {"": codes, f"!{leaf}": torch.from_numpy(np.array(scales))}, codes.float().numpy() * grid

    return encoded(make)


def float4(rng: np.random.Generator) -> tuple[Tensors, Any]:
    codes, scales, whole, values = nvfp4(rng, 8, 32)
    return {"": codes, "!weight_scale": scales, "!weight_scale_2": torch.tensor(whole)}, values


def integers_of_gptq(rng: np.random.Generator) -> tuple[Tensors, Any]:
    return gptq(rng, 32, 64)


def pipeline(folder: Path, seed: int) -> tuple[Request, Tensors]:
    return str(write_pipeline(folder, seed)), all_tensors(folder)


def pipeline_with_variants(folder: Path, seed: int) -> tuple[Request, Tensors]:
    write_pipeline(folder, seed)
    tensors = all_tensors(folder)
    save_file({"out.weight": torch.zeros(2)}, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    save_file({"all": torch.zeros(2)}, folder / "whole_pipeline.safetensors")
    return str(folder), tensors


def component(folder: Path, seed: int, *, picked: bool) -> tuple[Request, Tensors]:
    write_pipeline(folder, seed)
    own = {name.removeprefix("vae/"): each for name, each in all_tensors(folder).items() if name.startswith("vae/")}
    return ({"model": str(folder), "component": "vae"} if picked else str(folder / "vae")), own


def sentences(folder: Path, seed: int, **how: Any) -> tuple[Request, Tensors]:
    write_sentence_model(folder, seed, **how)
    return str(folder), {name.removeprefix("./"): tensor for name, tensor in all_tensors(folder).items()}


def open_clip(folder: Path, seed: int) -> tuple[Request, Tensors]:
    folder.mkdir()
    tensors = {"visual.proj": torch.full((2, 3), float(seed))}
    save_file(tensors, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text("{}")
    return str(folder), tensors


RIGHT: dict[str, Callable[[Path, int], tuple[Request, Tensors]]] = {
    "a folder with one file": plain,
    "shards and their index": lambda folder, seed: plain(folder, seed, shards=3),
    "shards without an index": numbered_without_an_index,
    "a file by itself": one_file,
    "a pickle": pickled("pytorch_model.bin"),
    "a pickle of another name": pickled("weights.pt"),
    "pickled shards": pickled_shards,
    "with code of its own": lambda folder, seed: plain(folder, seed, modeling_x_dot_py="x = 1\n"),
    "saved from torch.compile": respelled(lambda name: f"_orig_mod.{name}"),
    "saved from data parallel training": respelled(lambda name: f"module.{name}"),
    "without the head model's prefix": respelled(lambda name: name.removeprefix("model.")),
    "in a model for pictures and text": respelled(lambda name: name.replace("model.", "model.language_model.", 1)),
    "in an older one": respelled(lambda name: f"language_model.{name}"),
    "renamed by hand": renamed_by_hand,
    "layer norms of TensorFlow": layer_norms_of_old,
    "a tied head, once and twice": tied_and_stored_twice,
    "tokens in another order": permuted_tokens,
    "several dtypes": mixed_dtypes,
    "fp8, a scale for each tensor": float8("weight_scale", ()),
    "fp8, a scale for each channel": float8("weight_scale", (256, 1)),
    "fp8, a scale for each block": float8("weight_scale_inv", (2, 1), 128),
    "fp8 of ComfyUI": float8("scale_weight", (1,)),
    "MXFP4": encoded(lambda rng: mxfp4(rng, 2, 8, 32), "model.layers.0.mlp.experts.gate_up_proj"),
    "NVFP4": encoded(float4),
    "bitsandbytes, 4 bits": encoded(lambda rng: bnb4(rng, (64, 64))),
    "bitsandbytes, 4 bits, nested": encoded(lambda rng: bnb4(rng, (64, 64), nested=True)),
    "GPTQ": encoded(integers_of_gptq, config=quantisation()),
    "GPTQ in the order of activations": encoded(
        lambda rng: gptq(rng, 32, 64, 8, ordered=True), config=quantisation(8, desc_act=True)
    ),
    "GPTQ v2": encoded(lambda rng: gptq(rng, 32, 64, version=2), config=quantisation(checkpoint_format="gptq_v2")),
    "GPTQ without a config": encoded(lambda rng: gptq(rng, 32, 64, symmetric=True)),
    "AWQ": encoded(lambda rng: awq(rng, 32, 64)),
    "packed integers of compressed-tensors": encoded(lambda rng: compressed_integers(rng, 32, 64)),
    "packed integers with zero points": encoded(lambda rng: compressed_integers(rng, 32, 64, symmetric=False)),
    "a pipeline": pipeline,
    "a pipeline with variants": pipeline_with_variants,
    "a component's folder": lambda folder, seed: component(folder, seed, picked=False),
    "a component of a pipeline": lambda folder, seed: component(folder, seed, picked=True),
    "sentence-transformers with a dense layer": sentences,
    "sentence-transformers of old": lambda folder, seed: sentences(folder, seed, transformer="0_Transformer"),
    "OpenCLIP": open_clip,
}


def two(first: Callable[[Path], object], second: Callable[[Path], object] | None = None) -> Any:
    """Two inputs, of which the first is as named, and the second a plain model."""

    def write(folder: Path) -> list[str]:
        first(folder / "one")
        (second or (lambda place: plain(place, 2)))(folder / "other")
        return [str(folder / "one"), str(folder / "other")]

    return write


def holding(**files: bytes) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        folder.mkdir()
        for name, body in files.items():
            (folder / name.replace("_dot_", ".").replace("_dash_", "-")).write_bytes(body)

    return write


def zipped(folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(folder / "model.safetensors", "w") as archive:
        archive.writestr("a", "b")


def without(name: str, *, shards: int = 3, index: bool = True) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        plain(folder, 1, shards=shards)
        (folder / name).unlink()
        if not index:
            (folder / "model.safetensors.index.json").unlink()

    return write


def beside(name: str, body: bytes = b"", *, shards: int = 1) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        plain(folder, 1, shards=shards)
        (folder / name).write_bytes(body or (folder / "model.safetensors").read_bytes())

    return write


def cut_short(folder: Path) -> None:
    plain(folder, 1)
    body = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(body[:-10])


def stored(tensors: Tensors, config: Any = None) -> Callable[[Path], object]:
    return lambda folder: write_checkpoint(folder, tensors, config=config)


def bad_scales(value: float, shape: tuple[int, ...] = ()) -> Callable[[Path], object]:
    scales = torch.full(shape, value)
    return stored({W: torch.ones(4, 4).to(torch.float8_e4m3fn), W.replace("weight", "weight_scale"): scales})


def other_tokens(folder: Path) -> None:
    permuted_tokens(folder, 1)
    text = (folder / "tokenizer.json").read_text().replace('"t7"', '"another"')
    (folder / "tokenizer.json").write_text(text)


def pipeline_without(folder: Path) -> None:
    write_pipeline(folder, 1)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def of(write: Callable[..., object], *given: Any, **how: Any) -> Callable[[Path], object]:
    return lambda folder: write(folder, *given, **how)


SECOND = of(write_pipeline, 2)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
TOKENS = of(permuted_tokens, 0)

REFUSED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "a git-lfs pointer": (two(holding(model_dot_safetensors=LFS)), "git-lfs pointer"),
    "GGUF": (two(holding(model_dot_gguf=b"GGUF" + bytes(60))), "GGUF"),
    "GGUF under another name": (two(holding(model_dot_safetensors=b"GGUF" + bytes(60))), "GGUF"),
    "an archive": (two(zipped), "zip archive"),
    "a web page": (two(holding(model_dot_safetensors=b"<!DOCTYPE html><p>Sign in")), "web page"),
    "an empty file": (two(holding(model_dot_safetensors=b"")), "empty"),
    "Keras": (two(holding(model_dot_h5=b"\x89HDF\r\n\x1a\n" + bytes(9))), "HDF5"),
    "a pickle that is not allowed": (two(holding(pytorch_model_dot_bin=b"\x80\x02")), "pickle"),
    "a pickle under another name": (two(holding(model_dot_safetensors=b"\x80\x02}q\x00.")), "pickle"),
    "a pickled dense layer": (two(of(write_sentence_model, 1, pickled=True)), "pickle"),
    "a shard that the index names": (two(without("model-00002-of-00003.safetensors")), "missing"),
    "a shard by its number": (two(without("model-00003-of-00003.safetensors", index=False)), "missing"),
    "a download that goes on": (two(beside("model.safetensors.aria2", b"x")), "not finished"),
    "a file that was cut short": (two(cut_short), "bytes"),
    "an index and another file": (two(beside("model.safetensors", LFS, shards=2)), "open"),
    "no weights": (two(holding(config_dot_json=b"{}")), "no weights"),
    "scales that are no numbers": (two(bad_scales(float("nan")), bad_scales(1.0)), "scale"),
    "scales of zero": (two(bad_scales(0.0), bad_scales(1.0)), "scale"),
    "scales of another shape": (two(bad_scales(1.0, (3, 2)), bad_scales(1.0)), "scale"),
    "zero points kept in one of two ways": (two(of(encoded(lambda rng: gptq(rng, 32, 64)), 1)), "nothing says which"),
    "bits that the config denies": (
        two(of(encoded(lambda rng: gptq(rng, 32, 64), config=quantisation(8)), 1)),
        "8 bits",
    ),
    "other tokens": (two(other_tokens, TOKENS), "rows of other tokens"),
    "other shapes": (two(stored({"w": torch.ones(2, 3)}), stored({"w": torch.ones(3, 2)})), "shape"),
    "other names": (two(stored({"a": torch.ones(2)}), stored({"b": torch.ones(2)})), "not in"),
    "a pipeline that is not whole": (two(pipeline_without, SECOND), "component vae"),
    "a pipeline with one component less": (two(of(write_pipeline, 1, without="vae"), SECOND), "no component vae"),
    "a component of another class": (two(of(write_pipeline, 1, classes={"vae": "X"}), SECOND), "vae is X"),
    "a pipeline and a model": (two(SECOND), "several folders"),
}
