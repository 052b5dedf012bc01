"""Speed and memory of pxmerge and mergekit on the same merges, in one run.

    python benchmarks/peers.py                         # makes the checkpoints, runs everything, prints a table
    python benchmarks/peers.py --methods linear --rounds 3 --cache warm
    python benchmarks/peers.py --peer path/to/venv     # an environment that has mergekit 0.1.5 (else it is made)

Makes a Llama-shaped bf16 base and three fine-tunes (about 1.2 GB each) under ``--work``, runs the two tools in
turn as whole processes, and reports wall seconds and peak resident memory as medians with their range, and the
ratio of medians. ``cold`` drops the inputs from the page cache before every run. Everything is removed at the end
unless ``--keep`` is given. Needs about 8 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

PEER = ["torch==2.13.0", "mergekit==0.1.5"]

RECIPES = {
    "linear": {"merge_method": "linear", "models": [("fine0", 0.5), ("fine1", 0.3), ("fine2", 0.2)]},
    "slerp": {"merge_method": "slerp", "models": [("fine0", None), ("fine1", None)], "base_model": "fine0", "t": 0.4},
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "models": [("fine0", 0.5), ("fine1", 0.3), ("fine2", 0.2)],
        "base_model": "base",
    },
    "ties": {
        "merge_method": "ties",
        "models": [("fine0", 0.5), ("fine1", 0.3), ("fine2", 0.2)],
        "base_model": "base",
        "density": 0.5,
    },
}


@dataclass(frozen=True)
class Run:
    seconds: float
    peak: float


def llama(
    layers: int, hidden: int = 2048, intermediate: int = 5632, heads: int = 16
) -> tuple[dict[str, tuple[int, ...]], dict[str, object]]:
    """The shapes of a Llama's tensors, and its config; 9 layers make 1.2 GB."""
    vocabulary = 32000
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (hidden, hidden)
        shapes[f"{prefix}mlp.gate_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, intermediate)
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return shapes, config


def make_checkpoints(work: Path, layers: int) -> None:
    """A base and three fine-tunes with Llama's names and shapes, seeded."""
    import torch
    from safetensors.torch import save_file

    shapes, config = llama(layers)

    def noise(seed: int, scale: float) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(shape, generator=generator) * scale for name, shape in shapes.items()}

    base = {name: value.bfloat16() for name, value in noise(0, 0.02).items()}
    for model in ("base", "fine0", "fine1", "fine2"):
        folder = work / model
        folder.mkdir(parents=True, exist_ok=True)
        tensors = base
        if model != "base":
            drift = noise(1 + int(model[-1]), 0.002)
            tensors = {name: (base[name].float() + drift[name]).bfloat16() for name in base}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_recipe(path: Path, name: str, work: Path) -> None:
    """The same YAML for both tools: mergekit's dialect, computing in float32 and storing bfloat16."""
    asked = RECIPES[name]
    lines = [f"merge_method: {asked['merge_method']}"]
    if "base_model" in asked:
        lines.append(f"base_model: {work / asked['base_model']}")
    lines.append("models:")
    for model, weight in asked["models"]:
        lines.append(f"  - model: {work / model}")
        if weight is not None:
            lines += ["    parameters:", f"      weight: {weight}"]
            if "density" in asked:
                lines.append(f"      density: {asked['density']}")
    if "t" in asked:
        lines += ["parameters:", f"  t: {asked['t']}"]
    lines += ["dtype: float32", "out_dtype: bfloat16"]
    path.write_text("\n".join(lines) + "\n")


def timed(command: list[str], log: Path) -> Run:
    """One whole process: wall seconds and peak resident bytes."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with {process.returncode}:\n{log.read_text()[-2000:]}")
    return Run(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def drop_from_cache(work: Path) -> None:
    for path in work.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def warm_cache(work: Path) -> None:
    buffer = bytearray(8 << 20)
    for path in sorted(work.rglob("model.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def peer_environment(given: Path | None, work: Path) -> Path:
    if given is not None:
        return given
    home = work / "peer"
    venv.create(home, with_pip=True)
    subprocess.run([home / "bin" / "pip", "install", "-q", *PEER], check=True)
    return home


def compare(method: str, cache: str, rounds: int, work: Path, peer: Path | None) -> dict[str, object]:
    recipe = work / f"{method}.yml"
    write_recipe(recipe, method, work)
    ours, theirs = work / "out-pxmerge", work / "out-mergekit"
    commands = {
        "pxmerge": [sys.executable, "-m", "mergekit_px", "run", str(recipe), "-o", str(ours), "-q"],
        "mergekit": [str(peer / "bin" / "mergekit-yaml"), str(recipe), str(theirs), "--quiet"] if peer else [],
    }
    runs: dict[str, list[Run]] = {"pxmerge": [], "mergekit": []}
    for number in range(rounds + 1):
        for tool, command in commands.items():
            if not command:
                continue
            for folder in (ours, theirs):
                shutil.rmtree(folder, ignore_errors=True)
            (drop_from_cache if cache == "cold" else warm_cache)(work)
            run = timed(command, work / f"{tool}.log")
            # The first round warms code and disk up.
            if number or rounds == 0:
                runs[tool].append(run)
    for folder in (ours, theirs):
        shutil.rmtree(folder, ignore_errors=True)
    row: dict[str, object] = {"method": method, "cache": cache}
    for tool, found in runs.items():
        if not found:
            continue
        seconds = sorted(run.seconds for run in found)
        row[f"{tool} s"] = f"{statistics.median(seconds):.1f} ({seconds[0]:.1f}-{seconds[-1]:.1f})"
        row[f"{tool} MB"] = f"{max(run.peak for run in found) / 1e6:.0f}"
    if runs["mergekit"]:
        medians = [statistics.median(run.seconds for run in runs[tool]) for tool in ("mergekit", "pxmerge")]
        peaks = [max(run.peak for run in runs[tool]) for tool in ("mergekit", "pxmerge")]
        row["faster"] = f"{medians[0] / medians[1]:.1f}x"
        row["smaller"] = f"{peaks[0] / peaks[1]:.1f}x"
    return row


def print_table(rows: list[dict[str, object]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--cache", nargs="+", choices=["warm", "cold"], default=["warm", "cold"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=9, help="9 layers make 1.2 GB")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "pxmerge-peers")
    parser.add_argument("--peer", type=Path, help="a virtual environment with mergekit")
    parser.add_argument("--no-peer", action="store_true", help="run pxmerge alone")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "fine2" / "config.json").exists():
        # In a process of its own: its memory must not count as ours.
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import peers, pathlib; "
        code += f"peers.make_checkpoints(pathlib.Path({str(options.work)!r}), {options.layers})"
        subprocess.run([sys.executable, "-c", code], check=True)
    peer = None if options.no_peer else peer_environment(options.peer, options.work)
    rows = []
    for cache in options.cache:
        for method in options.methods:
            rows.append(compare(method, cache, options.rounds, options.work, peer))
            print(rows[-1], file=sys.stderr, flush=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"\n{cores} cores, {options.rounds} rounds, medians (range); memory is the largest peak\n")
    print_table(rows)
    if not options.keep:
        shutil.rmtree(options.work)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
