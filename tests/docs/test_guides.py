"""The first examples of the guides to learning run as they stand, from a file of texts to a model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from mergekit_px.cli import main

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = {
    "learn-data.md": ["merged", "pinned/coefficients.safetensors"],
    "learn-ofasd.md": ["merged"],
    "learn-tune.md": ["tuned/model", "tuned-pool/model"],
    "learn-stats.md": ["by-fisher", "by-regmean", "in-order/model"],
    "learn-search.md": ["found/model"],
    "learn-align.md": ["aligned/model"],
    "transfer.md": ["transfer/transfer/target"],
}
OF_LANGUAGE = {
    "experts.md": ["mixture.routers.safetensors", "reordered", "one", "mean", "best"],
    "mergekit.md": [],
}
"""Pages whose commands are about models of language."""
WORDS = ["sat", "left", "through", "after", "it", "ten", "twice", "minutes", "fine", "dull"]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tunes, another base of the same shape, each with a tokenizer, and some reviews."""
    torch, transformers, tokenizers = map(pytest.importorskip, ("torch", "transformers", "tokenizers"))
    folder = tmp_path_factory.mktemp("guides")
    words = ["[PAD]", "[UNK]", *WORDS]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    models = {name: transformers.BertForSequenceClassification(config) for name in ("base", "other", "a", "b")}
    for name in ("a", "b"):
        base = models["base"].state_dict()
        models[name].load_state_dict({key: one + 0.05 * torch.randn(one.shape) for key, one in base.items()})
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    drawn = torch.randint(len(WORDS), (60, 5), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"text": " ".join(WORDS[n] for n in row), "label": ("bad", "good")[row[0] % 2]} for row in drawn]
    (folder / "reviews.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def language_models(classifiers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes of another kind, with the same tokenizer."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("language")
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 2, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifiers / "base")
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"text": " ".join(WORDS[number:] + WORDS[:number])} for number in range(len(WORDS))]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run(block: str) -> None:
    """The lines of a block: files that are written, and commands."""
    lines = iter(block.splitlines())
    for line in lines:
        if written := re.fullmatch(r"cat > (\S+) <<'EOF'", line):
            Path(written[1]).write_text("\n".join(iter(lambda: next(lines), "EOF")))
        else:
            program, *words = shlex.split(line)
            assert program == "pxmerge" and main([*words, "-q"]) == 0, line


@pytest.mark.parametrize("page", RESULTS)
def test_a_guide_goes_from_texts_to_a_model(
    page: str, classifiers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in classifiers.iterdir():
        (tmp_path / place.name).symlink_to(place)
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        run(block)
    for result in RESULTS[page]:
        assert (tmp_path / result).exists()


@pytest.mark.parametrize("page", OF_LANGUAGE)
def test_commands_on_models_of_language_run(
    page: str, language_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in language_models.iterdir():
        (tmp_path / place.name).symlink_to(place)
    text = (DOCS / page).read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    programs = re.search(r"<!-- programs -->(.*?)<!-- end of programs -->", text, re.DOTALL)
    rows = re.findall(r"\| `(pxmerge .*)` \|$", programs[1], re.MULTILINE) if programs else []
    assert blocks and len(rows) in (0, 11)
    for block in [*blocks, *rows]:
        run(block)
    for result in OF_LANGUAGE[page]:
        assert (tmp_path / result).exists()
