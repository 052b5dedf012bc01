"""Windows over the checkpoints of one run: one pass of ``pxmerge average`` against one ``pxmerge linear`` for each.

    python benchmarks/average.py                                  # 20 checkpoints of 0.2 GB, 5 windows of 12
    python benchmarks/average.py --checkpoints 10 --window 6 --stride 1 --gigabytes 0.1

Makes bfloat16 checkpoints of random numbers in a temporary folder, which is removed at the end. Reports seconds,
processor seconds, peak resident memory and the bytes of tensors that were read. The first pass also hashes its inputs;
what is compared are later ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH = 2048


def make_run(folder: Path, checkpoints: int, gigabytes: float) -> list[Path]:
    layers = max(1, round(gigabytes * 1e9 / (2 * WIDTH * WIDTH)))
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(1, checkpoints + 1):
        path = folder / f"checkpoint-{100 * number}"
        path.mkdir(parents=True)
        tensors = {
            f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(WIDTH, WIDTH, generator=generator).bfloat16()
            for layer in range(layers)
        }
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        made.append(path)
    return made


def run(*words: object) -> tuple[float, float, float, dict]:
    """Seconds, processor seconds, peak bytes and the report of a command."""
    command = [sys.executable, "-m", "mergekit_px", *map(str, words), "--json", "--quiet"]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{' '.join(command)} failed")
        seconds = time.perf_counter() - start
        out.seek(0)
        report = json.loads(out.read())
    peak = report.get("peak_memory") or max(each["peak_memory"] for each in report["outputs"].values())
    return seconds, usage.ru_utime + usage.ru_stime, peak, report


def told(name: str, seconds: float, busy: float, peak: float, models: float, more: str = "") -> None:
    print(f"{name:8} {seconds:6.1f} s, {busy:5.1f} s of work, peak {peak / 1e6:.0f} MB, {models:.1f} models{more}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--gigabytes", type=float, default=0.2, help="of each checkpoint")
    parser.add_argument("--window", type=int, default=12)
    parser.add_argument("--stride", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        home = Path(temporary)
        made = make_run(home / "run", options.checkpoints, options.gigabytes)
        size = (made[0] / "model.safetensors").stat().st_size
        starts = range(0, len(made) - options.window + 1, options.stride)
        print(f"{len(made)} checkpoints of {size / 1e9:.2f} GB, {len(starts)} windows of {options.window}")
        words = ("--window", options.window, "--stride", options.stride, "-o", home / "windows")
        seconds, busy, peak, report = run("average", home / "run", *words)
        told("first", seconds, busy, peak, report["bytes_read"] / size, ", inputs hashed")
        seconds, busy, peak, report = run("average", home / "run", *words, "--overwrite")
        before = seconds - report["seconds"]
        told("average", seconds, busy, peak, report["bytes_read"] / size, f", {before:.1f} s before the first byte")
        total, work, read, highest = 0.0, 0.0, 0, 0.0
        for number, start in enumerate(starts):
            sources = made[start : start + options.window]
            one, processors, peak, each = run("linear", "--sources", *sources, "-o", home / f"linear-{number}")
            total, work = total + one, work + processors
            read, highest = read + each["bytes_read"], max(peak, highest)
        told("linear", total, work, highest, read / size)
        print(f"average is {total / seconds:.1f} times as fast, with {work / busy:.1f} times less work")


if __name__ == "__main__":
    main()
