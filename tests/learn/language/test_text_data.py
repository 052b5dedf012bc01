"""Texts, conversations and images as files: what they become, and what is refused."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mergekit_px.cli import main
from mergekit_px.learn.data import IGNORED

from .conftest import save

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "</s>",
    *["the", "cat", "dog", "sat", "ran", "here", "there", "now", "good", "bad", "user", "bot"],
]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}bot{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}bot {% generation %}{{ m['content'] }}{% endgeneration %} "
    "{% else %}user {{ m['content'] }} {% endif %}{% endfor %}"
)


def tokenizer(folder: Path, words: list[str] = WORDS, **named: Any) -> None:
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if named.pop("pairs", False):
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **{**special, **named}).save_pretrained(folder)


SIZES = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 32}  # fmt: skip


@pytest.fixture
def models_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A language model, a classifier and a model of prompts and answers, each with a tokenizer beside it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), tmp_path / "llama")
    tokenizer(tmp_path / "llama", chat_template=TEMPLATE)
    names = {"label2id": {"praise": 0, "blame": 1, "neither": 2}, "id2label": {0: "praise", 1: "blame", 2: "neither"}}
    config = transformers.BertConfig(**SIZES, **names)
    save(transformers.BertForSequenceClassification(config), tmp_path / "bert")
    save(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)), tmp_path / "masked")
    for name in ("bert", "masked"):
        tokenizer(tmp_path / name, pairs=True, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    t5 = transformers.T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                               decoder_start_token_id=0)  # fmt: skip
    save(transformers.T5ForConditionalGeneration(t5), tmp_path / "t5")
    tokenizer(tmp_path / "t5")
    return tmp_path


def lines(path: str, rows: Iterable[dict[str, Any]]) -> None:
    Path(path).write_text("\n".join(map(json.dumps, rows)) + "\n\n")


def arrays(*words: str) -> dict[str, torch.Tensor]:
    assert main(["data", *words, "-o", "arrays.safetensors", "--overwrite", "-q"]) == 0
    return load_file("arrays.safetensors")


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def test_texts_of_a_causal_model_are_their_own_labels(models_here: Path) -> None:
    lines("texts.jsonl", [{"text": "the cat sat here"}, {"text": "dog ran"}])
    found = arrays("llama", "texts.jsonl")
    assert found["input_ids"].tolist() == [ids("the cat sat here"), [*ids("dog ran"), 0, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert found["labels"].tolist() == [ids("the cat sat here"), [*ids("dog ran"), IGNORED, IGNORED]]


def test_prompts_do_not_count_and_completions_end(models_here: Path) -> None:
    lines("pairs.jsonl", [{"q": "the cat", "a": " sat here"}, {"q": "dog", "a": " ran"}])
    found = arrays("llama", "pairs.jsonl", "--columns", "prompt=q", "completion=a")
    assert found["labels"].tolist() == [
        [IGNORED] * 2 + ids("sat here </s>"),
        [IGNORED, *ids("ran </s>"), IGNORED, IGNORED],
    ]
    found = arrays("t5", "pairs.jsonl", "--columns", "prompt=q", "completion=a")
    assert found["input_ids"].tolist() == [ids("the cat"), [*ids("dog"), 0]]
    assert found["labels"].tolist() == [ids("sat here"), [*ids("ran"), IGNORED]]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_of_conversations_only_the_assistant_counts(models_here: Path, template: str) -> None:
    tokenizer(
        Path("llama"),
        chat_template=template.replace("{{ m['role'] }}", "{{ 'bot' if m['role'] == 'assistant' else 'user' }}"),
    )
    talk = [("user", "the cat"), ("assistant", "sat here"), ("user", "now"), ("assistant", "good")]
    lines("talk.jsonl", [{"messages": [{"role": role, "content": text} for role, text in talk]}])
    lines("talk.jsonl", [json.loads(Path("talk.jsonl").read_text())] * 2)
    found = arrays("llama", "talk.jsonl")
    assert found["input_ids"][0].tolist() == ids("user the cat bot sat here user now bot good")
    counted = found["labels"][0][found["labels"][0] != IGNORED].tolist()
    assert counted == ids("sat here good")


def test_classes_by_name_or_number_from_any_table(models_here: Path) -> None:
    rows = [("the cat", "here", "blame"), ("dog", "now there", "praise"), ("good", "bad", "2")]
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        with Path(f"table{suffix}").open("w", newline="") as file:
            writer = csv.writer(file, delimiter=separator)
            writer.writerows([("body", "second", "topic"), *rows])
    Path("table.json").write_text(
        json.dumps([dict(zip(("body", "second", "topic"), row, strict=True)) for row in rows])
    )
    words = ["--columns", "text=body", "text_pair=second", "label=topic"]
    first = arrays("bert", "table.csv", *words)
    assert first["labels"].tolist() == [1, 0, 2]
    assert first["input_ids"][0].tolist() == [*ids("[CLS] the cat [SEP] here [SEP]")]
    assert first["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1]
    for other in ("table.tsv", "table.json"):
        for name, array in arrays("bert", other, *words).items():
            assert torch.equal(array, first[name])


def test_masked_models_get_words_to_find(models_here: Path) -> None:
    lines("texts.jsonl", [{"text": "the cat sat here now"}, {"text": "dog ran"}] * 6)
    found, again = arrays("masked", "texts.jsonl"), arrays("masked", "texts.jsonl")
    hidden = found["labels"] != IGNORED
    assert hidden.any(dim=1).all() and (found["input_ids"][hidden] == WORDS.index("[MASK]")).all()
    assert not hidden[(found["attention_mask"] == 0) | torch.isin(found["input_ids"], torch.tensor([0, 2, 3]))].any()
    assert all(torch.equal(one, again[name]) for name, one in found.items())


def test_long_texts_are_cut_where_asked(models_here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines("texts.jsonl", [{"text": "the cat " * 30}, {"text": "dog ran"}])
    assert main(["data", "llama", "texts.jsonl", "-o", "a.safetensors", "--max-length", "8"]) == 0
    assert "1 of 2 examples are cut to 8 tokens" in capsys.readouterr().err
    assert load_file("a.safetensors")["input_ids"].shape == (2, 8)


def test_learners_take_the_file_and_its_arrays_alike(models_here: Path) -> None:
    words = ["the", "cat", "dog", "sat", "ran", "here", "there", "now", "good", "bad"]
    rng = np.random.default_rng(0)
    lines("texts.jsonl", [{"text": " ".join(rng.choice(words, 6))} for _ in range(30)])
    model = transformers.LlamaForCausalLM.from_pretrained("llama")
    for number in range(2):
        with torch.no_grad():
            for one in model.parameters():
                one.add_(torch.randn_like(one) * 0.05)
        save(model, Path(f"tuned{number}"))
    arrays("llama", "texts.jsonl")
    reports = []
    for data in ("texts.jsonl", "arrays.safetensors"):
        assert main(["ofasd", "--base", "llama", "--sources", "tuned0", "tuned1", "--data", data, "-o", f"of-{data}.d",
                     "--steps", "3", "--controls", "cheap", "-q"]) == 0  # fmt: skip
        reports.append(json.loads(Path(f"of-{data}.d/report.json").read_text()))
        assert (
            main(["stats", "llama", "--data", data, "-o", f"{data}.stats.safetensors", "--labels", "given", "-q"]) == 0
        )
    assert reports[0]["coefficients"] == reports[1]["coefficients"] and reports[0]["test"] == reports[1]["test"]
    first, second = (load_file(f"{data}.stats.safetensors") for data in ("texts.jsonl", "arrays.safetensors"))
    assert all(torch.equal(one, second[name]) for name, one in first.items())
    Path("recipe.yaml").write_text(
        "models: {base: ./llama, a: ./tuned0}\nmerge: {method: task_arithmetic, base: base, sources: {a: 0.5}}\n"
    )
    for data in ("texts.jsonl", "arrays.safetensors"):
        assert (
            main(
                [
                    "search",
                    "recipe.yaml",
                    "--over",
                    "merge.sources.a=0,1",
                    "--data",
                    data,
                    "-o",
                    f"se-{data}.searched",
                    "-q",
                ]
            )
            == 0
        )
    scores = [
        json.loads(Path(f"se-{data}.searched/report.json").read_text())["scores"]
        for data in ("texts.jsonl", "arrays.safetensors")
    ]
    assert scores[0] == scores[1]


def test_a_folder_of_images_by_class(models_here: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, id2label={0: "dog", 1: "cat"},
                                    label2id={"dog": 0, "cat": 1})  # fmt: skip
    save(transformers.ViTForImageClassification(config), Path("vit"))
    for name, shade in (("cat", 0), ("dog", 255)):
        Path("photos", name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (12 + number, 10), (shade, shade, 128)).save(Path("photos", name, f"{number}.png"))
    found = arrays("vit", "photos")
    assert found["labels"].tolist() == [1, 1, 0, 0] and found["pixel_values"].shape == (4, 3, 8, 8)
    assert found["pixel_values"][0, 0].unique().tolist() == [-1.0] and found["pixel_values"][
        3, 1
    ].unique().tolist() == [1.0]
    settings = {"size": {"shortest_edge": 10}, "do_center_crop": True, "crop_size": {"height": 8, "width": 8},
                "image_mean": [0.0, 0.0, 0.5], "image_std": [1.0, 1.0, 2.0]}  # fmt: skip
    Path("vit/preprocessor_config.json").write_text(json.dumps(settings))
    found = arrays("vit", "photos")
    assert found["pixel_values"].shape == (4, 3, 8, 8)
    assert found["pixel_values"][:, 2].unique().tolist() == pytest.approx([(128 / 255 - 0.5) / 2], rel=1e-4)
    Path("photos/cat/1.png").write_bytes(b"no image")
    assert main(["data", "vit", "photos", "-o", "b.safetensors"]) == 3
    Path("photos/cat").rename("photos/cow")
    assert main(["data", "vit", "photos", "-o", "b.safetensors"]) == 3 and not Path("b.safetensors").exists()


def write_rows(rows: Any) -> None:
    Path("d.jsonl").write_text(rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows)))


TEXT = [{"text": "the cat", "label": "praise"}, {"text": "dog", "label": "blame"}]


@pytest.mark.parametrize(
    ("model", "rows", "more", "code", "message"),
    [
        ("bert", [{"body": "the cat"}], [], 3, "its columns are body; examples are text, prompt and"),
        ("bert", TEXT, ["--columns", "text=body"], 3, "it has no column body; the columns are text, label"),
        ("bert", TEXT, ["--columns", "words=text"], 2, "there is no role 'words'"),
        ("bert", TEXT, ["--columns", "text="], 2, "names no column"),
        ("bert", [*TEXT, {"text": "dog"}], [], 3, "line 3 has no label"),
        ("bert", [*TEXT, {"text": "  ", "label": 0}], [], 3, "line 3: text is empty"),
        ("bert", [*TEXT, {"text": 4, "label": 0}], [], 3, "line 3: text is no text"),
        ("bert", [*TEXT, {"text": "dog", "label": "anger"}], [], 3, 'line 3: the label "anger" is unknown to the'),
        ("bert", [*TEXT, {"text": "dog", "label": 7}], [], 3, "whose classes are praise, blame, neither"),
        ("bert", [{"prompt": "the", "completion": "cat"}], [], 3, "prompts and completions are for models that write"),
        ("bert", '{"text": "the cat"}\n{"text"', [], 3, "line 2 is no JSON"),
        ("bert", '{"text": "the", "label": 1, "text": "cat"}', [], 3, "line 1 has text twice"),
        ("t5", [{"prompt": "the"}], [], 3, "line 1 has no completion; the columns are prompt; say which column"),
        ("bert", "[1]\n", [], 3, "line 1 is no JSON object with columns"),
        ("bert", "", [], 3, "it holds no examples"),
        ("llama", [{"text": "the cat " * 40}], [], 3, "line 1 is 80 tokens long, the model has 32 positions"),
        ("t5", [{"text": "the cat"}], [], 3, "the model answers a text with a text"),
        ("llama", [{"messages": "the cat"}], [], 3, "line 1: messages are a list of objects with role and content"),
        ("llama", [{"messages": [{"role": "user", "content": "cat"}]}], [], 3, "no message is of the assistant"),
        ("llama", [{"text": "the", "messages": []}], [], 3, "it has text and messages"),
        ("llama", TEXT, ["--tokenizer", "nowhere"], 3, "nowhere: no such folder of a tokenizer"),
        ("llama", TEXT, ["--tokenizer", "photos"], 3, "photos: no tokenizer is beside the model"),
        ("llama", [{"text": "the cat"}], ["--tokenizer", "wide"], 3, "the tokenizer gives ids up to 23, and the"),
        ("t5", [{"prompt": "a", "completion": "bot"}], ["--tokenizer", "wide"], 3, "gives ids up to 33, and the model"),
        ("llama", [{"text": "le chat est ici now"}], [], 3, "llama: 4 of the 5 tokens of d.jsonl are unknown to the"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line(
    models_here: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    rows: Any,
    more: list[str],
    code: int,
    message: str,
) -> None:
    Path("photos").mkdir()
    tokenizer(Path("wide"), [*WORDS[:6], *"abcdefghijklmnop", *WORDS[6:]])
    write_rows(rows)
    assert main(["data", model, "d.jsonl", "-o", "a.safetensors", *more]) == code
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and message in said[0]
    assert not Path("a.safetensors").exists()


def test_messages_without_a_template_are_refused(models_here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer(Path("plain"))
    write_rows([{"messages": [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]}])
    assert main(["data", "llama", "d.jsonl", "-o", "a.safetensors", "--tokenizer", "plain"]) == 3
    assert "messages need a chat template, and the tokenizer has none" in capsys.readouterr().err


def test_a_learner_says_what_the_data_lacks(models_here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("llama/chat_template.jinja").unlink()
    model = "model.layers.0.self_attn.q_proj.weight"
    for name, kind in (("recipe", "llama"), ("classes", "bert")):
        Path(f"{name}.yaml").write_text(
            f"models: {{a: ./{kind}, b: ./{kind}}}\nmerge: {{method: linear, sources: {{a: 0.5, b: 0.5}}}}\n"
        )
    Path("plan.yaml").write_text(
        "models: {a: {weights: ./llama, data: twice.csv}, b: {weights: ./llama}}\n"
        "transfer: {target: a, source: b, mode: frozen, steps: 2, pairs: "
        f"[{{target: {model}, source: {model}, rank: 2}}]}}\noutput: ./out\n"
    )
    write_rows([{"messages": [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]}] * 9)
    lines("plain.jsonl", [{"text": "the cat"}, {"text": "dog"}] * 4)
    Path("twice.csv").write_text("text,text\nthe cat,dog\n")
    np.savez("floats.npz", input_ids=np.ones((8, 4), np.float32), labels=np.arange(32).reshape(8, 4) % 5)
    search = ["search", "--over", "merge.sources.a=0,1", "-o", "out", "-q"]
    for words, message in [
        ([*search, "recipe.yaml", "--data", "d.jsonl"], "the merged model: messages need a chat template"),
        ([*search, "recipe.yaml", "--data", "floats.npz"], "input_ids are float32, and tokens are whole numbers"),
        ([*search, "classes.yaml", "--data", "plain.jsonl"], "it has no labels, and the model predicts classes or"),
        (["transfer", "plan.yaml", "-q"], "twice.csv: the first line names the column text twice"),
        (["transfer", "plan.yaml", "-q"], "no prediction of the validation data has a label"),
    ]:
        if "validation" in message:
            Path("twice.csv").write_text("text\n" + "the\n" * 4 + "dog\n" * 4)
        capsys.readouterr()
        assert main(words) == 3
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and message in said[0]
        assert not Path("out").exists()


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_says_what_it_needs(models_here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("d.parquet").write_bytes(b"PAR1")
    assert main(["data", "llama", "d.parquet", "-o", "a.safetensors"]) == 2
    assert 'pip install "pxmerge[parquet]"' in capsys.readouterr().err


def test_a_teacher_with_another_vocabulary_is_refused(models_here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows([{"text": "the cat"}, {"text": "dog ran"}] * 10)
    shutil.copytree("llama", "other")
    tokenizer(Path("other"), [*WORDS[:6], *reversed(WORDS[6:])])
    assert main(["ofasd", "--base", "llama", "--sources", "other", "--data", "d.jsonl", "-o", "out"]) == 4
    assert "other: its vocabulary is another than that of llama: 12 tokens differ" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_prototypes_of_texts_are_those_of_the_arrays_made_of_them(models_here: Path) -> None:
    """Classes go on over the tasks, which the head of a classifier has no names for."""
    import peft

    inner = transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False)
    save(inner, models_here / "encoder")
    tokenizer(models_here / "encoder", model_input_names=["input_ids", "attention_mask"])
    wrapped = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    wrapped.save_pretrained("lora")
    for state in ("texts", "arrays"):
        assert main(["acmap", "merge", "lora", "--state", state, "-q"]) == 0
    rows = [("the cat sat", 7), ("dog ran here now", 9), ("good cat", 7), ("bad dog there", 9)]
    lines("task.jsonl", [{"text": text, "kind": kind} for text, kind in rows])
    words = ["--columns", "label=kind"]
    given = ["--base", "encoder", "--pool", "mean", "--device", "cpu"]
    assert (
        main(["acmap", "map", "--state", "texts", "--data", "task.jsonl", *words, *given, "-o", "t.safetensors"]) == 0
    )
    made = arrays("encoder", "task.jsonl", *words)
    assert made["labels"].tolist() == [7, 9, 7, 9]
    map_arrays = ["acmap", "map", "--state", "arrays", "--data", "arrays.safetensors", *given, "-o", "a.safetensors"]
    assert main(map_arrays) == 0
    texts, same = load_file("t.safetensors"), load_file("a.safetensors")
    assert texts.keys() == same.keys() and all(torch.equal(texts[name], same[name]) for name in same)
    classify = ["acmap", "classify", "--state", "texts", "--data", "task.jsonl", *words, *given]
    assert main([*classify, "-o", "predictions.npz"]) == 0
    assert main(["acmap", "map", "--state", "arrays", "--data", "arrays.safetensors", *words, *given]) == 2
