"""No tensor is lost, whatever the architecture: every causal-LM class of the installed transformers.

    python benchmarks/architectures.py                  # all classes
    python benchmarks/architectures.py deepseek_v3 bert # some model types

For each class two tiny random models are made, saved, merged by the command line (linear), and reloaded. The output
must have the input's names, shapes and dtypes, and loading it must report nothing missing, unexpected or of another
shape. A class for which no tiny model can be made or saved is listed with the reason, and is no success.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXTRA = {"bert": "BertForMaskedLM"}
"""Model types beside the causal language models, and the class to use."""

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "embed_dim": 32,
    "embedding_size": 32,
    "embedding_dim": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "n_inner": 48,
    "ffn_hidden_size": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "encoder_layers": 2,
    "decoder_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "sliding_window": 16,
    "state_size": 8,
    "time_step_rank": 4,
    "conv_kernel": 4,
    "conv_L_cache": 3,
    "lru_width": 32,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "chunk_size": 8,
    "rank_ratio": 1,
}
"""Sizes for a tiny model; a config takes those of its own fields."""

LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "no_rope_layers", "attn_layers")
MOST_PARAMETERS = 6_000_000


@dataclass(frozen=True)
class Outcome:
    model_type: str
    verdict: str
    detail: str = ""
    tensors: int = 0


def causal_classes() -> dict[str, str]:
    """model type -> class name, for all causal language models, and EXTRA."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = {kind: name for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if isinstance(name, str)}
    return dict(sorted({**found, **EXTRA}.items()))


def tiny_config(model_type: str) -> Any:
    """The type's default config with every known size made small."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    fields = default.to_dict()
    changes = {
        key: value for key, value in SMALL.items() if isinstance(fields.get(key), int | type(None)) and key in fields
    }
    for key in LAYER_LISTS:
        if isinstance(fields.get(key), list) and len(fields[key]) >= 4:
            changes[key] = _kinds(fields[key])
    changes["tie_word_embeddings"] = fields.get("tie_word_embeddings", False)
    if "text_config" in fields and isinstance(fields["text_config"], dict):
        return default
    for extra in ({}, {key: None for key in LAYER_LISTS if key in fields and key not in changes}):
        with contextlib.suppress(Exception):
            return config_class(**{**changes, **extra})
    return config_class(**changes)


def _kinds(layers: list[Any]) -> list[Any]:
    """Four layers that show every kind that a longer list has."""
    kinds = list(dict.fromkeys(map(str, layers)))
    by_name = {str(layer): layer for layer in layers}
    return [by_name[kinds[min(place, len(kinds) - 1)]] for place in range(4)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def check(model_type: str, class_name: str, work: Path) -> Outcome:
    """Make, merge, compare and reload one type."""
    import torch
    import transformers

    from mergekit_px.checkpoint.open import open_checkpoint
    from mergekit_px.cli import main as pxmerge

    try:
        with quiet():
            config = tiny_config(model_type)
            model_class = getattr(transformers, class_name)
            with torch.device("meta"):
                parameters = sum(value.numel() for value in model_class(config).parameters())
            if parameters > MOST_PARAMETERS:
                return Outcome(model_type, "not made", f"{parameters:,} parameters when made small")
            for seed in (0, 1):
                torch.manual_seed(seed)
                model_class(config).to(torch.bfloat16).save_pretrained(work / f"model{seed}", max_shard_size="200KB")
    except Exception as error:
        return Outcome(model_type, "not made", f"{type(error).__name__}: {' '.join(str(error).split())[:90]}")
    sources = [str(work / "model0"), str(work / "model1")]
    with quiet():
        code = pxmerge(["linear", "--sources", *sources, "-o", str(work / "merged"), "-q"])
    if code:
        return Outcome(model_type, "FAILED", f"exit code {code}")
    before, after = open_checkpoint(work / "model0").tensors, open_checkpoint(work / "merged").tensors
    if {n: (t.shape, t.dtype) for n, t in before.items()} != {n: (t.shape, t.dtype) for n, t in after.items()}:
        return Outcome(model_type, "FAILED", "names, shapes or dtypes differ")
    with quiet():
        _, report = model_class.from_pretrained(work / "merged", output_loading_info=True)
        _, reference = model_class.from_pretrained(work / "model0", output_loading_info=True)
    # Some classes report a key of their own even for what save_pretrained wrote.
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if set(map(str, report.get(key) or [])) - set(map(str, reference.get(key) or [])):
            return Outcome(model_type, "FAILED", f"{key}: {sorted(map(str, report[key]))[:3]}")
    return Outcome(model_type, "ok", tensors=len(after))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all causal language models if left out")
    options = parser.parse_args()
    classes = causal_classes()
    chosen = options.types or list(classes)
    outcomes = []
    for model_type in chosen:
        work = Path(tempfile.mkdtemp(prefix="pxmerge-architecture-"))
        try:
            outcome = check(model_type, classes[model_type], work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            gc.collect()
        outcomes.append(outcome)
        print(f"{outcome.verdict:9} {model_type:28} {outcome.tensors or '':>5} {outcome.detail}", flush=True)
    for verdict in ("ok", "FAILED", "not made"):
        print(f"{verdict}: {sum(outcome.verdict == verdict for outcome in outcomes)}")
    if any(outcome.verdict == "FAILED" for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
