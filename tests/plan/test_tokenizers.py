from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tensors, merge, plan_of, recipe
from safetensors.torch import save_file

from mergekit_px.errors import InputError, MalformedCheckpointError, PlanError
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


def test_a_tokenizer_that_is_only_a_pointer_is_not_taken_for_none(tmp_path: Path) -> None:
    pointer = {"tokenizer.json": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"}
    models(tmp_path / "m", tokenizer(TOKENS), pointer)
    with pytest.raises(InputError, match=r"other/tokenizer\.json: this is a git-lfs pointer"):
        plan_of(recipe(tmp_path / "m", LINEAR), tmp_path / "out")


def test_lists_that_are_not_read_and_differ_are_told(tmp_path: Path) -> None:
    models(tmp_path / "m", {"my_vocab.txt": "a: 1\n"}, {"my_vocab.txt": "b: 1\n"})
    notes = plan_of(recipe(tmp_path / "m", LINEAR), tmp_path / "out").notes
    assert any("a format that is not read, and my_vocab.txt differs" in note for note in notes)


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


def cut_models(folder: Path) -> None:
    """``long`` has 64 rows and an id beyond the 60 of ``short``."""
    for name, rows in {"long": 64, "short": 60}.items():
        config = {**tiny_llama_config(vocabulary=rows), "pad_token_id": rows - 1}
        write_checkpoint(folder / name, tiny_llama_tensors(vocabulary=rows), config=config)
        tokens = [f"t{place}" for place in range(rows)]
        (folder / name / "tokenizer.json").write_text(tokenizer(tokens)["tokenizer.json"])


TRUNCATED = {"method": "linear", "sources": ["long", "short"], "vocabulary": "truncate"}


def test_where_rows_are_cut_config_and_tokenizer_are_those_that_fit(tmp_path: Path) -> None:
    cut_models(tmp_path / "m")
    plan = plan_of(recipe(tmp_path / "m", TRUNCATED), tmp_path / "out")
    assert plan.config is not None
    assert (plan.config["vocab_size"], plan.config["pad_token_id"]) == (60, 59)
    assert plan.side_files["tokenizer.json"] == "short"
    assert any("rows that are cut" in note for note in plan.notes)


def test_a_config_with_ids_of_rows_that_are_cut_is_refused_where_it_was_asked_for(tmp_path: Path) -> None:
    cut_models(tmp_path / "m")
    with pytest.raises(PlanError, match="pad_token_id 63"):
        plan_of(recipe(tmp_path / "m", TRUNCATED, {"config_from": "long"}), tmp_path / "out")


@pytest.mark.parametrize(("rows", "word"), [(67, "grew"), (61, "shrank")])
def test_an_adapter_with_other_rows_brings_its_tokenizer_and_keeps_a_tied_head(
    rows: int, word: str, tmp_path: Path
) -> None:
    base = tiny_llama_tensors(tied=True, dtype=torch.float32)
    write_checkpoint(tmp_path / "base", base, config=tiny_llama_config(tied=True))
    if rows > 64:  # tokens of the base's without a row would be refused
        (tmp_path / "base" / "tokenizer.json").write_text("{}")
        (tmp_path / "base" / "merges.txt").write_text("a b")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    grown = torch.ones(rows, base["model.embed_tokens.weight"].shape[1])
    save_file({"base_model.model.model.embed_tokens.weight": grown}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "tokenizer.json").write_text('{"grown": true}')
    data = {
        "pxmerge": 1,
        "models": {"m": {"model": str(tmp_path / "base"), "adapter": str(adapter)}},
        "merge": {"method": "passthrough", "sources": ["m"]},
    }
    plan = plan_of(data, tmp_path / "plan")
    assert plan.config is not None
    assert (plan.config["vocab_size"], plan.config["tie_word_embeddings"]) == (rows, True)
    assert any(f"{word} from 64 to {rows} rows" in note for note in plan.notes)
    result = merge(data, tmp_path / "out")
    assert "lm_head.weight" not in result
    assert torch.equal(result["model.embed_tokens.weight"], grown)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"grown": true}'
    assert not (tmp_path / "out" / "merges.txt").exists()
