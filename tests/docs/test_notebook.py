"""The notebook runs from its first cell to its last, and what it shows is short."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    names: dict[str, Any] = {}
    shown = [_run("".join(cell["source"]), names) for cell in cells if cell["cell_type"] == "code"]
    tables = [text for text in shown if text.startswith("<table>")]
    assert len(tables) == 4 and not any("<script" in table for table in tables)
    assert "math" in tables[0] and "cosine" in tables[0]
    assert all(len(text.splitlines()) == 1 for text in shown if text)
    printed = capsys.readouterr().out
    assert "method: " in printed and "'ties'" in printed
    assert not any(cell.get("outputs") for cell in cells)


def _run(source: str, names: dict[str, Any]) -> str:
    """Run a cell; what a notebook would show of the expression at its end."""
    body = ast.parse(source)
    last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
    exec(compile(body, NOTEBOOK.name, "exec"), names)
    if last is None:
        return ""
    assert isinstance(last, ast.Expr)
    value = eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)
    if value is None:
        return ""
    return str(value._repr_html_()) if hasattr(value, "_repr_html_") else repr(value)
