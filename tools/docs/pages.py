"""All that is generated in a checkout, by path."""

from __future__ import annotations

from pathlib import Path

from tools.docs.api import api_page
from tools.docs.commands import built_in_module, command_pages, command_tables, commands_page
from tools.docs.errors import errors_page
from tools.docs.markdown import fill
from tools.docs.methods import methods_page
from tools.docs.recipes import key_tables, output_schema_file, schema_file


def generated_pages(root: Path) -> dict[Path, str]:
    """What the generated pages, and the hand-written pages with generated parts, should hold.

    Raises:
        OSError: a hand-written page is missing.
        ValueError: the marks of a hand-written page are not those that are generated.
    """
    docs = root / "docs"
    return {
        root / "README.md": fill(_text(root / "README.md"), {"commands": command_tables("docs/cli/")}),
        docs / "recipe.md": fill(_text(docs / "recipe.md"), key_tables()),
        docs / "recipe.schema.json": schema_file(),
        docs / "output.schema.json": output_schema_file(),
        docs / "methods.md": methods_page(),
        docs / "cli.md": commands_page(),
        **{docs / "cli" / name: page for name, page in command_pages().items()},
        docs / "errors.md": errors_page(),
        docs / "api.md": api_page(),
        root / "mergekit_px" / "declare" / "built_in.py": built_in_module(),
    }


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
