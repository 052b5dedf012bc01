"""Speed and memory of merging quantised models, next to the same merge of plain ones, in one run.

    python benchmarks/decoding.py                      # three models of 1.2 GB in fp8 blocks, and in bf16; three rounds
    python benchmarks/decoding.py --layers 4 --rounds 1

Makes three Llama-shaped models in fp8 with a float32 scale for each block of 128 x 128, and three in bf16 with as many
bytes. Both linear merges into bf16 are run in turn as whole processes, from the page cache. A byte of fp8 is two of the
result, so seconds are told for each gigabyte that is written too. Everything is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from peers import Run, timed, warm_cache

HIDDEN, INTERMEDIATE, VOCABULARY, SIDE = 2048, 5632, 32000, 128


def make(folder: Path, layers: int, seed: int, *, quantised: bool) -> None:
    """A model of random weights; with ``quantised`` the matrices of its layers are in blocks of fp8."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: int, columns: int) -> torch.Tensor:
        return torch.randn((rows, columns), generator=generator)

    tensors = {name: drawn(VOCABULARY, HIDDEN).mul_(0.02).bfloat16() for name in ("model.embed_tokens", "lm_head")}
    shapes = {f"self_attn.{letter}_proj": (HIDDEN, HIDDEN) for letter in "qkvo"}
    shapes |= {f"mlp.{name}_proj": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
    shapes["mlp.down_proj"] = (HIDDEN, INTERMEDIATE)
    for layer in range(layers):
        for name, (rows, columns) in shapes.items():
            module, values = f"model.layers.{layer}.{name}", drawn(rows, columns)
            if quantised:
                tensors[module] = values.mul_(100).to(torch.float8_e4m3fn)
                scales = torch.rand((rows // SIDE, columns // SIDE), generator=generator).add_(0.5).mul_(2e-4)
                tensors[f"{module}.weight_scale_inv"] = scales
            else:
                tensors[module] = values.mul_(0.02).bfloat16()
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    tensors["model.norm"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    config = {"model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    if quantised:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [SIDE, SIDE]}
    folder.mkdir(parents=True)
    named = {name if "scale" in name else f"{name}.weight": value for name, value in tensors.items()}
    save_file(named, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))


def told(runs: list[Run], written: float) -> str:
    seconds = sorted(run.seconds for run in runs)
    median = statistics.median(seconds)
    peak = max(run.peak for run in runs) / 1e6
    span = f"{median:.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f})"
    return f"{written:.2f} GB written, {span} s, {median / written:.2f} s a GB, peak {peak:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=18, help="of the quantised models; the others have half of them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where the models are made: a memory file system leaves the disk out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        work = Path(name)
        for kind, layers in (("fp8", options.layers), ("bf16", options.layers // 2)):
            for number in range(3):
                # In another process: the peak of one that this one starts is never below its own size.
                arguments = {"layers": layers, "seed": number, "quantised": kind == "fp8"}
                maker = multiprocessing.get_context("spawn").Process(
                    target=make, args=(work / f"{kind}-{number}",), kwargs=arguments
                )
                maker.start()
                maker.join()
        runs: dict[str, list[Run]] = {"fp8": [], "bf16": []}
        written: dict[str, float] = {}
        for turn in range(-1, options.rounds):  # the first hashes the inputs, which later ones need not
            for kind, done in runs.items():
                warm_cache(work)
                output = work / "merged"
                sources = [str(work / f"{kind}-{number}") for number in range(3)]
                command = [sys.executable, "-m", "mergekit_px", "linear", "--sources", *sources]
                command += ["--weights", "0.5", "0.3", "0.2", "--dtype", "bfloat16", "-o", str(output), "-q"]
                run = timed(command, work / "log")
                written[kind] = sum(path.stat().st_size for path in output.glob("*.safetensors")) / 1e9
                shutil.rmtree(output)
                if turn >= 0:
                    done.append(run)
        for kind, done in runs.items():
            print(f"{kind}: {told(done, written[kind])}")
        each = {kind: statistics.median(run.seconds for run in done) / written[kind] for kind, done in runs.items()}
        print(f"fp8 takes {each['fp8'] / each['bf16']:.2f} times as long for a byte of the result")


if __name__ == "__main__":
    main()
