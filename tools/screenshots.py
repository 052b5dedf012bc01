"""``python -m tools.screenshots``: the pictures of docs/report.md, of a merge that is made for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from mergekit_px.cli import main as pxmerge
from mergekit_px.testing.checkpoints import fine_tune, tiny_llama_config, tiny_llama_tensors, write_checkpoint

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
LAYERS = 32
SIZES = {"report.png": (1000, 1500, ()), "report-dark.png": (400, 1500, ("--force-dark-mode",))}
"""Picture -> width and height of the window, and more of the browser's options."""
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def main() -> int:
    """Make the merge, its report and a comparison, and take the pictures; needs Chromium and matplotlib."""
    browser = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        print("no Chromium was found", file=sys.stderr)
        return 2
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        _write_models()
        merged = pxmerge(
            ["ties", "--base", "base", "--sources", "math", "code", "--density", "0.4", "--report", "page.html"]
        )
        words = ["compare", "base", "math", "code", "--picture", str(PICTURES / "compare.png"), "--quiet"]
        if merged or pxmerge(words):
            return 1
        for name, (width, height, more) in SIZES.items():
            options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}", *more]
            picture = f"--screenshot={PICTURES / name}"
            address = Path("page.html").resolve().as_uri()
            subprocess.run([browser, *options, picture, address], check=True, stderr=subprocess.DEVNULL)
    return 0


def _write_models() -> None:
    """A base and two fine-tunes, one of which changed late layers more."""
    config = tiny_llama_config(layers=LAYERS)
    base = tiny_llama_tensors(layers=LAYERS)
    write_checkpoint("base", base, config=config)
    write_checkpoint("math", fine_tune(base, 1, size=0.006), config=config)
    code = fine_tune(base, 2)
    for name, tensor in code.items():
        words = name.split(".")
        late = int(words[2]) / LAYERS if words[1] == "layers" else 0.0
        code[name] = base[name] + (tensor - base[name]) * (1 + 6 * late * (1.5 if "mlp" in words else 1.0))
    write_checkpoint("code", code, config=config)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
