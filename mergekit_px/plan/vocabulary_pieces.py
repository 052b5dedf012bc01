"""Tokens of one vocabulary in another: by their text, and cut into pieces that the other one has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from mergekit_px.plan.vocabulary_files import Tokenizer, text_of

_LONGEST = 128
"""Bytes of a piece that is looked for; longer ones are runs of spaces and the like."""


class Pieces:
    """The tokens of a model, found by the text that they stand for.

    Args:
        tokenizer: what lists them.
        rows: how many of them the model has rows for.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int) -> None:
        self._tokenizer = tokenizer
        self._rows = rows

    @cached_property
    def _places(self) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        for place, token in sorted(self._tokenizer.tokens.items()):
            if place < self._rows and token not in self._tokenizer.added:
                found.setdefault(text_of(token, self._tokenizer), place)
        found.pop(b"", None)
        return found

    def whole(self, token: str, other: Tokenizer) -> int | None:
        """The row of the token that stands for the same text as one of another vocabulary."""
        if other.kind == self._tokenizer.kind or token in other.added or token in self._tokenizer.added:
            place = self._tokenizer.ids.get(token)
            return place if place is not None and place < self._rows else None
        return self._places.get(text_of(token, other))

    def cut(self, token: str, other: Tokenizer) -> Sequence[int]:
        """The rows of the longest pieces, from the left, of a token's text; what no token has is passed over."""
        text, rows, start = text_of(token, other), [], 0
        while start < len(text):
            for end in range(min(len(text), start + _LONGEST), start, -1):
                place = self._places.get(text[start:end])
                if place is not None:
                    rows.append(place)
                    start = end
                    break
            else:
                start += 1
        return rows
