"""A hook of mkdocs: the README is the first page, and links that leave the pages lead to what they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_OUTSIDE = re.compile(
    r"\[([^\]]+)\]\((?:\.\./)?((?:recipes|benchmarks|tests|mergekit_px|tools)[^)]*|[A-Z]+(?:\.md)?)\)"
)


def on_config(config: Any) -> Any:
    """The pages of commands, and those that the navigation does not name, stand at its end."""
    commands = sorted(f"cli/{path.name}" for path in (ROOT / "docs" / "cli").glob("*.md"))
    config.nav.append({"Commands": commands})
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    config.nav.append({"More": [page for page in pages if page not in str(config.nav)]})
    if not config.nav[-1]["More"]:
        del config.nav[-1]
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Add the README as ``index.md``, its links seen from the folder of the pages."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=re.sub(r"\((?:\./)?docs/", "(", text)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Files of the repository are not on the site: their names are left, without links."""
    return _OUTSIDE.sub(r"\1", markdown)
