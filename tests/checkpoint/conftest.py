from __future__ import annotations

import sys
from pathlib import Path

# output_sample is both imported by the tests here and run as a child process.
sys.path.insert(0, str(Path(__file__).parent))
