"""One prepared check of the CUDA path: equal results, overlap, memory, and speed next to the CPU and the link.

    python benchmarks/gpu.py --work /tmp/gpu --json gpu.json       # on a machine with a GPU; under eight minutes
    python benchmarks/gpu.py --rehearse                            # the same on the CPU in place of a GPU, small

Prints what it does on stderr and one JSON document on stdout (or in ``--json``). Steps are done in the order of their
worth and stop at ``--seconds``; what was left out is listed. Exit status 1 where a method's results differ by more
than its tolerance.

- ``methods``: every method on a small model, on the GPU and on the CPU: the largest difference, relative to the
  largest value, and whether the stored bits are equal.
- ``link``: bytes per second from pinned memory to the device and back, and both at once.
- ``merges``: linear, TIES, TSV-M, SVD, Iso-C and WUDI as whole processes on 1.2 GB models, on GPU and CPU: seconds,
  stages, and of the GPU's run the share of what the link can move.
- ``overlap``: the same linear merge with one worker and with several.
- ``memory``: a tensor that does not fit the device: the run must end with a message, not with a traceback.
- ``devices``: the same bits from each device, where there are several.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peers

MERGES = {
    "linear": ["linear", "--weights", "0.5", "0.3", "0.2"],
    "ties": ["ties", "--base", "base", "--density", "0.5"],
    "tsv_m": ["tsv-m", "--base", "base"],
    "svd": ["svd", "--base", "base", "--top-k", "64"],
    "iso_c": ["iso-c", "--base", "base"],
    "wudi": ["wudi", "--base", "base"],
}
TOLERANCE = 2e-5
"""Of float32 results relative to the largest value; decompositions of both kinds of hardware differ by less."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def methods(device: str) -> Iterator[dict[str, Any]]:
    """Every method that merges plain models, on the device and on the CPU."""
    import torch

    from mergekit_px import merge_state_dicts
    from mergekit_px.errors import PxmergeError
    from mergekit_px.methods import load_methods

    generator = torch.Generator().manual_seed(0)
    shapes = {"model.layers.0.mlp.up_proj.weight": (96, 64), "model.layers.0.norm.weight": (64,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    models = [
        {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        for _ in range(3)
    ]
    for name, method in sorted(load_methods().items()):
        if method.companions is not None:
            continue
        least, most = method.sources
        sources = models[: max(least, min(3, most or 3))]

        def merged(on: str, name: str = name, sources: Any = sources, deltas: bool = method.space == "deltas") -> Any:
            weights = [1 / len(sources)] * len(sources) if name == "combine" else None
            return merge_state_dicts(sources, name, base=base if deltas else None, weights=weights, device=on)

        try:
            expected, found = merged("cpu"), merged(device)
        except PxmergeError as error:  # a method that wants more than models
            yield {"method": name, "skipped": str(error)}
            continue
        except Exception as error:
            yield {"method": name, "error": f"{type(error).__name__}: {error}"}
            continue
        difference = max(
            float((found[key] - value).abs().max() / value.abs().max().clamp_min(1e-30))
            for key, value in expected.items()
        )
        equal = all(torch.equal(found[key], value) for key, value in expected.items())
        yield {"method": name, "difference": difference, "equal bits": equal, "ok": difference <= TOLERANCE}


def link(device: str, megabytes: int) -> dict[str, float]:
    """Bytes per second between pinned memory and the device."""
    import torch

    pinned = torch.cuda.is_available()
    host = torch.empty(megabytes << 20, dtype=torch.uint8, pin_memory=pinned)
    back = torch.empty_like(host, pin_memory=pinned)
    there = torch.empty_like(host, device=device)
    other = torch.empty_like(there)
    streams = [torch.cuda.Stream() for _ in range(2)] if pinned else []

    def timed(*copies: tuple[torch.Tensor, torch.Tensor]) -> float:
        best = 0.0
        for _ in range(5):
            if pinned:
                torch.cuda.synchronize()
            began = time.perf_counter()
            for number, (target, source) in enumerate(copies):
                with torch.cuda.stream(streams[number] if pinned else None):
                    target.copy_(source, non_blocking=True)
            if pinned:
                torch.cuda.synchronize()
            best = max(best, len(copies) * host.numel() / (time.perf_counter() - began))
        return best

    return {
        "to the device": timed((there, host)),
        "from the device": timed((back, there)),
        "both at once": timed((there, host), (back, other)),
    }


def merge(name: str, work: Path, device: str, *more: str, timeout: float) -> dict[str, Any]:
    """One merge as a whole process, and where its time went."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    words = [str(work / word) if word == "base" else word for word in MERGES[name]]
    sources = [str(work / f"fine{number}") for number in range(3)]
    command = [sys.executable, "-m", "mergekit_px", words[0], "--sources", *sources, *words[1:], "-o", str(out)]
    command += ["--device", device, "--profile", "--json", "--no-hash-inputs", *more]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"merge": name, "device": device, "error": f"not done in {timeout:.0f} s"}
    found: dict[str, Any] = {"merge": name, "device": device, "process s": time.perf_counter() - began}
    if done.returncode:
        return found | {"exit status": done.returncode, "error": done.stderr.strip().splitlines()[-1:]}
    document = json.loads(done.stdout)
    found |= {key: document[key] for key in ("seconds", "bytes_read", "bytes_written", "peak_memory")}
    found["sha256"] = document["files"]["model.safetensors"]
    lines = [line.split() for line in done.stderr.splitlines()]
    found["stages"] = {line[0]: float(line[1]) for line in lines if len(line) > 2 and line[2].endswith("%")}
    shutil.rmtree(out, ignore_errors=True)
    return found


def out_of_memory(work: Path, device: str, timeout: float) -> dict[str, Any]:
    """A whole-tensor method while almost all of the device is taken by another process."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(0, free - (64 << 20)), dtype=torch.uint8, device=device)
    try:
        found = merge("tsv_m", work, device, timeout=timeout)
    finally:
        del held
        torch.cuda.empty_cache()
    found["ok"] = "exit status" not in found or (found["exit status"] == 5 and "error:" in str(found["error"]))
    return found


def steps(options: argparse.Namespace, device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is checked, in the order of its worth."""
    import torch

    left = options.left
    work = options.work
    several = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield "methods", lambda: list(methods(device))
    yield "link", lambda: link(device, 8 if options.rehearse else 256)
    yield "models", lambda: peers.make_checkpoints(work, options.layers)
    for name in MERGES:
        for where in (device, "cpu"):
            yield f"{name} on {where}", lambda name=name, where=where: merge(name, work, where, timeout=left())
    for threads in (1, 2, 4):
        more = ("--threads", str(threads))
        yield f"linear by {threads}", lambda more=more: merge("linear", work, device, *more, timeout=left())
    if several:
        yield "out of memory", lambda: out_of_memory(work, device, left())
    for number in range(1, several):
        yield f"linear on cuda:{number}", lambda n=number: merge("linear", work, f"cuda:{n}", timeout=left())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "pxmerge-gpu")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--seconds", type=float, default=450)
    parser.add_argument("--layers", type=int, default=9, help="9 layers make 1.2 GB")
    parser.add_argument("--rehearse", action="store_true", help="use the CPU in place of a GPU")
    options = parser.parse_args()
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --rehearse does the same on the CPU")
    device = "cpu" if options.rehearse else "cuda"
    end = time.monotonic() + options.seconds
    options.left = lambda: max(5.0, end - time.monotonic())
    options.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "device": device if options.rehearse else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "left out": [],
    }
    try:
        for name, step in steps(options, device):
            if time.monotonic() > end:
                results["left out"].append(name)
                continue
            began = time.monotonic()
            results[name] = step()
            say(f"{name}: {time.monotonic() - began:.1f} s")
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
        text = json.dumps(results, indent=2)
        print(text) if options.json is None else options.json.write_text(text + "\n")
    differing = [row for row in results.get("methods", []) if "error" in row or not row.get("ok", True)]
    same = {row["sha256"] for name, row in results.items() if name.startswith("linear") and "sha256" in row}
    if differing or len(same) > 1:
        sys.exit(f"not equal: {[row['method'] for row in differing] or 'linear'}")


if __name__ == "__main__":
    main()
