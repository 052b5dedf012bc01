"""Adapters next to PEFT, on the same files in the same run.

    python benchmarks/adapters.py apply                      # a rank-16 LoRA over all linear layers of a 1.2 GB model
    python benchmarks/adapters.py apply --size 100MB --repeat 3
    python benchmarks/adapters.py merge                      # eight rank-16 adapters of a 7B shape, by svd
    python benchmarks/adapters.py merge --layers 2 --width 512 --inner 1376

``apply``: `pxmerge adapter apply` and PEFT's from_pretrained, merge_and_unload, save_pretrained, each a process of its
own, timed from start to exit, with its processor time and peak resident memory as the system accounts them. The
fastest of the repeats counts; inputs are in the page cache for both. ``work`` is the time less that of starting Python
and importing what is needed. The two results are compared element by element.

``merge``: `pxmerge adapter merge` as a process, reading and writing included; of PEFT the call of
add_weighted_adapter alone. PEFT decomposes every dW whole, which takes minutes for one of them, so it is measured on
one module of each shape and multiplied; an (in, out) module counts as an (out, in) one. The merged updates of the
measured modules are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PEFT_APPLY = """
import sys, time, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[4]))
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
print(time.perf_counter() - start)
"""

PEFT_MERGE = """
import json, sys, time, torch
from peft import LoraConfig, PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
folders, name, rows, columns, rank, threads, out = json.loads(sys.argv[1])
torch.set_num_threads(threads)
base = torch.nn.Linear(columns, rows, bias=False)
for part in reversed(name.split(".")):
    base = torch.nn.ModuleDict({part: base})
model = PeftModel.from_pretrained(base, folders[0], adapter_name="a0")
for number, folder in enumerate(folders[1:], 1):
    model.load_adapter(folder, f"a{number}")
names = [f"a{number}" for number in range(len(folders))]
start = time.perf_counter()
model.add_weighted_adapter(names, [1 / len(names)] * len(names), "merged", "svd", svd_rank=rank)
print(time.perf_counter() - start)
state = get_peft_model_state_dict(model, adapter_name="merged")
scale = model.peft_config["merged"].lora_alpha / model.peft_config["merged"].r
save_file({name: tensor.contiguous() for name, tensor in state.items()}, out, {"scale": str(scale)})
"""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def measured(command: list[str], threads: int) -> tuple[float, float, float, str]:
    """Seconds, seconds of processor time, peak resident bytes and stdout of a process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            stderr.seek(0)
            sys.exit(f"{command[:4]}: {stderr.read().decode()}")
        stdout.seek(0)
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return seconds, usage.ru_utime + usage.ru_stime, peak, stdout.read().decode()


def write_adapter(folder: Path, shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> None:
    """A LoRA, float32, on the modules of these (out, in) shapes."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / rank**0.5 * 0.1
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_llama(folder: Path, size: int, width: int) -> dict[str, tuple[int, int]]:
    """A bfloat16 llama of about ``size`` bytes; returns the shapes of its linear layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads, inner, vocabulary = max(width // 64, 1), width * 11 // 4, 8192
    layer = 2 * (4 * width * width + 3 * width * inner)
    layers = max(round((size - 4 * vocabulary * width) / layer), 1)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    model.save_pretrained(folder)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in TARGETS
    }


def tensors_of(folder: Path) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def largest_difference(ours: Path, theirs: Path, base: Path) -> float:
    """Of the two results, relative to the largest change that the adapter makes."""
    from safetensors import safe_open

    files = {path: [safe_open(file, framework="pt") for file in path.glob("*.safetensors")] for path in (theirs, base)}
    where = {path: {name: file for file in opened for name in file.keys()} for path, opened in files.items()}  # noqa: SIM118
    apart = change = 0.0
    for name, tensor in tensors_of(ours):
        other, before = (where[path][name].get_tensor(name).float() for path in (theirs, base))
        apart = max(apart, float((tensor.float() - other).abs().max()))
        change = max(change, float((tensor.float() - before).abs().max()))
    return apart / change


def apply(arguments: argparse.Namespace, work: Path) -> None:
    from mergekit_px.checkpoint.layout import parse_size

    threads = arguments.threads
    base, lora = work / "base", work / "lora"
    make = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import adapters, pathlib; "
    make += (
        f"shapes = adapters.write_llama(pathlib.Path({str(base)!r}), {parse_size(arguments.size)}, {arguments.width}); "
    )
    make += f"adapters.write_adapter(pathlib.Path({str(lora)!r}), shapes, {arguments.rank}, 1)"
    measured([sys.executable, "-c", make], threads)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    print(f"a rank-{arguments.rank} LoRA over all linear layers of {size / 1e9:.2f} GB, {threads} threads")
    ours, theirs = work / "ours", work / "theirs"
    ours_command = [sys.executable, "-m", "mergekit_px", "adapter", "apply", str(base), str(lora), "-o", str(ours)]
    commands = {
        "pxmerge": [*ours_command, "--threads", str(threads), "--json"],
        "PEFT": [sys.executable, "-c", PEFT_APPLY, str(base), str(lora), str(theirs), str(threads)],
    }
    if arguments.memory is not None:
        commands["pxmerge"] += ["--memory", arguments.memory]
    best: dict[str, list[float]] = {}
    for _ in range(arguments.repeat):
        for name, command in commands.items():
            shutil.rmtree(ours if name == "pxmerge" else theirs, ignore_errors=True)
            seconds, busy, peak, printed = measured(command, threads)
            own = json.loads(printed)["seconds"] if name == "pxmerge" else float(printed.split()[-1])
            now = [seconds, own, busy, peak]
            before = best.get(name, now)
            best[name] = [*map(min, now[:3], before[:3]), max(peak, before[3])]
    for name, (seconds, own, busy, peak) in best.items():
        print(f"{name:8s} {seconds:7.2f} s   work {own:7.2f} s   processor {busy:7.2f} s   peak {peak / 1e6:6.0f} MB")
    whole, work_alone, processor, _ = (
        theirs / ours for ours, theirs in zip(best["pxmerge"], best["PEFT"], strict=True)
    )
    print(f"{whole:.1f} times faster, {work_alone:.1f} in the work alone, {processor:.1f} in processor time")
    print(f"results apart by {largest_difference(ours, theirs, base):.1e} of the change")


def module_shapes(arguments: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """The modules of a llama by name, with their (out, in) shapes."""
    width, inner = arguments.width, arguments.inner
    shapes = {f"self_attn.{part}_proj": (width, width) for part in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    return {
        f"model.layers.{layer}.{name}": shape for layer in range(arguments.layers) for name, shape in shapes.items()
    }


def merge(arguments: argparse.Namespace, work: Path) -> None:
    threads, rank = arguments.threads, arguments.rank
    shapes = module_shapes(arguments)
    sizes = [tuple(sorted(shape)) for shape in shapes.values()]
    few = {size: next(name for name in shapes if tuple(sorted(shapes[name])) == size) for size in dict.fromkeys(sizes)}
    folders: dict[str, list[str]] = {}
    for part, names in (("all", list(shapes)), *((name, [name]) for name in few.values())):
        folders[part] = [str(work / part / f"a{number}") for number in range(arguments.adapters)]
        for number, folder in enumerate(folders[part]):
            write_adapter(Path(folder), {name: shapes[name] for name in names}, rank, number)
    program = [sys.executable, "-m", "mergekit_px", "adapter", "merge", "--rank", str(rank), "--overwrite", "--quiet"]
    command = [*program, *folders["all"], "-o", str(work / "ours")]
    seconds, _, peak, _ = min(measured(command, threads) for _ in range(arguments.repeat))
    print(f"{arguments.adapters} adapters of rank {rank} on {len(shapes)} modules, {threads} threads")
    print(f"pxmerge  {seconds:9.2f} s   peak {peak / 1e6:8.0f} MB", flush=True)
    theirs = most = apart = 0.0
    for size, name in few.items():
        ours_few, theirs_few = work / f"ours-{name}", work / f"theirs-{name}"
        measured([*program, *folders[name], "-o", str(ours_few)], threads)
        given = json.dumps([folders[name], name, *shapes[name], rank, threads, str(theirs_few)])
        _, _, peak, printed = measured([sys.executable, "-c", PEFT_MERGE, given], threads)
        own, count = float(printed.split()[-1]), sizes.count(size)
        theirs, most = theirs + own * count, max(most, peak)
        print(
            f"PEFT     {own:9.2f} s   for one {shapes[name][0]} x {shapes[name][1]}, of which there are {count}",
            flush=True,
        )
        apart = max(apart, _updates_apart(ours_few, theirs_few))
    print(f"PEFT     {theirs:9.0f} s   peak {most / 1e6:8.0f} MB   for all, multiplied")
    print(f"{theirs / seconds:.0f} times faster; updates apart by {apart:.1e}, relative")


def _updates_apart(merged: Path, theirs: Path) -> float:
    """The largest relative difference of a merged dW."""
    from safetensors import safe_open

    ours = dict(tensors_of(merged))
    config = json.loads((merged / "adapter_config.json").read_text())
    worst = 0.0
    with safe_open(theirs, framework="pt") as opened:
        scale = float(opened.metadata()["scale"])
        for name in (name for name in ours if name.endswith("lora_A.weight")):
            other = name.replace("lora_A", "lora_B")
            mine = config["lora_alpha"] / config["r"] * ours[other].double() @ ours[name].double()
            found = scale * opened.get_tensor(other).double() @ opened.get_tensor(name).double()
            worst = max(worst, float((mine - found).norm() / mine.norm()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name, work in (("apply", apply), ("merge", merge)):
        command = commands.add_parser(name)
        command.set_defaults(work=work)
        command.add_argument("--rank", type=int, default=16)
        command.add_argument("--threads", type=int, default=cores)
        command.add_argument("--repeat", type=int, default=3 if name == "apply" else 1)
        command.add_argument("--folder", type=Path, help="where the files go; a temporary folder if left out")
        if name == "apply":
            command.add_argument("--size", default="1.2GB")
            command.add_argument("--width", type=int, default=2048)
            command.add_argument("--memory", help="given to pxmerge")
        else:
            command.add_argument("--width", type=int, default=4096)
            command.add_argument("--inner", type=int, default=11008)
            command.add_argument("--layers", type=int, default=32)
            command.add_argument("--adapters", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="pxmerge-bench-", dir=arguments.folder))
    try:
        arguments.work(arguments, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
