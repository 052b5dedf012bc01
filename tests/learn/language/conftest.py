"""Tiny language models of four architectures, fine-tunes of them, and texts of a chain whose next token is likely."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergekit_px.cli import main
from mergekit_px.learn.data import IGNORED

transformers = pytest.importorskip("transformers")

VOCABULARY = 24
LENGTH = 12
PAD = 0
NEXT = ("llama", "gpt2")

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_LONG = {"max_position_embeddings": 64, "intermediate_size": 32}

_SURE = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_STEADY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

MAKERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_SIZES, **_LONG, num_key_value_heads=1, pad_token_id=PAD)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, **_SURE)
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**_SIZES, **_LONG, **_STEADY)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
    ),
}


def chain(which: int) -> Tensor:
    """The next token after each token: a permutation of all but padding and one that stands for a mask."""
    order = np.random.default_rng(which).permutation(np.arange(2, VOCABULARY))
    follows = np.zeros(VOCABULARY, dtype=np.int64)
    follows[order] = np.roll(order, -1)
    return torch.from_numpy(follows)


def texts(count: int, seed: int, which: int, length: int = LENGTH) -> dict[str, Tensor]:
    """Texts of several lengths, padded at the end; eight in ten tokens follow the chain."""
    rng, follows = np.random.default_rng(seed), chain(which)
    ids = torch.full((count, length), PAD)
    mask = torch.zeros(count, length, dtype=torch.long)
    for row in range(count):
        token = int(rng.integers(2, VOCABULARY))
        for place in range(int(rng.integers(LENGTH // 2, LENGTH + 1))):
            ids[row, place], mask[row, place] = token, 1
            token = int(follows[token]) if rng.random() < 0.8 else int(rng.integers(2, VOCABULARY))
    return {"input_ids": ids, "attention_mask": mask}


def task(kind: str, count: int, seed: int, which: int = 0) -> dict[str, Tensor]:
    """Texts with the labels that people give to a kind of model."""
    found = texts(count, seed, which)
    ids, mask = found["input_ids"], found["attention_mask"]
    if kind == "bert":
        hidden = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.3) & mask.bool()
        hidden[:, 0] = True
        return {**found, "input_ids": ids.masked_fill(hidden, 1), "labels": ids.masked_fill(~hidden, -100)}
    if kind == "t5":
        return {**found, "labels": chain(which)[ids].masked_fill(mask == 0, -100)[:, :-3].contiguous()}
    return {**found, "labels": ids.masked_fill(mask == 0, -100)}


def padded(arrays: dict[str, Tensor], *, left: bool = False, label: int = PAD) -> dict[str, Tensor]:
    """The same examples with as much padding again, and its label."""
    found = {}
    for name, array in arrays.items():
        more = torch.full_like(array, label if name == "labels" else PAD)
        found[name] = torch.cat([more, array] if left else [array, more], dim=1)
    return found


def trained(model: Any, kind: str, which: int, steps: int = 60, rate: float = 1e-2) -> Any:
    """The model after a few steps on texts of a chain, by its own loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for step in range(steps):
        batch = task(kind, 32, 1000 * which + step, which)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


def save(model: Any, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


@pytest.fixture(scope="session", params=list(MAKERS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A kind, and a folder with a base that knows two chains a little, and fine-tunes of it that know one each."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    steps, rate = (150, 3e-3) if kind == "bert" else (15, 1e-2)  # masked tokens are hard to find
    base = trained(trained(MAKERS[kind](), kind, 1, steps, rate), kind, 2, steps, rate)
    save(base, folder / "base")
    for which in (1, 2):
        torch.manual_seed(which)
        tuned = MAKERS[kind]()
        tuned.load_state_dict(base.state_dict())
        save(trained(tuned, kind, which, 40, 3e-3), folder / f"tuned{which}")
    return kind, folder


@pytest.fixture
def world(family: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kind of model; in the current folder a base, two fine-tunes, and data of both tasks, once padded to twice
    the length: before the texts where a model predicts what comes next, else after them."""
    kind, folder = family
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned1", "tuned2"):
        shutil.copytree(folder / name, tmp_path / name)
    arrays = mixed(kind, 60, 7)
    save_arrays("data.npz", arrays)
    save_arrays("long.npz", padded(arrays, left=kind in NEXT, label=IGNORED if kind == "t5" else PAD))
    return kind


def mixed(kind: str, count: int, seed: int) -> dict[str, Tensor]:
    both = [task(kind, count // 2, seed + which, which) for which in (1, 2)]
    return {name: torch.cat([one[name] for one in both]) for name in both[0]}


def save_arrays(path: str, arrays: dict[str, Tensor]) -> None:
    np.savez(path, **{name: one.numpy() for name, one in arrays.items()})


def learned(*words: str) -> None:
    assert main([*words, "-q"]) == 0


def ofasd(data: str, output: str, *more: str) -> dict[str, Any]:
    learned("ofasd", "--base", "base", "--sources", "tuned1", "tuned2", "--data", data, "-o", output, "--batch", "16",
            "--steps", "30", "--evaluate-every", "10", "--controls", "cheap", *more)  # fmt: skip
    return json.loads(Path(output, "report.json").read_text())


def numbers(tree: Any) -> list[float]:
    """All scores of a report, in order."""
    if isinstance(tree, dict):
        return [
            one for key, value in tree.items() if key not in ("seconds", "inputs", "plan") for one in numbers(value)
        ]
    if isinstance(tree, list):
        return [one for value in tree for one in numbers(value)]
    return [float(tree)] if isinstance(tree, float) else []
