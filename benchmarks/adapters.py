"""Adapters next to PEFT, on the same files in the same run.

    python benchmarks/adapters.py apply                      # a rank-16 LoRA over all linear layers of a 1.2 GB model
    python benchmarks/adapters.py apply --size 100MB --repeat 3
    python benchmarks/adapters.py merge                      # eight rank-16 adapters of a 7B shape, by svd
    python benchmarks/adapters.py merge --layers 2 --width 512 --peft-layers 2

``apply``: `pxmerge adapter apply` and PEFT's from_pretrained, merge_and_unload, save_pretrained, each a process of its
own, timed from start to exit, with its peak resident memory as the system accounts it. The fastest of the repeats
counts; inputs are in the page cache for both. The two results are compared element by element.

``merge``: `pxmerge adapter merge` as a process, reading and writing included; of PEFT the call of
add_weighted_adapter alone. PEFT decomposes every dW whole, so it may be measured on fewer layers (--peft-layers) and
multiplied; the table says so. The merged updates of the measured layers are compared.
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
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[4]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""

PEFT_MERGE = """
import json, sys, time, torch
from peft import LoraConfig, PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
folders, layers, width, rank, targets, threads, out = json.loads(sys.argv[1])
torch.set_num_threads(threads)
# the base's numbers play no part: one matrix stands for all
shared = torch.nn.Parameter(torch.zeros(width, width), requires_grad=False)
def linear():
    made = torch.nn.Linear(1, 1, bias=False)
    made.weight, made.in_features, made.out_features = shared, width, width
    return made
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        attention = lambda: torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict({t: linear() for t in targets})})
        self.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([attention() for _ in range(layers)])})
model = PeftModel.from_pretrained(Model(), folders[0], adapter_name="a0")
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


def measured(command: list[str], threads: int) -> tuple[float, float, str]:
    """Seconds, peak resident bytes and stdout of a process."""
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
        return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), stdout.read().decode()


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
        "pxmerge": [*ours_command, "--threads", str(threads), "--overwrite", "--quiet"],
        "PEFT": [sys.executable, "-c", PEFT_APPLY, str(base), str(lora), str(theirs), str(threads)],
    }
    if arguments.memory is not None:
        commands["pxmerge"] += ["--memory", arguments.memory]
    best: dict[str, tuple[float, float]] = {}
    for _ in range(arguments.repeat):
        for name, command in commands.items():
            seconds, peak, _ = measured(command, threads)
            before = best.get(name, (seconds, peak))
            best[name] = (min(seconds, before[0]), max(peak, before[1]))
    for name, (seconds, peak) in best.items():
        print(f"{name:8s} {seconds:8.2f} s   peak {peak / 1e6:8.0f} MB")
    ratio = best["PEFT"][0] / best["pxmerge"][0]
    print(f"{ratio:.1f} times faster; results apart by {largest_difference(ours, theirs, base):.1e} of the change")


def merge(arguments: argparse.Namespace, work: Path) -> None:
    threads, rank, width = arguments.threads, arguments.rank, arguments.width
    targets = arguments.targets
    measured_layers = min(arguments.peft_layers, arguments.layers)
    folders: dict[str, list[str]] = {"all": [], "few": []}
    for part, layers in (("all", arguments.layers), ("few", measured_layers)):
        names = [f"model.layers.{n}.self_attn.{target}" for n in range(layers) for target in targets]
        for number in range(arguments.adapters):
            folder = work / part / f"a{number}"
            write_adapter(folder, {name: (width, width) for name in names}, rank, number)
            folders[part].append(str(folder))
    command = [sys.executable, "-m", "mergekit_px", "adapter", "merge", *folders["all"], "--rank", str(rank)]
    command += ["-o", str(work / "ours"), "--overwrite", "--quiet"]
    seconds, peak, _ = min(measured(command, threads) for _ in range(arguments.repeat))
    count = arguments.layers * len(targets)
    print(f"{arguments.adapters} adapters of rank {rank}, {count} modules of {width} x {width}, {threads} threads")
    print(f"pxmerge  {seconds:9.2f} s   peak {peak / 1e6:8.0f} MB")
    few = [*command[:5], *folders["few"], "--rank", str(rank), "-o", str(work / "ours-few"), "--quiet"]
    measured(few, threads)
    given = json.dumps([folders["few"], measured_layers, width, rank, targets, threads, str(work / "theirs")])
    _, peak, printed = measured([sys.executable, "-c", PEFT_MERGE, given], threads)
    own = float(printed.split()[-1])
    theirs = own * arguments.layers / measured_layers
    how = "" if measured_layers == arguments.layers else f"   {own:.2f} s for {measured_layers} layers, multiplied"
    print(f"PEFT     {theirs:9.2f} s   peak {peak / 1e6:8.0f} MB{how}")
    print(f"{theirs / seconds:.1f} times faster; updates apart by {_updates_apart(work):.1e}, relative")


def _updates_apart(work: Path) -> float:
    """The largest relative difference of a merged dW of the measured layers."""
    from safetensors import safe_open

    ours = dict(tensors_of(work / "ours-few"))
    config = json.loads((work / "ours-few" / "adapter_config.json").read_text())
    worst = 0.0
    with safe_open(work / "theirs", framework="pt") as opened:
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
            command.add_argument("--layers", type=int, default=32)
            command.add_argument("--adapters", type=int, default=8)
            command.add_argument("--targets", nargs="+", default=["q_proj", "k_proj", "v_proj", "o_proj"])
            command.add_argument("--peft-layers", type=int, default=1)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="pxmerge-bench-", dir=arguments.folder))
    try:
        arguments.work(arguments, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
