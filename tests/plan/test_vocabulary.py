"""Tokenizers that a recipe chooses: which rows each model gives, what is written beside, what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tensors, merge, plan_of, recipe

from mergekit_px.errors import PlanError
from mergekit_px.testing import tiny_llama_config, tiny_llama_tensors, write_checkpoint

SHARED = [f"t{number}" for number in range(60)]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LINEAR = {"method": "linear", "sources": ["a", "b", "c"]}


def tokenizer_json(
    tokens: Sequence[str], added: Sequence[str] = (), kind: str = "BPE", normalizer: Mapping[str, Any] | None = None
) -> str:
    listed: Any = {token: place for place, token in enumerate(tokens)}
    if kind == "Unigram":
        listed = [[token, -float(place)] for place, token in enumerate(tokens)]
    entries = [
        {"id": len(tokens) + place, "content": token, "special": True, "lstrip": True}
        for place, token in enumerate(added)
    ]
    model = {"type": kind, "vocab": listed, "merges": []}
    return json.dumps({"normalizer": normalizer, "added_tokens": entries, "model": model})


def model(folder: Path, name: str, rows: int, text: str, seed: int, **config: Any) -> Tensors:
    shapes = tiny_llama_tensors(seed=seed, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    shapes |= {each: torch.randn(rows, shapes[each].shape[1], generator=generator) for each in (EMBEDDING, HEAD)}
    write_checkpoint(folder / name, shapes, config={**tiny_llama_config(), "vocab_size": rows, **config})
    (folder / name / "tokenizer.json").write_text(text)
    return shapes


def models(folder: Path) -> tuple[Tensors, Tensors, Tensors]:
    """``b`` has the tokens of ``a`` in another order and two more, ``c`` lacks one and has one of the two."""
    a = model(folder, "a", 60, tokenizer_json(SHARED), 1, eos_token_id=3)
    b = model(folder, "b", 62, tokenizer_json(SHARED[::-1], ["<x>", "<y>"]), 2, eos_token_id=61)
    c = model(folder, "c", 60, tokenizer_json(SHARED[:59], ["<y>"]), 3)
    return a, b, c


def test_rows_of_all_models_follow_the_tokens_of_one(tmp_path: Path) -> None:
    a, b, c = models(tmp_path / "m")
    result = merge(recipe(tmp_path / "m", LINEAR, tokenizer={"from": "b"}), tmp_path / "out")
    for name in (EMBEDDING, HEAD):
        assert result[name].shape[0] == 62
        assert torch.allclose(result[name][1], (a[name][58] + b[name][1] + c[name][58]) / 3)
        t59 = (a[name][59] + b[name][0]) / 2
        assert torch.allclose(result[name][0], (a[name][59] + b[name][0] + t59) / 3)
        assert torch.allclose(result[name][60], b[name][60])
        assert torch.allclose(result[name][61], (b[name][61] + c[name][59]) / 2)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (62, 61)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "m/b/tokenizer.json").read_bytes()


def test_where_a_model_lacks_a_token_the_row_of_the_base_stands_in(tmp_path: Path) -> None:
    a, b, _ = models(tmp_path / "m")
    result = merge(recipe(tmp_path / "m", LINEAR, tokenizer={"from": "a", "base": "a"}), tmp_path / "out")
    assert torch.allclose(result[HEAD][59], (2 * a[HEAD][59] + b[HEAD][0]) / 3)
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 3


def test_a_union_keeps_the_ids_of_the_base_and_appends_what_others_have(tmp_path: Path) -> None:
    _, b, c = models(tmp_path / "m")
    plan = plan_of(recipe(tmp_path / "m", LINEAR, tokenizer={"from": "union"}), tmp_path / "plan")
    assert any("2 tokens that only others have ('<x>', '<y>')" in note for note in plan.notes)
    result = merge(recipe(tmp_path / "m", LINEAR, tokenizer={"from": "union"}), tmp_path / "out")
    assert torch.allclose(result[EMBEDDING][60], b[EMBEDDING][60])
    assert torch.allclose(result[EMBEDDING][61], (b[EMBEDDING][61] + c[EMBEDDING][59]) / 2)
    written = json.loads((tmp_path / "out/tokenizer.json").read_text())
    assert [(entry["id"], entry["content"]) for entry in written["added_tokens"]] == [(60, "<x>"), (61, "<y>")]
    assert all(entry["special"] and entry["lstrip"] and not entry["normalized"] for entry in written["added_tokens"])
    assert written["model"] == json.loads((tmp_path / "m/a/tokenizer.json").read_text())["model"]


def test_a_union_of_equal_tokenizers_is_the_merge_without_it(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        model(tmp_path / "m", name, 64, tokenizer_json(SHARED), seed)
    step = {"method": "linear", "sources": ["a", "b"]}
    plain, union = (recipe(tmp_path / "m", step, **more) for more in ({}, {"tokenizer": {"from": "union"}}))
    assert plan_of(plain, tmp_path / "out").hash == plan_of(union, tmp_path / "out").hash


def test_single_tokens_come_from_where_the_recipe_says(tmp_path: Path) -> None:
    a, b, c = models(tmp_path / "m")
    tokens = {
        "t7": {"model": "c", "force": True},
        "<x>": {"kind": "zero"},
        "<y>": "c",
        "<like>": {"model": "b", "token": "<x>"},
        "<by id>": {"model": "b", "id": 2},
        "<mean>": {"kind": "mean"},
    }
    request = {"from": "union", "tokens": tokens, "pad_to": 16}
    result = merge(recipe(tmp_path / "m", LINEAR, tokenizer=request), tmp_path / "out")[EMBEDDING]
    embeddings = [each[EMBEDDING] for each in (a, b, c)]
    assert torch.allclose(result[7], embeddings[2][7])
    assert torch.allclose(result[60], embeddings[1][60] / 3)
    assert torch.allclose(result[61], (embeddings[1][61] + 2 * embeddings[2][59]) / 3)
    assert torch.allclose(result[62], embeddings[1][60])
    assert torch.allclose(result[63], embeddings[1][2])
    assert torch.allclose(result[64], sum(each.mean(0) for each in embeddings) / 3, atol=1e-6)
    assert torch.allclose(result[65:], result[:65].mean(0).expand(15, -1), atol=1e-6)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 80


def test_a_random_row_has_the_mean_and_the_spread_of_a_models_rows(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    a = model(folder, "a", 2000, tokenizer_json([f"t{number}" for number in range(2000)]), 1)
    a[EMBEDDING] = a[EMBEDDING] * torch.linspace(0.1, 2, a[EMBEDDING].shape[1]) + 3
    write_checkpoint(folder / "a", a, config={**tiny_llama_config(), "vocab_size": 2000})
    tokens = {f"<{number}>": {"kind": "random"} for number in range(400)}
    data = recipe(folder, {"method": "passthrough", "sources": ["a"]}, tokenizer={"from": "a", "tokens": tokens})
    drawn = merge(data, tmp_path / "out")[EMBEDDING][2000:]
    assert len(drawn) == 400
    assert torch.allclose(drawn.mean(0), a[EMBEDDING].mean(0), atol=0.4)
    assert torch.allclose(drawn.std(0), a[EMBEDDING].std(0), rtol=0.2)
    again = merge({**data, "seed": 1}, tmp_path / "again")[EMBEDDING][2000:]
    assert not torch.equal(drawn, again)


def test_tied_heads_and_models_without_a_tokenizer_follow(tmp_path: Path) -> None:
    a = model(tmp_path / "m", "a", 60, tokenizer_json(SHARED), 1, tie_word_embeddings=True)
    b = model(tmp_path / "m", "b", 61, tokenizer_json(SHARED, ["<x>"]), 2)
    c = model(tmp_path / "m", "c", 60, "", 3)
    (tmp_path / "m/c/tokenizer.json").unlink()
    del a[HEAD]
    write_checkpoint(tmp_path / "m/a", a, config={**tiny_llama_config(), "vocab_size": 60, "tie_word_embeddings": True})
    result = merge(recipe(tmp_path / "m", LINEAR, tokenizer={"from": "union"}), tmp_path / "out")
    assert torch.allclose(result[HEAD][:60], (a[EMBEDDING] + b[HEAD][:60] + c[HEAD]) / 3)
    # The row that a tied model gets is one for both, of the other's embedding.
    assert torch.allclose(result[HEAD][60], (b[EMBEDDING][60] + 2 * b[HEAD][60]) / 3)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (61, False)


@pytest.mark.parametrize(
    ("other", "request_", "message"),
    [
        (tokenizer_json(SHARED, kind="Unigram"), {"from": "union"}, r"another kind \(Unigram\)"),
        (tokenizer_json(SHARED, normalizer={"type": "Lowercase"}), {"from": "union"}, "normalisers .* disagree"),
        (tokenizer_json(SHARED), {"from": "union", "tokens": {"<z>": "b"}}, "'b' has no token '<z>'.*"),
        (tokenizer_json(SHARED), {"from": "a", "tokens": {"t1": {"model": "b", "id": 60}}}, ""),
        (tokenizer_json(SHARED), {"from": "a", "tokens": {"<n>": {"model": "b", "id": 60}}}, "has 60 rows, and row 60"),
    ],
)
def test_what_has_no_answer_is_refused(tmp_path: Path, other: str, request_: dict[str, Any], message: str) -> None:
    model(tmp_path / "m", "a", 60, tokenizer_json(SHARED), 1)
    model(tmp_path / "m", "b", 60, other, 2)
    data = recipe(tmp_path / "m", {"method": "linear", "sources": ["a", "b"]}, tokenizer=request_)
    if not message:
        assert plan_of(data, tmp_path / "out").items
        return
    with pytest.raises(PlanError, match=message):
        plan_of(data, tmp_path / "out")


def test_marking_of_spaces_is_no_disagreement(tmp_path: Path) -> None:
    legacy = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    model(tmp_path / "m", "a", 60, tokenizer_json(SHARED), 1)
    model(tmp_path / "m", "b", 60, tokenizer_json(SHARED, normalizer=legacy), 2)
    data = recipe(tmp_path / "m", {"method": "linear", "sources": ["a", "b"]}, tokenizer={"from": "union"})
    assert plan_of(data, tmp_path / "out").items


def test_an_id_that_the_vocabulary_leaves_out_stays_free(tmp_path: Path) -> None:
    gap = json.loads(tokenizer_json(SHARED[:58]))
    gap["model"]["vocab"]["t59"] = 59
    model(tmp_path / "m", "a", 60, json.dumps(gap), 1)
    b = model(tmp_path / "m", "b", 61, tokenizer_json(SHARED, ["<x>"]), 2)
    data = recipe(tmp_path / "m", {"method": "linear", "sources": ["a", "b"]}, tokenizer={"from": "union"})
    result = merge(data, tmp_path / "out")
    written = json.loads((tmp_path / "out/tokenizer.json").read_text())
    ids = {**written["model"]["vocab"], **{entry["content"]: entry["id"] for entry in written["added_tokens"]}}
    assert (ids["t59"], ids["t58"], ids["<x>"]) == (59, 60, 61)
    # Readers would give an added token the next number after the vocabulary's size.
    assert written["model"]["vocab"]["<x>"] == 61
    assert torch.allclose(result[EMBEDDING][61], b[EMBEDDING][60])


def test_encoder_decoders_follow_but_for_columns(tmp_path: Path) -> None:
    for seed, (name, added) in enumerate((("a", []), ("b", ["<x>"]))):
        rows = len(SHARED) + len(added)
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            "shared.weight": torch.randn(rows, 8, generator=generator),
            "final_logits_bias": torch.zeros(1, rows),
        }
        write_checkpoint(tmp_path / "m" / name, tensors, config={"model_type": "bart", "vocab_size": rows})
        (tmp_path / "m" / name / "tokenizer.json").write_text(tokenizer_json(SHARED, added))
    step = {"method": "linear", "sources": ["a", "b"], "missing": "base"}
    drop = [{"match": "final_logits_bias", "drop": True}]
    take = [{"match": "final_logits_bias", "take": "a"}]
    with pytest.raises(PlanError, match="'final_logits_bias' has a column for each token"):
        data = recipe(tmp_path / "m", {**step, "rules": take}, tokenizer={"from": "union"})
        plan_of(data, tmp_path / "out")
    result = merge(recipe(tmp_path / "m", {**step, "rules": drop}, tokenizer={"from": "union"}), tmp_path / "out")
    assert result["shared.weight"].shape == (61, 8)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 61
