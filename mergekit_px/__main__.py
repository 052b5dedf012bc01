"""``python -m mergekit_px`` is ``pxmerge``."""

from __future__ import annotations

from mergekit_px.cli import run

if __name__ == "__main__":
    run()
