"""``python -m mergekit_px`` is ``pxmerge``."""

from __future__ import annotations

import sys

from mergekit_px.cli import main

if __name__ == "__main__":
    sys.exit(main())
