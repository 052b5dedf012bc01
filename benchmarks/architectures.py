"""No tensor is lost, whatever the architecture: every causal-LM class of the installed transformers, and BERT.

    python benchmarks/architectures.py                  # all classes
    python benchmarks/architectures.py deepseek_v3 bert # some model types

For each class two tiny random models are made, saved by ``save_pretrained``, merged by the command line (linear) and
reloaded. The second is then stored twice more, its names behind a prefix, and its vocabulary in another order with a
tokenizer that says so: both must give the very same merge. The output must have the names,
shapes and dtypes of the inputs; every value must be the exact mean rounded
once; loading must report nothing missing, unexpected or of another shape; and what the reloaded model saves must be
the merged files again, name by name and bit by bit, so that experts stored one by one stay so, and fused ones too.
A class for which no tiny model can be made is listed with the reason, and is no success.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_models import quiet, tiny_model

if TYPE_CHECKING:
    import torch

EXTRA = [("bert", "BertForMaskedLM")]
"""Model types and classes beside the causal language models."""

SHARDS = "40KB"

_ONE_EXPERT = re.compile(r"(.*?)(\d+)\.(.*\.)?experts\.\d+\.")
_FUSED_EXPERTS = re.compile(r"(.*?)(\d+)\.(.*?\.)?(experts|block_sparse_moe|mlp|moe)\.")


@dataclass(frozen=True)
class Outcome:
    """What came of one class: ``ok``, ``FAILED`` or ``not made``."""

    model_type: str
    class_name: str
    verdict: str
    detail: str = ""
    tensors: int = 0


def causal_classes() -> list[tuple[str, str]]:
    """(model type, class name) of all causal language models, and ``EXTRA``."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items(), *EXTRA])


def stored_experts(tensors: Mapping[str, torch.Tensor]) -> str:
    """How a checkpoint stores its experts and in how many of its layers; empty if it has none.

    ``one by one in 3 of 4 layers``, ``fused in 4 of 4 layers``.
    """
    single = [match for name in tensors if (match := _ONE_EXPERT.match(name))]
    fused = [
        match
        for name, value in tensors.items()
        if (match := _FUSED_EXPERTS.match(name)) and value.dim() >= (2 if match[4] == "experts" else 3)
    ]
    found = single or fused
    if not found:
        return ""
    stack = found[0][1]
    layers = {match[1] for name in tensors if (match := re.match(re.escape(stack) + r"(\d+)\.", name))}
    kind = "one by one" if single else "fused"
    return f"experts {kind} in {len({match[2] for match in found})} of {len(layers)} layers"


def check(model_type: str, class_name: str, work: Path) -> Outcome:
    """Make, merge, compare, reload and save one class under an empty folder."""
    try:
        with quiet():
            for seed in (0, 1):
                model = tiny_model(model_type, class_name, seed)
                model.save_pretrained(work / f"model{seed}", max_shard_size=SHARDS)
    except Exception as error:
        reason = " ".join(str(error).split())
        return Outcome(model_type, class_name, "not made", f"{type(error).__name__}: {reason[:200]}")
    problem = _merge(work) or compare_with_mean(work) or _reload(class_name, work) or _stored_otherwise(work)
    tensors = read_tensors(work / "model0")
    if problem:
        return Outcome(model_type, class_name, "FAILED", problem, len(tensors))
    return Outcome(model_type, class_name, "ok", stored_experts(tensors), len(tensors))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, read without pxmerge."""
    from safetensors.torch import load_file

    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def _merge(work: Path, first: str = "model0", second: str = "model1", output: str = "merged") -> str:
    from mergekit_px.cli import main as pxmerge

    sources, told = [str(work / first), str(work / second)], io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
        code = pxmerge(["linear", "--sources", *sources, "-o", str(work / output), "--shard-size", SHARDS, "-q"])
    return f"{output}: exit code {code}: {told.getvalue().strip()[-200:]}" if code else ""


def _stored_otherwise(work: Path) -> str:
    """What is wrong with the merge where the second model has a prefix, or its vocabulary in another order."""
    import torch

    merged = read_tensors(work / "merged")
    second = read_tensors(work / "model1")
    _write(work, "model1", "prefixed", {f"policy.{name}": value for name, value in second.items()})
    if problem := _merge(work, second="prefixed", output="merged-prefixed") or _same(
        merged, read_tensors(work / "merged-prefixed")
    ):
        return f"with a prefix: {problem}"
    first = read_tensors(work / "model0")
    rows = {len(value) for name, value in first.items() if is_vocabulary(name) and value.dim() == 2}
    if len(rows) != 1:
        return ""  # no embedding of tokens, or several vocabularies
    count = rows.pop()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    moved = {name: value[order] if is_vocabulary(name) and len(value) == count else value
             for name, value in second.items()}  # fmt: skip
    _write(work, "model0", "listed", first, range(count))
    _write(work, "model1", "permuted", moved, order.tolist())
    if problem := _merge(work, "listed", "permuted", "merged-permuted") or _same(
        merged, read_tensors(work / "merged-permuted")
    ):
        return f"with a permuted vocabulary: {problem}"
    return ""


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row for each token: from the names of transformers' classes, without pxmerge."""
    parts = name.split(".")
    if any(part.isdecimal() for part in parts):
        return False
    module, leaf = parts[-2] if len(parts) > 1 else "", parts[-1]
    head = module in _HEADS or (len(parts) == 2 and module in _TOP_HEADS)
    if leaf == "bias":
        return head or module == "predictions"
    return leaf == "weight" and (module in _EMBEDDINGS or head)


_HEADS = ("lm_head", "generator_lm_head", "embed_out", "decoder", "output_projection", "lm_loss")
_TOP_HEADS = ("head", "output")
_EMBEDDINGS = (
    *("embed_tokens", "embed_tokens_per_layer", "wte", "word_embeddings", "word_embedding", "embed_in"),
    *("tok_embeddings", "tokens_embed", "embeddings", "embedding", "shared"),
)


def _write(
    work: Path, model: str, name: str, tensors: Mapping[str, torch.Tensor], tokens: Iterable[int] | None = None
) -> None:
    """A model in one file beside the config of another, with a tokenizer whose tokens have these numbers."""
    from safetensors.torch import save_file

    folder = work / name
    folder.mkdir()
    shutil.copy(work / model / "config.json", folder)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    if tokens is not None:
        vocabulary = {f"token{token}": place for place, token in enumerate(tokens)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary}}))


def _same(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    import torch

    different = [name for name in expected.keys() & found.keys() if not torch.equal(expected[name], found[name])]
    return _different_headers(expected, found) or (f"{sorted(different)[:3]} differ" if different else "")


def compare_with_mean(work: Path) -> str:
    """What is wrong with ``merged`` as the mean of ``model0`` and ``model1``; empty if nothing is."""
    import torch

    first, second, merged = (read_tensors(work / name) for name in ("model0", "model1", "merged"))
    if different := _different_headers(first, merged):
        return different
    for name, value in merged.items():
        mean = first[name]
        if mean.is_floating_point():
            mean = ((first[name].double() + second[name].double()) / 2).to(mean.dtype)
        if not torch.equal(mean, value):
            return f"{name} is not the mean of the sources"
    return ""


def _different_headers(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    if lost := sorted(expected.keys() - found.keys()):
        return f"{len(lost)} tensors lost: {lost[:3]}"
    if new := sorted(found.keys() - expected.keys()):
        return f"{len(new)} new tensors: {new[:3]}"
    for name, value in found.items():
        if (value.shape, value.dtype) != (expected[name].shape, expected[name].dtype):
            return f"{name} changed from {list(expected[name].shape)} {expected[name].dtype}"
    return ""


def _reload(class_name: str, work: Path) -> str:
    """Load the result and save it again, beside the same with an input.

    Some classes report keys of their own whatever is loaded, or save a tensor otherwise than they loaded it.
    """
    import torch
    import transformers

    reports: dict[str, Any] = {}
    with quiet():
        model_class = getattr(transformers, class_name)
        for name in ("model0", "merged"):
            model, reports[name] = model_class.from_pretrained(work / name, dtype="auto", output_loading_info=True)
            model.save_pretrained(work / f"{name}-again", max_shard_size=SHARDS)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        reference, found = (set(map(str, reports[name].get(key) or [])) for name in ("model0", "merged"))
        if found - reference:
            return f"{key}: {sorted(found - reference)[:3]}"
    first, first_again, merged, again = (
        read_tensors(work / name) for name in ("model0", "model0-again", "merged", "merged-again")
    )
    if different := _different_headers(first_again, again):
        return f"saved again: {different}"
    for name in merged.keys() & again.keys():
        if torch.equal(first[name], first_again[name]) and not torch.equal(merged[name], again[name]):
            return f"{name} is another when loaded and saved again"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all causal language models if left out")
    options = parser.parse_args()
    outcomes = []
    for model_type, class_name in causal_classes():
        if options.types and model_type not in options.types:
            continue
        work = Path(tempfile.mkdtemp(prefix="pxmerge-architecture-"))
        try:
            outcome = check(model_type, class_name, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            gc.collect()
        outcomes.append(outcome)
        print(
            f"{outcome.verdict:9} {model_type:25} {class_name:36} {outcome.tensors or '':>5} {outcome.detail}",
            flush=True,
        )
    for verdict in ("ok", "FAILED", "not made"):
        print(f"{verdict}: {sum(outcome.verdict == verdict for outcome in outcomes)}")
    if any(outcome.verdict == "FAILED" for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
