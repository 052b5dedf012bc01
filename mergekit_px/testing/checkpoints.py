"""Small checkpoints for tests, written by the ``safetensors`` package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def write_checkpoint(
    directory: Path | str,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint folder as the Hub has them.

    Args:
        directory: made if missing.
        tensors: any shapes and dtypes; written in this order, as equal numbers of tensors per shard.
        dtype: what floating-point tensors are converted to; None leaves them.
        shards: 1 for ``model.safetensors``, more for that many files and ``model.safetensors.index.json``.
        config: written as ``config.json`` if given.
        metadata: of each file's header; ``{"format": "pt"}`` if None.

    Returns:
        The folder.
    """
    from safetensors.torch import save_file

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    converted = {
        name: (tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in tensors.items()
    }
    header = dict(metadata) if metadata is not None else {"format": "pt"}
    if shards == 1:
        files = {"model.safetensors": list(converted)}
    else:
        names = list(converted)
        files = {
            f"model-{shard + 1:05d}-of-{shards:05d}.safetensors": names[
                len(names) * shard // shards : len(names) * (shard + 1) // shards
            ]
            for shard in range(shards)
        }
        weight_map = {name: file for file, chosen in files.items() for name in chosen}
        size = sum(tensor.numel() * tensor.element_size() for tensor in converted.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for file, chosen in files.items():
        save_file({name: converted[name] for name in chosen}, folder / file, header)
        (folder / file).chmod(0o644)  # as a download has it; safetensors writes for the owner alone
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def tiny_llama_config(
    *,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    key_value_heads: int = 2,
    vocabulary: int = 64,
    tied: bool = False,
) -> dict[str, Any]:
    """A ``config.json`` for :func:`tiny_llama_tensors` of the same arguments."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
    }


def tiny_llama_tensors(
    *,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    key_value_heads: int = 2,
    vocabulary: int = 64,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Random weights with the names and shapes of a Llama; norms are ones, the rest has standard deviation 0.02."""
    generator = torch.Generator().manual_seed(seed)
    narrow = hidden // heads * key_value_heads
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (2 * hidden, hidden),
        "mlp.up_proj": (2 * hidden, hidden),
        "mlp.down_proj": (hidden, 2 * hidden),
    }

    def normal(shape: tuple[int, ...]) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(dtype)

    tensors = {"model.embed_tokens.weight": normal((vocabulary, hidden))}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = torch.ones(hidden, dtype=dtype)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = torch.ones(hidden, dtype=dtype)
        for name, shape in matrices.items():
            tensors[f"{prefix}.{name}.weight"] = normal(shape)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    if not tied:
        tensors["lm_head.weight"] = normal((vocabulary, hidden))
    return tensors


def fine_tune(tensors: Mapping[str, torch.Tensor], seed: int, *, size: float = 0.002) -> dict[str, torch.Tensor]:
    """The tensors with normal noise of standard deviation ``size`` added to the floating-point ones."""
    generator = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * size
            tuned[name] = (tensor.double() + noise).to(tensor.dtype)
        else:
            tuned[name] = tensor.clone()
    return tuned
