"""``python -m tools.docs [--check]``, run in a checkout of the project."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import mergekit_px
from tools.docs.pages import generated_pages


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pages, or with ``--check`` name those that differ; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs", description="Generate the documentation.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page is out of date")
    check = parser.parse_args(argv).check
    root = Path(mergekit_px.__file__).parents[1]
    if not (root / "docs").is_dir():
        sys.stderr.write(f"{root} is not a checkout of the project: it has no docs folder\n")
        return 2
    pages = generated_pages(root)
    stale = [
        path for path, content in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != content
    ]
    needless = sorted(set((root / "docs" / "cli").glob("*.md")) - pages.keys())
    if check:
        for path in (*stale, *needless):
            sys.stderr.write(f"{path.relative_to(root)} differs from the declarations; run: make docs\n")
        return 1 if stale or needless else 0
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(pages[path], encoding="utf-8")
        sys.stderr.write(f"wrote {path.relative_to(root)}\n")
    for path in needless:
        path.unlink()
        sys.stderr.write(f"removed {path.relative_to(root)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
