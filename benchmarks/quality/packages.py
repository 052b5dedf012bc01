"""Eight tasks of real text: what a Debian package is, from the line that describes it."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

_FIELD = re.compile(r"^([A-Z][A-Za-z0-9-]*): ?(.*(?:\n .*)*)", re.MULTILINE)


@dataclass(frozen=True)
class Task:
    """Classes of one facet of Debian's tags, or sections of the archive; a package of two of them is in neither."""

    facet: str
    classes: Sequence[str]


def _task(facet: str, classes: str) -> Task:
    return Task(facet, classes.split())


TASKS: Mapping[str, Task] = {
    "applications": _task("section", "games graphics sound mail math science editors database"),
    "languages": _task("section", "perl ruby haskell golang rust javascript java lisp"),
    "desktops": _task("section", "gnome kde x11 fonts localization web video text"),
    "system": _task("section", "admin net utils devel misc otherosfs kernel comm"),
    "field": _task(
        "field", "mathematics biology finance statistics geography physics linguistics electronics chemistry"
    ),
    "works-with": _task("works-with", "text audio image mail file software:source db video"),
    "use": _task("use", "gameplaying converting editing checking viewing monitor configuring"),
    "role": _task("role", "program shared-lib devel-lib documentation app-data plugin metapackage"),
}


@dataclass(frozen=True)
class Package:
    line: str
    source: str
    labels: frozenset[str]
    """``facet::class`` of each tag and of the section."""


@cache
def packages() -> tuple[Package, ...]:
    """What the package lists of this machine describe, by name.

    Raises:
        RuntimeError: there are no lists, or nearly none.
    """
    found = {package.line: package for package in _parsed()}
    if len(found) < 20_000:
        raise RuntimeError(f"{len(found)} package descriptions are too few; apt-get update fetches Debian's lists")
    return tuple(found[line] for line in sorted(found))


def paragraphs() -> Iterator[tuple[dict[str, str], str]]:
    """What the package lists have of each package: its fields, and the paragraph as it stands.

    Raises:
        RuntimeError: there are no lists.
    """
    try:
        listed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"the text suites need Debian's package lists: {error}") from None
    for paragraph in listed.split("\n\n"):
        fields = dict(_FIELD.findall(paragraph))
        if "Package" in fields:
            yield fields, paragraph


def _parsed() -> Iterator[Package]:
    for fields, _ in paragraphs():
        if "Description" in fields:
            tags = re.split(r",\s*", fields.get("Tag", ""))
            yield Package(
                line=fields["Description"].split("\n")[0],
                source=fields.get("Source", fields["Package"]).split()[0],
                labels=frozenset([*tags, f"section::{fields.get('Section', '')}"]),
            )


def part_of(source: str, seed: int) -> str:
    """Which part the packages of one source belong to, the same for all tasks: they describe one another."""
    place = int.from_bytes(hashlib.sha256(f"{seed} {source}".encode()).digest()[:4]) / 2**32
    return "train" if place < 0.5 else "validation" if place < 0.65 else "test"


def examples(task: Task, part: str, count: int, seed: int) -> tuple[list[str], list[int]]:
    """Lines and classes; rare classes are drawn more often than they are there, by the root of their number."""
    found = []
    for package in packages():
        labels = [place for place, name in enumerate(task.classes) if f"{task.facet}::{name}" in package.labels]
        if len(labels) == 1 and part_of(package.source, seed) == part:
            found.append((package.line, labels[0]))
    labels = np.array([label for _, label in found])
    shares = 1 / np.sqrt(np.bincount(labels)[labels])
    generator = np.random.default_rng([seed, *part.encode()])
    chosen = generator.choice(len(found), min(count, len(found)), replace=False, p=shares / shares.sum())
    return [found[row][0] for row in chosen], labels[chosen].tolist()
