"""The journal of an unfinished run."""

from __future__ import annotations

from pathlib import Path

from mergekit_px.checkpoint.journal import read_head


def test_below_a_file_there_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    assert read_head(tmp_path / "file" / "journal.jsonl") is None
