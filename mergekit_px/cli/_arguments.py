"""Several values after one flag: ``--sources a b c`` is read as ``--sources a --sources b --sources c``.

A list option takes the words that follow it up to the next flag. Options that hold numbers or assignments take
only words of that form, so that ``--weights 0.5 0.3 recipe.yaml`` leaves the file alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mergekit_px.errors import UsageError

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?(?:nan|inf)"
_NUMBERS = re.compile(rf"(?:{_NUMBER})(?:,(?:{_NUMBER}))*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Several:
    """Marks an option as one that takes several words: ``Annotated[list[str], typer.Option(), Several("--set")]``.

    Attributes:
        flag: the option as written on the command line.
        of: which words belong to it.
    """

    flag: str
    of: Literal["text", "numbers", "assignments"] = "text"

    def takes(self, word: str) -> bool:
        """Whether ``word`` belongs to this option rather than to what follows."""
        if is_numbers(word):
            return self.of != "assignments"
        if word.startswith("-") and word != "-":
            return False
        return self.of == "text" or (self.of == "assignments" and "=" in word)


def is_numbers(word: str) -> bool:
    """Whether ``word`` is a number or a list of numbers separated by commas; a leading minus counts."""
    return _NUMBERS.fullmatch(word) is not None


def expand_lists(words: Sequence[str], options: Mapping[str, Several]) -> list[str]:
    """``words`` with the flag of each list option repeated before each of its values.

    Args:
        options: list options by flag. Everything after ``--`` is left as it is.

    Raises:
        UsageError: a list option without a value.
    """
    expanded: list[str] = []
    current: Several | None = None
    for position, word in enumerate(words):
        if word == "--":
            return [*expanded, *words[position:]]
        flag, has_value, _ = word.partition("=")
        if flag in options:
            current = options[flag]
            if has_value:
                expanded.append(word)
            elif _is_last(words, position):
                raise UsageError(f"{flag} needs at least one value")
            elif not current.takes(words[position + 1]):
                expanded.append(word)  # The command takes the next word as its value and says what is wrong with it.
                current = None
        elif current is not None and current.takes(word):
            expanded.append(f"{current.flag}={word}")
        else:
            current = None
            expanded.append(word)
    return expanded


def _is_last(words: Sequence[str], position: int) -> bool:
    """Whether a flag or nothing follows."""
    following = words[position + 1 : position + 2]
    return not following or (following[0].startswith("-") and following[0] != "-" and not is_numbers(following[0]))
