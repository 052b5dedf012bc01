"""What methods warn about during a run, reported once for all tensors."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_LOGGER = logging.getLogger("mergekit_px.methods")
_NUMBER = re.compile(r"\d+(\.\d+)?(e[-+]?\d+)?")


@dataclass
class Warnings(logging.Handler):
    """Gathers log records of the form ``tensor: text``; texts that differ in numbers alone are one."""

    found: dict[str, dict[str, str]] = field(default_factory=dict)
    """Text without its numbers -> tensor -> text."""

    def __post_init__(self) -> None:
        super().__init__(logging.WARNING)

    __hash__ = logging.Handler.__hash__

    def emit(self, record: logging.LogRecord) -> None:
        tensor, _, text = record.getMessage().partition(": ")
        # The handler's lock is held; the order of the tensors is that in which they were done.
        self.found.setdefault(_NUMBER.sub("#", text), {})[tensor] = text

    def lines(self) -> tuple[str, ...]:
        """One line for each kind of warning, in an order that does not depend on which tensor was done first."""
        lines = []
        for _, texts in sorted(self.found.items()):
            tensor, text = min(texts.items())
            others = len(texts) - 1
            also = f" (and the like in {others} other tensor{'s' if others > 1 else ''})" if others else ""
            lines.append(f"{tensor}: {text}{also}")
        return tuple(lines)


@contextmanager
def gathered_warnings() -> Iterator[Warnings]:
    """Gathers the methods' warnings instead of logging them one by one."""
    handler = Warnings()
    before = _LOGGER.propagate
    _LOGGER.addHandler(handler)
    _LOGGER.propagate = False
    try:
        yield handler
    finally:
        _LOGGER.propagate = before
        _LOGGER.removeHandler(handler)
