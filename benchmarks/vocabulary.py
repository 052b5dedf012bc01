"""Memory and time of a union of two vocabularies.

    python benchmarks/vocabulary.py                      # 262144 rows of width 4096, bfloat16, within 600 MB
    python benchmarks/vocabulary.py --rows 32000 --width 1024 --memory 500MB

Two models of an embedding and one small layer are made, in a temporary folder or the one that is given; the second has
the first one's tokens in reverse order, less a hundred, and a hundred of its own. Their union is merged linearly in a
process of its own, with --memory, and rows are compared with those that they are made of.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

EMBEDDING = "model.embed_tokens.weight"
OWN = 100
CHECKED = 50


def make(folder: Path, tokens: list[str], width: int, seed: int) -> None:
    """A model whose rows are drawn anew for each token."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    embedding = torch.empty(len(tokens), width, dtype=torch.bfloat16)
    for start in range(0, len(tokens), 4096):
        piece = embedding[start : start + 4096]
        piece.copy_(torch.randn(piece.shape, generator=generator))
    norm = torch.ones(width, dtype=torch.bfloat16)
    save_file({EMBEDDING: embedding, "model.norm.weight": norm}, folder / "model.safetensors")
    config = {"model_type": "llama", "vocab_size": len(tokens), "hidden_size": width, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    pairs = [[token, token] for token in tokens]  # as long as the merges of a real one
    model = {"type": "BPE", "vocab": {token: place for place, token in enumerate(tokens)}, "merges": pairs}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=262144)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--memory", default="600MB")
    parser.add_argument("--folder", type=Path, help="a disk with room for three embeddings")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        tokens = [f"token{number}" for number in range(options.rows)]
        others = [*tokens[OWN:][::-1], *(f"own{number}" for number in range(OWN))]
        make(folder / "a", tokens, options.width, 1)
        make(folder / "b", others, options.width, 2)
        recipe = {
            "models": {"a": str(folder / "a"), "b": str(folder / "b")},
            "merge": {"method": "linear", "sources": {"a": 0.5, "b": 0.5}},
            "tokenizer": {"from": "union"},
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        command = [sys.executable, "-m", "mergekit_px", "run", str(folder / "recipe.yaml"), "-o", str(folder / "out")]
        started = time.perf_counter()
        done = subprocess.run([*command, "--memory", options.memory], capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        print(done.stderr)
        done.check_returncode()
        check(folder, tokens, others)
        peak = re.search(r"peak memory ([^\n]+)", done.stderr)
        print(f"{options.rows} x {options.width}: {seconds:.1f} s, peak {peak[1] if peak else 'unknown'}")


def check(folder: Path, tokens: list[str], others: list[str]) -> None:
    with (
        safe_open(folder / "a/model.safetensors", "pt") as a,
        safe_open(folder / "b/model.safetensors", "pt") as b,
        safe_open(next((folder / "out").glob("*.safetensors")), "pt") as out,
    ):
        one, other, merged = a.get_slice(EMBEDDING), b.get_slice(EMBEDDING), out.get_slice(EMBEDDING)
        places = {token: place for place, token in enumerate(others)}
        assert merged.get_shape()[0] == len(tokens) + OWN
        for place in range(0, len(tokens), max(1, len(tokens) // CHECKED)):
            row = one[place : place + 1].float()
            if tokens[place] in places:
                found = places[tokens[place]]
                row = (row + other[found : found + 1].float()) / 2
            assert torch.equal(merged[place : place + 1], row.to(torch.bfloat16)), place
        assert torch.equal(merged[len(tokens) :], other[len(others) - OWN :])


if __name__ == "__main__":
    main()
