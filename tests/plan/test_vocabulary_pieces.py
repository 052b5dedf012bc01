"""One model with another's tokenizer: tokens matched by their text, others made of pieces."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tensors, merge, plan_of, recipe

from mergekit_px.plan.vocabulary_files import Tokenizer, as_text, read_listing, text_of
from mergekit_px.testing import tiny_llama_config, tiny_llama_tensors, write_checkpoint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OWN = ["<s>", "</s>", "▁the", "▁", "c", "a", "t", "at", "▁dog", "<0x0A>"]
OTHER = ["<|begin|>", "<|end|>", "Ġthe", "cat", "Ġcat", "Ċ", "§§", "Ġ", "Ġdogs", "s"]


def byte_level(tokens: list[str]) -> dict[str, Any]:
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]},
        "model": {"type": "BPE", "vocab": {token: place for place, token in enumerate(tokens)}, "merges": []},
    }


def sentencepiece_like(tokens: list[str]) -> dict[str, Any]:
    return {"model": {"type": "Unigram", "vocab": [[token, 0.0] for token in tokens]}}


def models(folder: Path, rows: int = 12) -> tuple[Tensors, Tensors]:
    found = []
    for seed, (name, listed, width) in enumerate(
        (("own", sentencepiece_like(OWN), None), ("other", byte_level(OTHER), 8))
    ):
        tensors = tiny_llama_tensors(seed=seed, dtype=torch.float32)
        count = len(OWN) if name == "own" else rows
        generator = torch.Generator().manual_seed(seed)
        shape = count, width or tensors[EMBEDDING].shape[1]
        tensors |= {each: torch.randn(shape, generator=generator) for each in (EMBEDDING, HEAD)}
        config = {**tiny_llama_config(), "vocab_size": count, "bos_token_id": 0, "eos_token_id": 1}
        write_checkpoint(folder / name, tensors, config=config)
        (folder / name / "tokenizer.json").write_text(json.dumps(listed))
        found.append(tensors)
    return found[0], found[1]


def request(folder: Path, **tokenizer: Any) -> Mapping[str, Any]:
    return recipe(folder, {"method": "passthrough", "sources": ["own"]}, tokenizer={"from": "other", **tokenizer})


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_shared_tokens_keep_their_rows_and_others_are_made_of_pieces(tmp_path: Path, name: str) -> None:
    own, _ = models(tmp_path / "m")
    result = merge(request(tmp_path / "m", absent="subword"), tmp_path / "out")[name]
    rows = own[name]
    mean = rows.mean(0)
    assert result.shape[0] == 12  # as many as the other model has, so that a draft model fits
    assert torch.equal(result[0], rows[0]) and torch.equal(result[1], rows[1])  # by what the configs say
    assert torch.equal(result[2], rows[2])
    assert torch.allclose(result[3], (rows[4] + rows[7]) / 2)
    assert torch.allclose(result[4], (rows[3] + rows[4] + rows[7]) / 3)
    assert torch.equal(result[5], rows[9])
    assert torch.allclose(result[6], mean)
    assert torch.equal(result[7], rows[3])
    assert torch.allclose(result[8], rows[8])  # what no piece covers is passed over
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["vocab_size"], config["hidden_size"]) == (12, own[EMBEDDING].shape[1])


def test_rows_may_be_the_mean_of_all(tmp_path: Path) -> None:
    own, _ = models(tmp_path / "m")
    result = merge(request(tmp_path / "m", absent="mean", pad_to=1), tmp_path / "out")[EMBEDDING]
    assert result.shape[0] == len(OTHER)
    assert torch.allclose(result[3], own[EMBEDDING].mean(0))
    assert torch.equal(result[2], own[EMBEDDING][2])
    notes = plan_of(request(tmp_path / "m", absent="mean"), tmp_path / "plan").notes
    assert any("(Unigram) are matched to others (byte-level BPE) by their text" in note for note in notes)


@pytest.mark.parametrize(
    ("kind", "token", "text"),
    [
        ("byte-level BPE", as_text(" é\n".encode()), " é\n"),
        ("Unigram", "▁a▁b", " a b"),
        ("BPE", "<0x41>", "A"),
        ("WordPiece", "##ing", "ing"),
        ("WordPiece", "go", " go"),
    ],
)
def test_tokens_stand_for_text(kind: str, token: str, text: str) -> None:
    assert text_of(token, Tokenizer("", kind, {0: token})).decode() == text


def sentencepiece_model() -> bytes:
    def field(number: int, value: bytes) -> bytes:
        return bytes([number << 3 | 2, len(value)]) + value

    pieces = [("<unk>", 2), ("<s>", 3), ("▁a", 1)]
    listed = b"".join(
        field(1, field(1, text.encode()) + b"\x15\x00\x00\x00\x00" + bytes([0x18, of])) for text, of in pieces
    )
    return listed + field(2, b"\x18\x02")


TEKKEN = {
    "config": {"default_num_special_tokens": 2, "default_vocab_size": 4},
    "special_tokens": [{"rank": 1, "token_str": "<s>"}],
    "vocab": [
        {"rank": rank, "token_bytes": base64.b64encode(text).decode()} for rank, text in enumerate((b" a", b"b", b"c"))
    ],
}


@pytest.mark.parametrize(
    ("file", "raw", "tokens", "kind"),
    [
        ("tokenizer.model", sentencepiece_model(), ["<unk>", "<s>", "▁a"], "BPE"),
        ("x.tiktoken", b"IGE= 0\nYg== 1\n", ["Ġa", "b"], "byte-level BPE"),
        ("tokenizer.model", b"IGE= 0\nYg== 1\n", ["Ġa", "b"], "byte-level BPE"),
        ("tekken.json", json.dumps(TEKKEN).encode(), ["<SPECIAL_0>", "<s>", "Ġa", "b"], "byte-level BPE"),
        ("vocab.txt", b"[PAD]\na\n##b\n", ["[PAD]", "a", "##b"], "WordPiece"),
        (
            "rwkv_vocab_v20230424.txt",
            b"0 '\\x00' 1\n1 ' a' 2\n2 b'\\xff' 1\n3 \"'\" 1\n",
            ["Ā", "Ġa", "ÿ", "'"],
            "RWKV",
        ),
    ],
)
def test_formats_of_vocabularies(file: str, raw: bytes, tokens: list[str], kind: str) -> None:
    found = read_listing(file, raw, {}, "m", merged=False)
    assert (found.tokens, found.kind) == (dict(enumerate(tokens)), kind)
