"""Which prediction a label belongs to, for each kind of language model, against what plain loops say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from mergekit_px.errors import InputError
from mergekit_px.learn.data import COUNTED, IGNORED, TARGETS, Examples, examples
from mergekit_px.learn.labels import read_labels
from mergekit_px.learn.models import load_model
from mergekit_px.learn.objective import loss_function, metric_function
from mergekit_px.plan.inputs import fetch_checkpoint

from .conftest import MAKERS, VOCABULARY, padded, task, texts

CPU = torch.device("cpu")
KINDS = {"llama": "next tokens", "gpt2": "next tokens", "bert": "tokens", "t5": "tokens"}


def read(module: nn.Module, arrays: dict[str, Tensor], **named: Any) -> Examples:
    return read_labels(module, examples(arrays, "data"), CPU, **named)[0]


def plain_loop(kind: str, module: Any, arrays: dict[str, Tensor]) -> tuple[float, float]:
    """Mean loss and accuracy in percent, example by example and token by token."""
    losses, right = [], []
    for row in range(len(arrays["labels"])):
        one = {name: array[row : row + 1] for name, array in arrays.items()}
        with torch.no_grad():
            logits = module(**one).logits[0]
        labels, mask = one["labels"][0], one["attention_mask"][0]
        for place, label in enumerate(labels.tolist()):
            where = place - 1 if KINDS[kind] == "next tokens" else place
            if label == IGNORED or where < 0 or (kind != "t5" and not mask[place]):
                continue
            losses.append(-float(functional.log_softmax(logits[where], dim=-1)[label]))
            right.append(int(logits[where].argmax()) == label)
    return sum(losses) / len(losses), 100 * sum(right) / len(right)


def test_loss_and_accuracy_are_those_of_a_plain_loop(family: tuple[str, Path]) -> None:
    kind, folder = family
    module = load_model(fetch_checkpoint(str(folder / "tuned1"))).module.eval()
    arrays = task(kind, 24, 5, 1)
    data, reading = read_labels(module, examples(arrays, "data"), CPU)
    assert (reading.kind, reading.classes, reading.own_loss) == (KINDS[kind], VOCABULARY, False)
    loss = loss_function("auto", allow_code=False)
    with torch.no_grad():
        found = [
            metric_function(name, loss, allow_code=False)(module, data.batches(7)) for name in ("loss", "accuracy")
        ]
    assert found == pytest.approx(plain_loop(kind, module, arrays), rel=1e-5)


@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_no_prediction_that_counts(family: tuple[str, Path], left: bool) -> None:
    kind, folder = family
    if left and kind in ("bert", "t5"):
        pytest.skip("its labels or positions begin at the left")
    module = load_model(fetch_checkpoint(str(folder / "base"))).module.eval()
    arrays = task(kind, 8, 3)
    loss = loss_function("auto", allow_code=False)
    found = []
    for given in (arrays, padded(arrays, left=left, label=IGNORED if kind == "t5" else 0)):
        data = read(module, given)
        assert int(data.arrays[COUNTED].sum()) == int((data.arrays[TARGETS] != IGNORED).sum())
        with torch.no_grad():
            found.append(float(loss(module, next(data.batches(8)))))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_prompts_take_no_part() -> None:
    torch.manual_seed(0)
    module = MAKERS["llama"]().eval()
    arrays = task("llama", 4, 0)
    arrays["labels"][:, :4] = IGNORED
    targets = read(module, arrays).arrays[TARGETS]
    assert (targets[:, :3] == IGNORED).all() and torch.equal(targets[:, 3], arrays["input_ids"][:, 4])
    assert (targets[:, -1] == IGNORED).all()


def test_without_labels_every_token_that_has_a_next_one_counts() -> None:
    torch.manual_seed(0)
    given = texts(5, 0, 0)
    data = Examples({**given, "labels": torch.full((5,), IGNORED)}, "data")
    counts = {}
    for kind in ("llama", "gpt2", "bert"):
        found, reading = read_labels(MAKERS[kind]().eval(), data, CPU, labelled=False)
        assert reading.kind == KINDS[kind]
        counts[kind] = int(found.arrays[COUNTED].sum())
    real = int(given["attention_mask"].sum())
    assert counts == {"llama": real - 5, "gpt2": real - 5, "bert": real}


class Own(nn.Module):
    """A model of a user that only gives scores: of each token alone, or of all tokens together."""

    def __init__(self, looks_around: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)
        self.looks_around = looks_around

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        states = self.embed(input_ids)
        return self.head(states + states.mean(dim=1, keepdim=True) if self.looks_around else states)


def test_models_without_a_loss_are_told_apart_by_what_they_see() -> None:
    torch.manual_seed(0)
    arrays = task("llama", 4, 0)
    assert read_labels(Own(False), examples(arrays, "data"), CPU)[1].kind == "next tokens"
    with pytest.raises(InputError, match="Own does not predict the next token: it would learn to copy"):
        read(Own(True), arrays)
    moved = {**arrays, "labels": (arrays["input_ids"] * 7 + 1) % VOCABULARY}
    assert read_labels(Own(False), examples(moved, "data"), CPU)[1].kind == "tokens"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("bert", lambda a: {**a, "labels": a["input_ids"]}, "BertForMaskedLM does not predict the next token"),
        (
            "t5",
            lambda a: {**a, "labels": a["input_ids"], "decoder_input_ids": a["input_ids"]},
            "the labels are the decoder_input_ids themselves",
        ),
        (
            "gpt2",
            lambda a: {**a, "labels": torch.cat([a["input_ids"][:, 1:], torch.full((6, 1), IGNORED)], 1)},
            "moved by one already, and GPT2LMHeadModel predicts the next token",
        ),
        ("llama", lambda a: {**a, "input_ids": a["input_ids"] + 9}, "the model has a vocabulary of 24"),
        (
            "llama",
            lambda a: {name: one.repeat(1, 8) for name, one in a.items()},
            "an example is 96 tokens long, the model has 64 positions",
        ),
        ("llama", lambda a: {**a, "attention_mask": a["attention_mask"] * 0}, "no prediction has a label"),
    ],
)
def test_labels_that_mean_nothing_are_refused(kind: str, change: Any, message: str) -> None:
    torch.manual_seed(0)
    arrays = change(task(kind, 6, 0))
    with pytest.raises(InputError, match=message):
        read(MAKERS[kind]().eval(), arrays)


def test_a_causal_class_whose_own_loss_moves_nothing_is_moved_once() -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32,
        max_position_embeddings=64, pad_token_id=0, dropout=0.0,
    )  # fmt: skip
    module = transformers.BartForCausalLM(config).eval()
    given = task("llama", 6, 0)
    assert read_labels(module, examples(given, "data"), CPU)[1].kind == "next tokens"
    moved = torch.cat([given["labels"][:, 1:], torch.full((6, 1), IGNORED)], dim=1)
    data, reading = read_labels(module, examples({**given, "labels": moved}, "data"), CPU)
    assert reading.kind == "tokens" and torch.equal(data.arrays[TARGETS], read(module, given).arrays[TARGETS])
