from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tensors, merge, plan_of, recipe

from mergekit_px.errors import MalformedCheckpointError, PlanError
from mergekit_px.testing import tiny_llama_config, tiny_llama_tensors, write_checkpoint

TOKENS = [f"t{number}" for number in range(60)]
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def tokenizer(tokens: Sequence[str], kind: str = "BPE") -> dict[str, str]:
    if kind == "vocab.txt":
        return {"vocab.txt": "\n".join(tokens) + "\n"}
    if kind == "vocab.json":
        return {"vocab.json": json.dumps({token: place for place, token in enumerate(tokens)})}
    listed: Any = {token: place for place, token in enumerate(tokens)}
    if kind == "Unigram":
        listed = [[token, -float(place)] for place, token in enumerate(tokens)]
    return {"tokenizer.json": json.dumps({"model": {"type": kind, "vocab": listed}, "added_tokens": []})}


def models(folder: Path, one: dict[str, str], other: dict[str, str]) -> tuple[Tensors, Tensors]:
    tensors = tiny_llama_tensors(seed=1, dtype=torch.float32), tiny_llama_tensors(seed=2, dtype=torch.float32)
    for name, held, files in zip(("one", "other"), tensors, (one, other), strict=True):
        write_checkpoint(folder / name, held, config=tiny_llama_config())
        for file, text in files.items():
            (folder / name / file).write_text(text)
    return tensors


LINEAR = {"method": "linear", "sources": ["one", "other"]}


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "vocab.json", "vocab.txt"])
def test_rows_follow_their_tokens_into_the_donors_order(tmp_path: Path, kind: str) -> None:
    order = [*range(58), 59, 58]
    one, other = models(tmp_path / "m", tokenizer(TOKENS, kind), tokenizer([TOKENS[place] for place in order], kind))
    data = recipe(tmp_path / "m", LINEAR)
    assert any("'t59'" in note for note in plan_of(data, tmp_path / "plan").notes)
    result = merge(data, tmp_path / "out")
    rows = [*order, *range(60, 64)]
    for name in VOCABULARY:
        assert torch.allclose(result[name], (one[name] + other[name][rows]) / 2)
    norm = "model.norm.weight"
    assert torch.allclose(result[norm], (one[norm] + other[norm]) / 2)


def test_added_tokens_count(tmp_path: Path) -> None:
    def added(*names: str) -> dict[str, str]:
        content = json.loads(tokenizer(TOKENS)["tokenizer.json"])
        content["added_tokens"] = [{"id": 60 + place, "content": name} for place, name in enumerate(names)]
        return {"tokenizer.json": json.dumps(content)}

    models(tmp_path / "m", added("<a>", "<b>"), added("<b>", "<a>"))
    notes = plan_of(recipe(tmp_path / "m", LINEAR), tmp_path / "out").notes
    assert any("2 tokens ('<b>', '<a>'" in note for note in notes)


def test_other_tokens_are_refused_by_name_unless_they_are_not_mixed(tmp_path: Path) -> None:
    models(tmp_path / "m", tokenizer(TOKENS), tokenizer([*TOKENS[:59], "new"]))
    with pytest.raises(PlanError, match="59 is 'new' and 't59'"):
        plan_of(recipe(tmp_path / "m", LINEAR), tmp_path / "out")
    rules = [{"match": list(VOCABULARY), "take": "one"}]
    assert plan_of(recipe(tmp_path / "m", {**LINEAR, "rules": rules}), tmp_path / "out").items
    theirs = [{"match": list(VOCABULARY), "take": "other"}]
    with pytest.raises(PlanError, match="rows of other tokens"):
        plan_of(recipe(tmp_path / "m", {**LINEAR, "rules": theirs}), tmp_path / "out")
    data = recipe(tmp_path / "m", {**LINEAR, "rules": theirs}, {"tokenizer_from": "other"})
    assert plan_of(data, tmp_path / "out").items


@pytest.mark.parametrize("other", [tokenizer(TOKENS), tokenizer(TOKENS[:50]), {}])
def test_equal_shorter_and_missing_vocabularies_change_nothing(tmp_path: Path, other: dict[str, str]) -> None:
    models(tmp_path / "m", tokenizer(TOKENS), other)
    assert not any("token" in note for note in plan_of(recipe(tmp_path / "m", LINEAR), tmp_path / "out").notes)


@pytest.mark.parametrize("text", ["{}", "[", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": "b"}}}'])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    models(tmp_path / "m", tokenizer(TOKENS), {"tokenizer.json": text})
    with pytest.raises(MalformedCheckpointError, match="tokenizer"):
        plan_of(recipe(tmp_path / "m", LINEAR), tmp_path / "out")
