"""A linear merge of three 7B-shaped models from a cold disk, next to the disk's own speed and to mergekit.

    python benchmarks/large.py --work /disk/large                 # 54 GB of disk; fetches mergekit 0.1.5
    python benchmarks/large.py --work /disk/large --layers 4 --peer path/to/venv

Three models of Llama-2-7B's shapes in bfloat16, 13.5 GB each, in shards of 5 GB, of random numbers. Whole processes;
inputs are dropped from the page cache before each. `first` has inputs that were never seen, whose files are hashed;
`later` knows their hashes. The disk: reading what the merge reads and writing what it writes, each past the page cache
with two threads and nothing else. Prints seconds, processor seconds, peak resident memory, bytes moved per
second, and the seconds of the disk alone, reads and writes one after the other, over those of the run.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from peers import drop_from_cache, llama, peer_environment, timed

SHARD = 5_000_000_000
_PIECE = 4 << 20


def make_model(folder: Path, layers: int, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    shapes, config = llama(layers, 4096, 11008, 32)
    folder.mkdir(parents=True)
    # The same numbers again and again: to draw them all would take longer than the benchmark.
    numbers = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(seed)) * 0.02).to(torch.bfloat16)
    shards: list[dict[str, torch.Tensor]] = [{}]
    sizes = [0]
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        if sizes[-1] and sizes[-1] + 2 * count > SHARD:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = numbers.repeat(-(-count // len(numbers)))[:count].reshape(shape)
        sizes[-1] += 2 * count
    places = {}
    while shards:
        number = len(sizes) - len(shards) + 1
        file = f"model-{number:05}-of-{len(sizes):05}.safetensors"
        tensors = shards.pop(0)
        places |= dict.fromkeys(tensors, file)
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def in_threads(files: list[Path], work: str, size: int | None = None) -> float:
    """Bytes per second that two threads read from files, or write into one, past the page cache."""
    pieces = [(file, place) for file in files for place in range(0, size or file.stat().st_size, _PIECE)]
    lock, moved, began = threading.Lock(), [0, 0], time.perf_counter()

    def run(number: int) -> None:
        buffer, opened = memoryview(mmap.mmap(-1, _PIECE)), {}
        while True:
            with lock:
                if not pieces:
                    break
                file, place = pieces.pop(0)
            if file not in opened:
                opened[file] = os.open(file, os.O_DIRECT | (os.O_RDONLY if work == "read" else os.O_WRONLY))
            moved[number] += (
                os.preadv(opened[file], [buffer], place) if work == "read" else os.pwrite(opened[file], buffer, place)
            )
        for descriptor in opened.values():
            os.fdatasync(descriptor)
            os.close(descriptor)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(moved) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder on the disk to be measured")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--method", default="linear")
    parser.add_argument("--peer", type=Path, help="a virtual environment with mergekit")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    models = [options.work / f"model{number}" for number in range(3)]
    for number, folder in enumerate(models):
        if not (folder / "config.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            # In a process of its own: what this one has held counts as its children's peak.
            code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import large, pathlib; "
            code += f"large.make_model(pathlib.Path({str(folder)!r}), {options.layers}, {number})"
            subprocess.run([sys.executable, "-c", code], check=True)
    files = [file for folder in models for file in sorted(folder.glob("*.safetensors"))]
    size = sum(file.stat().st_size for file in files)
    output = options.work / "out"
    work = Path(tempfile.mkdtemp(prefix="pxmerge-large-"))
    try:
        drop_from_cache(options.work)
        read = in_threads(files, "read")
        target = options.work / "written"
        with target.open("wb") as out:
            os.posix_fallocate(out.fileno(), 0, size // 3)
        write = in_threads([target], "write", size // 3)
        target.unlink()
        seconds = size / read, size / 3 / write
        print(f"{size / 1e9:.1f} GB to read: {seconds[0]:.1f} s of the disk alone")
        print(f"{size / 3e9:.1f} GB to write: {seconds[1]:.1f} s\n")
        print("| | s | processor s | MB | GB/s | share of the disk's speed |\n|" + " --- |" * 6, flush=True)
        ours = [sys.executable, "-m", "mergekit_px", options.method, "--sources", *map(str, models), "-q"]
        ours += ["-o", str(output), "--memory", options.memory]
        runs = {"pxmerge, first": ours, "pxmerge, later": ours}
        if not options.no_peer:
            recipe = work / "recipe.yml"
            listed = [{"model": str(folder), "parameters": {"weight": 1.0}} for folder in models]
            recipe.write_text(json.dumps({"merge_method": "linear", "models": listed, "dtype": "bfloat16"}))
            mergekit = str(peer_environment(options.peer, work) / "bin" / "mergekit-yaml")
            runs["mergekit"] = [mergekit, str(recipe), str(output), "--quiet"]
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")  # where hashes are remembered
        for title, command in runs.items():
            shutil.rmtree(output, ignore_errors=True)
            drop_from_cache(options.work)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            run = timed(command, work / "log")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            moved = size * 4 / 3 / run.seconds / 1e9
            print(f"| {title} | {run.seconds:.1f} | {used:.0f} | {run.peak / 1e6:.0f} | {moved:.2f} | "
                  f"{sum(seconds) / run.seconds:.0%} |", flush=True)  # fmt: skip
        shutil.rmtree(output, ignore_errors=True)
        if not options.keep:
            for folder in models:
                shutil.rmtree(folder)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
