"""Spectral merges of whole checkpoints: seconds and peak memory, next to dense computations on the same deltas.

    python benchmarks/spectral_merges.py                      # three fine-tunes and a base of 1.2 GB each
    python benchmarks/spectral_merges.py --methods svd iso_cts wudi
    python benchmarks/spectral_merges.py --dense all          # decompose every matrix densely, not one of each shape
    python benchmarks/spectral_merges.py --layers 1 --keep

Makes a Llama-shaped bf16 base and three fine-tunes under ``--work``. The update of each matrix is 32 components of
falling size plus white noise of the same energy: 0.0015 standard deviation in all on weights of 0.02, of which
rounding to bfloat16 keeps all but 3 percent. pxmerge runs as a whole process. The dense way is what a straightforward
implementation does, in a process of its own with torch's default threads: for TSV-M ``torch.linalg.svd`` of each delta
and of both stacks of singular vectors, for Iso-C of the sum of the deltas, for Iso-CTS of the sum, of what it leaves of
each delta and of both stacks, for svd (64 components) of each delta; for WUDI its 300 steps of Adam, each with the
gradient by torch of one loss for each source, of which three are timed. Embeddings, heads and vectors are averaged in
all. It is timed on one matrix of each shape and kind, and multiplied by their numbers, unless ``--dense all``.
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
from collections import defaultdict
from pathlib import Path

import peers

SOURCES = ("fine0", "fine1", "fine2")
COMPONENTS = 64
OPTIONS = {"svd": ["--top-k", str(COMPONENTS)]}


def make_fine_tunes(work: Path, layers: int) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    peers.make_checkpoints(work, layers)
    base = load_file(work / "base" / "model.safetensors")
    for seed, name in enumerate(SOURCES):
        generator = torch.Generator().manual_seed(seed + 10)
        tensors = {}
        for key, value in base.items():
            update = torch.randn(value.shape, generator=generator)
            if value.ndim == 2:
                left = torch.randn(value.shape[0], 32, generator=generator)
                right = torch.randn(32, value.shape[1], generator=generator)
                strength = torch.linspace(2, 0.5, 32)
                update += (left * strength / strength.norm()) @ right
            tensors[key] = (value.float() + update.mul_(0.0015 / 2**0.5)).bfloat16()
        save_file(tensors, work / name / "model.safetensors", metadata={"format": "pt"})


def dense(method: str, work: Path, everything: bool) -> None:
    """Prints the seconds of each part of a dense merge as JSON; in a process of its own."""
    import torch
    from safetensors import safe_open

    files = [safe_open(str(work / name / "model.safetensors"), "pt") for name in ("base", *SOURCES)]
    counts: dict[tuple[int, ...], int] = defaultdict(int)
    seconds: dict[tuple[int, ...], float] = defaultdict(float)
    timed: dict[tuple[int, ...], int] = defaultdict(int)
    for key in sorted(files[0].keys()):
        shape = tuple(files[0].get_slice(key).get_shape())
        if len(shape) != 2 or "layers" not in key:
            continue
        counts[shape] += 1
        if timed[shape] and not everything:
            continue
        start = time.perf_counter()
        base = files[0].get_tensor(key).float()
        deltas = [file.get_tensor(key).float() - base for file in files[1:]]
        merged, left_out = DENSE[method](deltas)
        (base + merged).to(torch.bfloat16)
        seconds[shape] += time.perf_counter() - start + left_out
        timed[shape] += 1
    total = sum(seconds[shape] / timed[shape] * count for shape, count in counts.items())
    parts = {"x".join(map(str, shape)): seconds[shape] / timed[shape] for shape in counts}
    print(json.dumps({"total": total, "each": parts, "counts": sum(counts.values()), "timed": sum(timed.values())}))


def dense_tsv_m(deltas):  # type: ignore[no-untyped-def]
    import torch

    count = min(deltas[0].shape) // len(deltas)
    us, values, vs = [], [], []
    for delta in deltas:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        us.append(u[:, :count])
        values.append(s[:count])
        vs.append(vh[:count])
    return (dense_polar(torch.cat(us, dim=1)) * torch.cat(values)) @ dense_polar(torch.cat(vs)), 0.0


def dense_iso_c(deltas):  # type: ignore[no-untyped-def]
    import torch

    u, s, vh = torch.linalg.svd(sum(deltas), full_matrices=False)
    return s.mean() * (u @ vh), 0.0


def dense_iso_cts(deltas):  # type: ignore[no-untyped-def]
    import torch

    rank = min(deltas[0].shape)
    own = round((rank - int(rank * 0.8)) / len(deltas))
    u, s, vh = torch.linalg.svd(sum(deltas), full_matrices=False)
    count = rank - own * len(deltas)
    us, values, vs = [u[:, :count]], [s[:count]], [vh[:count]]
    for delta in deltas:
        u, s, vh = torch.linalg.svd(delta - us[0] @ (us[0].T @ delta), full_matrices=False)
        us.append(u[:, :own])
        values.append(s[:own])
        vs.append(vh[:own])
    return torch.cat(values).mean() * dense_polar(torch.cat(us, dim=1)) @ dense_polar(torch.cat(vs)), 0.0


def dense_svd(deltas):  # type: ignore[no-untyped-def]
    import torch

    us, values, vs = zip(*(torch.linalg.svd(delta, full_matrices=False) for delta in deltas), strict=True)
    kept = torch.cat(values).topk(COMPONENTS).indices
    return (torch.cat(us, dim=1)[:, kept] * torch.cat(values)[kept]) @ torch.cat(vs)[kept], 0.0


def dense_wudi(deltas):  # type: ignore[no-untyped-def]
    import torch

    merged = torch.nn.Parameter(sum(deltas))
    optimiser = torch.optim.Adam([merged], lr=1e-5)
    timed = 3
    start = time.perf_counter()
    for _ in range(timed):
        optimiser.zero_grad()
        sum(((merged - delta) @ delta.T).square().sum() / delta.square().sum() for delta in deltas).backward()
        optimiser.step()
    return merged.detach(), (time.perf_counter() - start) * (300 - timed) / timed


def dense_polar(stack):  # type: ignore[no-untyped-def]
    import torch

    u, _, vh = torch.linalg.svd(stack, full_matrices=False)
    return u @ vh


DENSE = {"iso_c": dense_iso_c, "tsv_m": dense_tsv_m, "svd": dense_svd, "iso_cts": dense_iso_cts, "wudi": dense_wudi}
"""A merged delta, and the seconds of what was left out of its computation."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=DENSE, default=["iso_c", "tsv_m"])
    parser.add_argument("--layers", type=int, default=9, help="9 layers make 1.2 GB")
    parser.add_argument("--dense", choices=["one", "all", "no"], default="one", help="matrices timed densely")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "pxmerge-spectral")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--part", choices=["make", *DENSE], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "make":
        make_fine_tunes(options.work, options.layers)
        return
    if options.part:
        dense(options.part, options.work, options.dense == "all")
        return
    options.work.mkdir(parents=True, exist_ok=True)
    script = [sys.executable, __file__, "--work", str(options.work), "--layers", str(options.layers)]
    if not (options.work / SOURCES[-1] / "model.safetensors").exists():
        subprocess.run([*script, "--part", "make"], check=True)
    out = options.work / "out"
    rows: list[dict[str, object]] = []
    for method in options.methods:
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "mergekit_px", method.replace("_", "-"), "--base", str(options.work / "base")]
        command += ["--sources", *(str(options.work / name) for name in SOURCES), "-o", str(out), "-q"]
        command += OPTIONS.get(method, [])
        peers.warm_cache(options.work)
        ours = peers.timed(command, options.work / "log")
        row: dict[str, object] = {"method": method, "pxmerge s": f"{ours.seconds:.1f}"}
        row["pxmerge peak MB"] = f"{ours.peak / 1e6:.0f}"
        if options.dense != "no":
            line = [*script, "--part", method, "--dense", options.dense]
            plain = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
            print(method, plain, file=sys.stderr, flush=True)
            row["dense s"] = f"{plain['total']:.0f} ({plain['timed']} of {plain['counts']} matrices timed)"
            row["faster"] = f"{plain['total'] / ours.seconds:.1f}x"
        rows.append(row)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"\n{options.layers} layers, {cores} cores, whole process of pxmerge\n")
    peers.print_table(rows)
    if not options.keep:
        shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
