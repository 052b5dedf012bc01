"""Memory and time of building a mixture of experts, next to copying as many bytes.

    python benchmarks/experts.py --work /tmp/experts                  # eight models of 1.2 GB, 10 GB of inputs
    python benchmarks/experts.py --work /dev/shm/experts --layers 2   # without the disk

Makes dense bf16 models with Llama's shapes in the work folder, if they are not there yet, and then in turn builds a
Mixtral of them (`pxmerge moe build`, whole process) and copies as many bytes of the same inputs (`cp`, then `sync` of
the copies). Inputs are dropped from the page cache before each, or read into it with `--cache warm`. Prints seconds of
both, their ratio, and the peak resident memory of the build. On a disk it needs room for the inputs and the mixture.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from peers import drop_from_cache, llama, timed, warm_cache


def make_model(folder: Path, layers: int, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    shapes, config = llama(layers)
    # The same numbers again and again: to draw them all would take longer than the benchmark.
    numbers = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed)) * 0.02).to(torch.bfloat16)
    tensors = {}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        tensors[name] = numbers.repeat(-(-size // len(numbers)))[:size].reshape(shape)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def copy_command(files: list[Path], size: int, target: Path) -> list[str]:
    """Copies the first bytes of several files, so many in all, and syncs the copies."""
    lines = []
    for number, file in enumerate(files):
        part = min(size, file.stat().st_size)
        size -= part
        if part:
            copy = target / f"{number}.safetensors"
            lines.append(f"head -c {part} {file} > {copy}" if part < file.stat().st_size else f"cp {file} {copy}")
    assert size == 0, "the mixture is larger than its inputs"
    return ["sh", "-ec", "; ".join([f"mkdir {target}", *lines, f"sync {target}/*"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder outside of the repository")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--layers", type=int, default=9, help="9 layers make 1.2 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", choices=["warm", "cold"], default="cold")
    parser.add_argument("--memory", default="500MB")
    parser.add_argument("--no-hash-inputs", action="store_true", help="of the build: read what is copied alone")
    options = parser.parse_args()
    models = options.work / "models"
    for number in range(options.models):
        if not (models / f"{number}/config.json").exists():
            shutil.rmtree(models / f"{number}", ignore_errors=True)
            # In a process of its own: what this one has held counts as its children's peak.
            code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import experts, pathlib; "
            code += f"experts.make_model(pathlib.Path({str(models / f'{number}')!r}), {options.layers}, {number})"
            subprocess.run([sys.executable, "-c", code], check=True)
    names = [f"m{number}" for number in range(options.models)]
    recipe = {
        "models": {name: str(models / name[1:]) for name in names},
        "merge": {
            "method": "passthrough",
            "sources": names[:1],
            "mixture": {"experts": names, "router": "random", "experts_per_token": 2},
        },
    }
    (options.work / "recipe.yaml").write_text(json.dumps(recipe))
    mixture, copies, log = options.work / "mixture", options.work / "copies", options.work / "log"
    command = [sys.executable, "-m", "mergekit_px", "moe", "build", str(options.work / "recipe.yaml"), "--json"]
    command += [
        "-o",
        str(mixture),
        "--memory",
        options.memory,
        *(["--no-hash-inputs"] if options.no_hash_inputs else []),
    ]
    files = sorted(models.rglob("*.safetensors"))
    ratios, peaks = [], []
    for _ in range(options.rounds):
        shutil.rmtree(mixture, ignore_errors=True)
        (drop_from_cache if options.cache == "cold" else warm_cache)(models)
        log.unlink(missing_ok=True)
        built = timed(command, log)
        after_the_plan = json.loads("{" + log.read_text().partition("\n{")[2])["seconds"]
        size = sum(file.stat().st_size for file in mixture.glob("*.safetensors"))
        shutil.rmtree(mixture)
        (drop_from_cache if options.cache == "cold" else warm_cache)(models)
        copied = timed(copy_command(files, size, copies), log)
        shutil.rmtree(copies)
        ratios.append(built.seconds / copied.seconds)
        peaks.append(built.peak)
        print(
            f"{size / 1e9:.2f} GB: built in {built.seconds:.1f} s, {after_the_plan:.1f} s of it after the plan,"
            f" with a peak of {built.peak / 1e6:.0f} MB,"
            f" copied in {copied.seconds:.1f} s, ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.2f}, largest peak {max(peaks) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
