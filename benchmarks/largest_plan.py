"""How long a plan takes, and how much memory, for a mixture of experts of 671 billion parameters in fp8.

    python benchmarks/largest_plan.py                      # 61 layers of 256 experts, two models, linear
    python benchmarks/largest_plan.py --layers 16 --method ties

The checkpoints have true headers, scales beside every fp8 matrix, and files that are holes: they take a few megabytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mergekit_px.checkpoint.dtypes import parse_dtype
from mergekit_px.checkpoint.header import build_header

HIDDEN, EXPERT, DENSE, HEADS, VOCABULARY = 7168, 2048, 18432, 128, 129280
BLOCK = 128
SHARD = 4_300_000_000

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def tensors(layers: int, experts: int) -> Shapes:
    """Name -> type and shape, as in the checkpoint of DeepSeek-V3."""
    found: Shapes = {"model.embed_tokens.weight": ("BF16", (VOCABULARY, HIDDEN))}

    def matrix(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"] = ("F8_E4M3", (rows, columns))
        found[f"{name}.weight_scale_inv"] = ("F32", (math.ceil(rows / BLOCK), math.ceil(columns / BLOCK)))

    def mlp(name: str, width: int) -> None:
        matrix(f"{name}.gate_proj", width, HIDDEN)
        matrix(f"{name}.up_proj", width, HIDDEN)
        matrix(f"{name}.down_proj", HIDDEN, width)

    for layer in range(layers):
        home = f"model.layers.{layer}"
        matrix(f"{home}.self_attn.q_a_proj", 1536, HIDDEN)
        matrix(f"{home}.self_attn.q_b_proj", HEADS * 192, 1536)
        matrix(f"{home}.self_attn.kv_a_proj_with_mqa", 576, HIDDEN)
        matrix(f"{home}.self_attn.kv_b_proj", HEADS * 256, 512)
        matrix(f"{home}.self_attn.o_proj", HIDDEN, HEADS * 128)
        for norm, width in (("self_attn.q_a_layernorm", 1536), ("self_attn.kv_a_layernorm", 512)):
            found[f"{home}.{norm}.weight"] = ("BF16", (width,))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{home}.{norm}.weight"] = ("BF16", (HIDDEN,))
        if layer < 3:
            mlp(f"{home}.mlp", DENSE)
            continue
        found[f"{home}.mlp.gate.weight"] = ("BF16", (experts, HIDDEN))
        found[f"{home}.mlp.gate.e_score_correction_bias"] = ("F32", (experts,))
        for expert in range(experts):
            mlp(f"{home}.mlp.experts.{expert}", EXPERT)
        mlp(f"{home}.mlp.shared_experts", EXPERT)
    found["model.norm.weight"] = ("BF16", (HIDDEN,))
    found["lm_head.weight"] = ("BF16", (VOCABULARY, HIDDEN))
    return found


def write(folder: Path, shapes: Shapes) -> None:
    folder.mkdir(parents=True)
    groups: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in shapes.items():
        nbytes = math.prod(shape) * parse_dtype(dtype).bits // 8
        if filled + nbytes > SHARD:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):06d}.safetensors"
        described = [(name, parse_dtype(shapes[name][0]), shapes[name][1]) for name in group]
        raw, header = build_header(described, {"format": "pt"})
        with (folder / file).open("wb") as out:
            out.write(raw)
            out.truncate(header.data_start + header.data_size)
        weight_map.update(dict.fromkeys(group, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    config = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 61}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--method", default="linear")
    parser.add_argument("--workers", default="1,8,64", help="among how many its work is shared out")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    options = parser.parse_args()
    shapes = tensors(options.layers, options.experts)
    count = sum(math.prod(shape) for name, (_, shape) in shapes.items() if not name.endswith("scale_inv"))
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        home = Path(temporary)
        for name in ("base", "one", "two"):
            write(home / name, shapes)
        models = {name: str(home / name) for name in ("base", "one", "two")}
        step = {"method": options.method, "base": "base", "sources": ["one", "two"]}
        (home / "recipe.yaml").write_text(json.dumps({"models": models, "merge": step}))
        command = [sys.executable, "-m", "mergekit_px", "plan", str(home / "recipe.yaml"), "--json"]
        command += ["-o", str(home / "out"), "-q", "--workers", options.workers]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            sys.exit(f"{' '.join(command)} failed")
        report = json.loads(said)
        print(f"{count / 1e9:.0f} billion parameters, {len(shapes):,} tensors in each of 3 models")
        busy = usage.ru_utime + usage.ru_stime
        print(f"plan: {seconds:.1f} s, {busy:.1f} s of a processor, {usage.ru_maxrss / 1e3:.0f} MB")
        print(f"      {report['tensors']['output']:,} output tensors in {len(report['output']['shards'])} files")
        for row in report["schedules"]:
            moved = f"{row['bytes_read'] / 1e9:.0f} GB read, {row['bytes_written'] / 1e9:.0f} GB written by the busiest"
            print(f"{row['workers']:7} workers: {moved}, {row['seconds']:.0f} s at least, balance {row['balance']:.0%}")


if __name__ == "__main__":
    main()
