from __future__ import annotations

import sys
from pathlib import Path

# The makers of layouts are those that the tests of plan and storage have too.
sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("layouts", "plan", "storage")]
