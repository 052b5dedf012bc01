"""The table of the field's methods says what is here, and leaves none out."""

from __future__ import annotations

import re
from pathlib import Path

from mergekit_px.cli._commands import all_commands
from mergekit_px.methods import load_methods

PAGE = (Path(__file__).parents[2] / "docs" / "field.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.partition("## Beside ")[0].splitlines()
    if line.startswith("| ") and not line.startswith(("| method", "| ---"))
]
SETTINGS = {"weights: [0.2, 1.0]", "rename:"}


def names(row: list[str]) -> set[str]:
    return set(re.findall("`([^`]+)`", row[-1]))


def test_every_method_has_its_place_and_everything_named_exists() -> None:
    named = set().union(*map(names, ROWS))
    own = {name for name, method in load_methods().items() if method.origin.startswith("mergekit_px.")}
    assert not own - named, "methods that the table leaves out"
    assert not named - SETTINGS - own - set(all_commands()), "what the table names and is not here"


def test_every_row_is_here_or_says_why_not() -> None:
    for row in ROWS:
        assert len(row) == 8 and row[2], row
        settled = names(row) or (row[-1].startswith("no") and (len(row[-1]) > 10 or row[2][0] in "DEF"))
        assert settled, f"{row[0]}: neither here nor a reason"


def test_papers_are_those_of_the_declarations() -> None:
    for row in ROWS:
        for name in names(row) & set(load_methods()):
            paper = load_methods()[name].paper or ""
            if row[1] and paper.startswith("arXiv:") and name != "passthrough":
                assert paper.removeprefix("arXiv:") in row[1], (name, paper, row[1])
