"""Weights for the checkpoints of a run, in order of step: given, uniform, or standing for a decay of the learning rate.

A mean of checkpoints ``sum_j c_j x_j`` is the first checkpoint plus the later updates, each multiplied by the sum of
the weights from there on: as if the learning rate had decayed (WSM, arXiv:2507.17634, section 3). With ``n``
checkpoints and a decay ``f`` from ``f(0) = 1`` to ``f(1) = 0``, the weights are ``c_j = f(j/n) - f((j+1)/n)``,
``j = 0 ... n-1``, oldest first; they add up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from mergekit_px.errors import UsageError

DECAYS: Mapping[str, tuple[str, Callable[[float], float]]] = {
    "linear": ("1 - t", lambda t: 1.0 - t),
    "cosine": ("(1 + cos(pi t)) / 2", lambda t: 0.5 * (1.0 + math.cos(math.pi * t))),
    "1-sqrt": ("1 - sqrt(t)", lambda t: 1.0 - math.sqrt(t)),
}
"""The decays that the paper derives weights for, as formula and function."""

WORDS = ("uniform", *DECAYS, "ema:DECAY")


def run_weights(words: Sequence[str], count: int) -> list[float]:
    """The weights of ``count`` checkpoints from what the command line says: a word, or numbers.

    Raises:
        UsageError: an unknown word, a decay outside 0 to 1, or not one number for each checkpoint.
    """
    word = words[0]
    if len(words) == 1 and word in ("uniform", "linear"):
        return [1.0] * count  # A linear decay gives equal weights, which are exact so.
    if len(words) == 1 and word in DECAYS:
        decay = DECAYS[word][1]
        return [decay(place / count) - decay((place + 1) / count) for place in range(count)]
    if len(words) == 1 and word.startswith("ema:"):
        kept = ema_decay(word)
        return [(1.0 if place == 0 else 1.0 - kept) * kept ** (count - 1 - place) for place in range(count)]
    numbers = [_number(each) for each in words]
    if len(numbers) != count:
        raise UsageError(
            f"--weights has {len(numbers)} values for {count} checkpoints", hint="give one for each, or a word"
        )
    return numbers


def ema_decay(word: str) -> float:
    """The decay of ``ema:0.9``. Raises ``UsageError``."""
    text = word.removeprefix("ema:")
    try:
        decay = float(text)
    except ValueError:
        decay = math.nan
    if not 0 < decay < 1:
        raise UsageError(f"--weights: the decay of an EMA is a number between 0 and 1, not '{text[:40]}'")
    return decay


def _number(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"--weights: '{word[:40]}' is neither a number nor one of {', '.join(WORDS)}")
    return number
