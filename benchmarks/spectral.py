"""Spectral kernels and merges against dense decompositions, on the same input in the same run.

    python benchmarks/spectral.py                             # the 64 leading components, two shapes, two spectra
    python benchmarks/spectral.py thin                        # exact thin decompositions
    python benchmarks/spectral.py merge --shapes 2048x5632    # TSV-M and Iso-C of one matrix of three sources
    python benchmarks/spectral.py --threads 1                 # on a machine that others use too

Times are processor seconds of this process divided by its threads, so that other programs on the machine disturb
them less. ``decay`` has singular values i^-0.5; ``noise`` is white noise with 16 components of 1.5 to 4 times its
edge, whose tail is flat. The dense merges are what a straightforward implementation does: ``torch.linalg.svd`` of each
delta, of each stack of singular vectors, of the sum.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor

from mergekit_px.kernels.svd import truncated_svd
from mergekit_px.methods import find_method
from mergekit_px.methods.declare import Operands

SIGNALS = 16


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    basis: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]
    return basis


def make(spectrum: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if spectrum == "decay":
        rank = min(rows, columns)
        values = torch.arange(1, rank + 1, dtype=torch.float64).pow(-0.5).float()
        return (orthonormal(rows, rank, generator) * values) @ orthonormal(columns, rank, generator).T
    edge = math.sqrt(rows) + math.sqrt(columns)
    left, right = orthonormal(rows, SIGNALS, generator), orthonormal(columns, SIGNALS, generator)
    noise = torch.randn(rows, columns, generator=generator)
    return (left * (edge * torch.linspace(4, 1.5, SIGNALS))) @ right.T + noise


class Stopwatch:
    """Processor seconds of a with-block, divided by the threads."""

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self.start = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = (time.process_time() - self.start) / torch.get_num_threads()


def dense_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def top(shapes: list[tuple[int, int]], count: int) -> None:
    print(
        f"{count} leading components            dense s   ours s  faster  sigma off  energy off  route   identifiable"
    )
    for rows, columns in shapes:
        for spectrum in ("decay", "noise"):
            matrix = make(spectrum, rows, columns)
            with Stopwatch() as dense:
                best = dense_svd(matrix)[1]
            with Stopwatch() as ours:
                parts = truncated_svd(matrix, count)
            best = best[: parts.rank].double()
            off = float(((parts.s.double() - best) / best).abs().max())
            energy = 1 - float(parts.s.double().square().sum() / best.square().sum())
            print(
                f"{rows} x {columns} {spectrum:6s}             {dense.seconds:9.2f} {ours.seconds:8.2f} "
                f"{dense.seconds / ours.seconds:6.1f}x {off:10.1e} {energy:11.1e}  {parts.mode} {parts.identifiable}",
                flush=True,
            )


def thin(shapes: list[tuple[int, int]]) -> None:
    print("all components          dense s   ours s  faster  sigma off  restored   route")
    for rows, columns in shapes:
        matrix = make("noise", rows, columns)
        with Stopwatch() as dense:
            values = dense_svd(matrix)[1]
        with Stopwatch() as ours:
            parts = truncated_svd(matrix)
        off = float(((parts.s - values) / values).abs().max())
        restored = float((parts.matrix() - matrix).norm() / matrix.norm())
        print(
            f"{rows} x {columns}        {dense.seconds:9.2f} {ours.seconds:8.2f} "
            f"{dense.seconds / ours.seconds:6.1f}x {off:10.1e} {restored:9.1e}  {parts.mode}",
            flush=True,
        )


def dense_polar(matrix: Tensor) -> Tensor:
    u, _, vh = dense_svd(matrix)
    return u @ vh


def dense_tsv_m(deltas: list[Tensor]) -> Tensor:
    count = min(deltas[0].shape) // len(deltas)
    parts = [dense_svd(delta) for delta in deltas]
    left = torch.cat([u[:, :count] for u, _, _ in parts], dim=1)
    right = torch.cat([vh[:count] for _, _, vh in parts])
    return (dense_polar(left) * torch.cat([s[:count] for _, s, _ in parts])) @ dense_polar(right)


def dense_iso_c(deltas: list[Tensor]) -> Tensor:
    u, s, vh = dense_svd(torch.stack(deltas).sum(0))
    return s.mean() * (u @ vh)


def merge(shapes: list[tuple[int, int]], sources: int) -> None:
    print(f"merges of {sources} sources     dense s   ours s  faster  relative difference")
    for rows, columns in shapes:
        deltas = [make("noise", rows, columns, seed) for seed in range(sources)]
        for name, plain in (("iso_c", dense_iso_c), ("tsv_m", dense_tsv_m)):
            method = find_method(name)
            operands = Operands(
                tensors=deltas, weights=(1.0,) * sources, params=method.params(), name="w", shape=(rows, columns)
            )
            with Stopwatch() as dense:
                expected = plain(deltas)
            with Stopwatch() as ours:
                merged = method(operands)
            gap = float((merged - expected).norm() / expected.norm())
            print(
                f"{name} {rows} x {columns}    {dense.seconds:9.2f} {ours.seconds:8.2f} "
                f"{dense.seconds / ours.seconds:6.1f}x  {gap:.1e}",
                flush=True,
            )


def shape_of(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["top", "thin", "merge"], default="top")
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(2048, 5632), (4096, 4096)])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--sources", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, {given.threads} threads")
    if given.what == "top":
        top(given.shapes, given.count)
    elif given.what == "thin":
        thin(given.shapes)
    else:
        merge(given.shapes, given.sources)


if __name__ == "__main__":
    main()
