"""One vocabulary in README, pages, help and messages: that of the field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS = {
    r"thinn(ed|ing)": "sparsified",
    r"share of elements": "fraction of elements",
    r"strength of a direction|the same strength": "singular value",
    r"carr(y|ies|ied) out (a|the|its) (recipe|plan)s?": "run",
    r"cannot be meant": "invalid",
    r"output place": "path",
    r"told once": "reported once",
    r"befell|befall": "affected",
    r"in the mean(?! of)\b": "on average",
    r"as far as their weights say": "in proportion to the weights",
    r"hyper-?parameters?": "settings",
    r"delta weights": "task vector",
    r"finetun\w*(?=[ ,.;:)]|$)(?<!\./finetuned)": "fine-tune",
}
"""What the project does not say -> what it says."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted((ROOT / "mergekit_px").rglob("*.py"))


@pytest.mark.parametrize(("word", "better"), WORDS.items(), ids=WORDS.values())
def test_the_field_s_words_are_used(word: str, better: str) -> None:
    pattern = re.compile(word, re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in (*PAGES, *SOURCES)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"say {better}: {found}"
