"""``pxmerge search --evaluate lm_eval:TASK``: the guide's task on models of language; what lm-eval cannot be asked."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from mergekit_px.cli import main

GUIDE = Path(__file__).parents[2] / "docs" / "learn-search.md"
WORDS = ["[PAD]", "[UNK]", "sat", "left", "through", "after", "it", "ten", "twice", "minutes", "fine", "dull"]


def test_lm_eval_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else here(name, *more)
    )
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("models: {a: ./a}\nmerge: {method: linear, sources: {a: 1}}\n")
    words = ["search", "recipe.yaml", "--over", "merge.sources.a=0:1", "-o", "out", "--evaluate"]
    assert main([*words, "lm_eval:arc"]) == 2
    assert "pxmerge[evaluate]" in capsys.readouterr().err
    for asked in ("helm:arc", "lm_eval", "lm_eval:a,"):
        assert main([*words, asked]) == 2 and "lm_eval:TASK" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.filterwarnings("default")  # those of lm-eval and of what it imports are its own
def test_the_guide_to_lm_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    import tokenizers
    import torch
    import transformers

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[PAD]"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(name)
        tokenizer.save_pretrained(name)
    text = GUIDE.read_text()
    recipe = re.search(r"<<'EOF'\n(models.*?)EOF", text, re.DOTALL)
    lines = iter(re.search(r"```sh\n(.*?)```", text, re.DOTALL)[1].splitlines())
    Path("recipe.yaml").write_text(recipe[1])
    for line in lines:
        program, *words = shlex.split(line.partition("<<")[0])
        if program == "mkdir":
            Path(words[0]).mkdir()
        elif program == "cat":
            Path(words[1]).write_text("\n".join(iter(lambda: next(lines), "EOF")))
        else:
            assert main([*words, "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    model = transformers.LlamaForCausalLM.from_pretrained("by-lm-eval/model", dtype=torch.float32)
    rows = [json.loads(line) for line in Path("tasks/reviews.jsonl").read_text().splitlines()]
    right = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(row["text"])["input_ids"]])).logits[0, -1]
        fine, dull = (float(logits[WORDS.index(word)]) for word in ("fine", "dull"))
        right.append((dull > fine) == bool(row["label"]))
    assert report["scores"]["best"]["acc"] == pytest.approx(sum(right) / len(right))
    assert report["trials"] == 3 and report["front"]
    words = ["search", "recipe.yaml", "--over", "merge.sources.a=0,1", "--tasks-folder", "tasks", "-o", "no"]
    assert main([*words, "--evaluate", "lm_eval:reviews", "--objective", "brier_score", "--device", "cpu"]) == 2
    assert "brier_score:min" in capsys.readouterr().err
