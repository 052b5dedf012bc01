from __future__ import annotations

import math

import pytest

from mergekit_px.errors import UsageError
from mergekit_px.recipe.decay import run_weights


@pytest.mark.parametrize("word", ["cosine", "1-sqrt", "linear", "uniform"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_weights_act_as_the_decay_of_their_name(word: str, count: int) -> None:
    formula = {
        "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
        "1-sqrt": lambda t: 1 - math.sqrt(t),
    }.get(word, lambda t: 1 - t)
    weights = run_weights([word], count)
    total = sum(weights)
    # What multiplies the update after checkpoint i - 1 is the sum of the weights from checkpoint i on.
    for place in range(count):
        assert sum(weights[place:]) / total == pytest.approx(formula(place / count), abs=1e-12)


def test_ema_is_the_recurrence() -> None:
    values, mean = [3.0, -1.0, 4.0, 10.0], 3.0
    for value in values[1:]:
        mean = 0.8 * mean + 0.2 * value
    weights = run_weights(["ema:0.8"], 4)
    assert sum(w * v for w, v in zip(weights, values, strict=True)) == pytest.approx(mean)
    assert sum(weights) == pytest.approx(1)


def test_numbers_are_taken_as_they_are() -> None:
    assert run_weights(["0.5", "-1", "2e0"], 3) == [0.5, -1.0, 2.0]
    assert run_weights(["4"], 1) == [4.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ema:1.5"], "between 0 and 1"),
        (["ema:"], "between 0 and 1"),
        (["ema:nan"], "between 0 and 1"),
        (["sqrt"], "neither a number nor one of uniform"),
        (["cosine", "linear"], "neither a number"),
        (["inf", "1"], "neither a number"),
        (["1"], "1 values for 2 checkpoints"),
    ],
)
def test_what_is_no_weight_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_weights(words, 2)
