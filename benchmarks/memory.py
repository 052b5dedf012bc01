"""Peak memory does not follow the model: budgets on one huge tensor, and models of growing size.

    python benchmarks/memory.py                  # a 10^9-element tensor, every method that can be cut, --memory 600MB
    python benchmarks/memory.py --elements 3e8 --budget 450MB --methods ties slerp
    python benchmarks/memory.py --growth         # 1, 2 and 4 GB models with one method

Makes bf16 checkpoints whose files are mostly holes, so that they cost little disk, with blocks of random numbers in
them; the outputs are written in full. Reports the peak resident memory of whole processes as the system accounts it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mergekit_px.checkpoint.dtypes import parse_dtype
from mergekit_px.checkpoint.header import build_header
from mergekit_px.checkpoint.layout import parse_size
from mergekit_px.methods import load_methods

BLOCK = 4 << 20


def sparse_checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """bf16 tensors: a block of random numbers at every 64th block of the file, zeros elsewhere."""
    import numpy

    folder.mkdir(parents=True, exist_ok=True)
    raw, header = build_header([(name, parse_dtype("BF16"), shape) for name, shape in shapes.items()], {"format": "pt"})
    size = header.data_start + sum(2 * math.prod(shape) for shape in shapes.values())
    random = numpy.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(raw)
        file.truncate(size)
        for start in range(len(raw) + (-len(raw)) % 2, size - 2 * BLOCK, 64 * BLOCK):
            values = random.standard_normal(BLOCK, dtype=numpy.float32).view(numpy.uint32) >> 16
            file.seek(start + (header.data_start - start) % 2)
            file.write(values.astype(numpy.uint16).tobytes())
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))


def peak_of(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident bytes of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        assert process.stderr is not None
        sys.exit(f"{' '.join(command)}: {process.stderr.read().decode()}")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def command(method: str, work: Path, sources: int, budget: str | None) -> list[str]:
    found = load_methods()[method]
    most = found.sources[1] or sources
    line = [sys.executable, "-m", "mergekit_px", method.replace("_", "-"), "--sources"]
    line += [str(work / f"source{n}") for n in range(min(sources, most))]
    if found.space == "deltas":
        line += ["--base", str(work / "base")]
    if method == "combine":
        line += ["--weights", *(["0.5", "0.3", "0.2"][:sources])]
    if budget is not None:
        line += ["--memory", budget]
    return [*line, "-o", str(work / "out"), "-q", "--no-hash-inputs", "--overwrite"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=float, default=1e9)
    parser.add_argument("--budget", default="600MB")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="pxmerge-memory-", dir=options.work))
    try:
        (grow if options.growth else budgets)(work, options)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def budgets(work: Path, options: argparse.Namespace) -> None:
    columns = 4096
    shapes = {"model.embed_tokens.weight": (round(options.elements) // columns + 1, columns)}
    for number, name in enumerate(("base", "source0", "source1", "source2")):
        sparse_checkpoint(work / name, shapes, number)
    chosen = options.methods or [
        name for name, method in load_methods().items() if method.access in ("elementwise", "two_pass", "rows")
    ]
    print(f"one tensor of {math.prod(next(iter(shapes.values()))):,} elements, 3 sources, --memory {options.budget}\n")
    print("| method | peak MB | within the budget | s |\n| --- | --- | --- | --- |")
    failed = False
    for method in chosen:
        seconds, peak = peak_of(command(method, work, 3, options.budget))
        within = peak <= parse_size(options.budget)
        failed |= not within
        print(f"| {method} | {peak / 1e6:.0f} | {'yes' if within else 'NO'} | {seconds:.0f} |", flush=True)
    if failed:
        sys.exit(1)


def grow(work: Path, options: argparse.Namespace) -> None:
    print("| model GB | method | peak MB | s |\n| --- | --- | --- | --- |")
    for gigabytes in (1, 2, 4):
        layers = gigabytes * 10
        shapes = {f"model.layers.{n}.mlp.up_proj.weight": (12207, 4096) for n in range(layers)}
        for number, name in enumerate(("base", "source0", "source1", "source2")):
            sparse_checkpoint(work / name, shapes, number)
        for method in options.methods or ["linear", "ties"]:
            seconds, peak = peak_of(command(method, work, 3, None))
            print(f"| {gigabytes} | {method} | {peak / 1e6:.0f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
