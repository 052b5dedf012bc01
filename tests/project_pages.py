"""Pages of the documentation whose blocks are run."""

from __future__ import annotations

import re
from collections.abc import Iterator


def marked_blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """(mark, language, text) of each code block that a comment marks to be run or to be a file."""
    pattern = r"<!-- (run|file: [\w.]+) -->\n```(\w+)\n(.*?)```\n"
    return ((found[1], found[2], found[3]) for found in re.finditer(pattern, page, re.DOTALL))
