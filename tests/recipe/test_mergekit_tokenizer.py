"""mergekit's keys about tokenizers as a recipe's section."""

from __future__ import annotations

import pytest

from mergekit_px.errors import RecipeError
from mergekit_px.recipe.load import parse_recipe
from mergekit_px.recipe.loaded import LoadedRecipe
from mergekit_px.recipe.model import Tokenizer, TokenRow

PAIR = "[{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.5}}]"
LINEAR = f"merge_method: linear\nmodels: {PAIR}\n"
SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.5}\n"


def load(text: str) -> LoadedRecipe:
    return parse_recipe(text, name="m.yml")


@pytest.mark.parametrize(
    ("lines", "expected", "told"),
    [
        ("tokenizer_source: base", "c", "where mergekit leaves zeros"),
        ("tokenizer_source: a", "a", "where mergekit leaves zeros"),
        ("tokenizer_source: union", "union", "where mergekit leaves zeros"),
        ("tokenizer: {}", "union", ""),
        ("tokenizer: {source: base}", "c", ""),
        ("tokenizer_source: org/other", "other", ""),
    ],
)
def test_tokenizers(lines: str, expected: str | None, told: str) -> None:
    loaded = load(f"merge_method: task_arithmetic\nbase_model: c\nmodels: {PAIR}\n{lines}\n")
    tokenizer = loaded.recipe.tokenizer
    assert (tokenizer and tokenizer.from_) == expected
    assert tokenizer is None or (tokenizer.base, tokenizer.pad_to) == ("c", 1)
    assert told in " ".join(loaded.differences)


def test_single_tokens_and_padding() -> None:
    loaded = load(
        f"merge_method: linear\nmodels: {PAIR}\n"
        "tokenizer:\n  pad_to_multiple_of: 8\n  tokens:\n    x: {source: a, force: true}\n"
        "    y: {source: {kind: zero}}\n    z: {source: {kind: model_token, model: b, token_id: 3}}\n"
    )
    assert loaded.recipe.tokenizer == Tokenizer(
        from_="union",
        tokens={
            "x": TokenRow(model="a", force=True),
            "y": TokenRow(kind="zero"),
            "z": TokenRow(model="b", id=3),
        },
        pad_to=8,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SLERP + "tokenizer: {source: base, tokens: {x: {}}}", "m.yml:5:39: 'source' is missing for 'x'"),
        (
            SLERP + "tokenizer: {source: base, tokens: {x: {source: {kind: model_token, model: a}}}}",
            "'source' of 'x' must be {kind: zero}, or {kind: model_token} with a model and",
        ),
        (
            SLERP + "tokenizer: {source: base, pad_to_multiple_of: 0}",
            "'pad_to' must be a whole number from 1 on, not 0",
        ),
        (SLERP + "tokenizer_source: a\ntokenizer: {source: a}", "either tokenizer_source or tokenizer, not both"),
        (LINEAR + "tokenizer_source: base", "the tokenizer of the base is wanted, and there is no base_model"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(text)
    assert message in str(caught.value)
