"""Three domains of text that a machine with Debian and Python has: source code, manual pages, the list of packages."""

from __future__ import annotations

import gzip
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.quality.packages import paragraphs, part_of

_WINDOW = 1500
"""Characters of a text at least, which the tokenizer cuts."""
_NOISE = re.compile(r"^(Filename|Size|MD5sum|SHA256|Description-md5|Installed-Size): .*\n?", re.MULTILINE)


def _python() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library)
        if not {"site-packages", "test", "tests", "idle_test", "pydoc_data"} & set(place.parts):
            yield place.parts[0], path.read_text("utf-8", errors="replace")


def _manual() -> Iterator[tuple[str, str]]:
    """The pages of one program are one source, by the first word of their names."""
    for path in sorted(Path("/usr/share/man").glob("man*/*.gz")):
        if not path.is_symlink() and path.stat().st_size > 1000:
            yield re.split(r"[-_.]", path.name)[0], gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")


def _packages() -> Iterator[tuple[str, str]]:
    for fields, text in paragraphs():
        yield fields.get("Source", fields["Package"]).split()[0], _NOISE.sub("", text)


DOMAINS: Mapping[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "python": _python,
    "manual": _manual,
    "packages": _packages,
}
"""Each gives the source that a text is from, and the text."""


@cache
def _texts(domain: str) -> tuple[tuple[str, str], ...]:
    return tuple(DOMAINS[domain]())


def texts(domain: str, part: str, count: int, seed: int) -> list[str]:
    """Windows of the texts of a part, each from another text; all texts of a source are in one part.

    Raises:
        RuntimeError: the machine has too few.
    """
    generator = np.random.default_rng([seed, *f"{domain} {part}".encode()])
    known = [text for source, text in _texts(domain) if part_of(source, seed) == part and len(text) >= _WINDOW // 3]
    if len(known) < count:
        raise RuntimeError(f"{len(known)} texts of the domain {domain} are too few for its {part} part of {count}")
    chosen = [known[row] for row in generator.choice(len(known), count, replace=False)]
    return [_window(text, int(generator.integers(max(len(text) - _WINDOW, 1)))) for text in chosen]


def _window(text: str, start: int) -> str:
    """From the first line that begins at or after a place."""
    begin = 0 if start == 0 else text.find("\n", start) + 1
    return text[begin : begin + _WINDOW]
