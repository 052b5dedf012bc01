"""``python -m tools.screenshots``: the pictures in docs of reports and differences, of results made for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import yaml

from mergekit_px.cli import main as pxmerge
from mergekit_px.testing.checkpoints import fine_tune, tiny_llama_config, tiny_llama_tensors, write_checkpoint

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
LAYERS, FEW = 32, 8
"""Of the models that are merged, and of those that are trained."""
DARK = "--force-dark-mode"
PAGES = {
    "report.png": ("merge.html", 1000, 1500, ()),
    "report-dark.png": ("merge.html", 400, 1500, (DARK,)),
    "report-experts.png": ("experts.html", 1200, 2300, ()),
    "ofasd.png": ("ofasd.html", 1000, 1250, ()),
    "tune.png": ("tune.html", 1000, 1500, ()),
    "align.png": ("align.html", 1000, 1500, ()),
    "search.png": ("search.html", 1000, 1150, ()),
}
"""Picture -> its page, width and height of the window, and more of the browser's options."""
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_RECIPE = {
    "pxmerge": 1,
    "models": {"base": "few-base", "math": "few-math", "code": "few-code"},
    "merge": {"method": "task_arithmetic", "base": "base", "sources": {"math": 0.5, "code": 0.5}},
}


def main() -> int:
    """Make the results and their pages, and take the pictures; needs Chromium and the extra "demo"."""
    browser = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        print("no Chromium was found", file=sys.stderr)
        return 2
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        _write_models()
        for words in _lines():
            if pxmerge(words):
                print(f"failed: pxmerge {' '.join(words)}", file=sys.stderr)
                return 1
        shutil.copyfile("spectra.png", PICTURES / "spectra.png")
        for name, (page, width, height, more) in PAGES.items():
            options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}", *more]
            address = Path(page).resolve().as_uri()
            picture = f"--screenshot={PICTURES / name}"
            subprocess.run([browser, *options, picture, address], check=True, stderr=subprocess.DEVNULL)
    return 0


def _lines() -> Iterator[list[str]]:
    """What is merged, learned and drawn."""
    task = ["--base", "base", "--sources", "math", "code"]
    few = ["--base", "few-base", "--sources", "few-math", "few-code"]
    data = ["--data", "data.npz"]
    yield ["ties", *task, "--density", "0.4", "-o", "merged", "--report", "merge.html"]
    yield ["compare", "base", "math", "code", "--picture", str(PICTURES / "compare.png"), "--quiet"]
    yield ["svd", *task, "--top-k", "16", "-o", "pooled", "--report", "spectra.json"]
    experts = ["--base", "moe-base", "--sources", "moe-math", "moe-code"]
    yield ["ties", *experts, "--density", "0.4", "-o", "experts", "--report", "experts.html"]
    rate = ["--learning-rate", "0.1", "--steps", "40", "--evaluate-every", "4"]
    yield ["ofasd", *few, *data, "--objective", "cross-entropy", *rate, "-o", "ofasd"]
    yield ["svd", *few, "--top-k", "8", "--as", "components", "-o", "pool"]
    yield ["tune", "pool/components.safetensors", "--base", "few-base", *data, *rate[2:], "--batch", "32", "-o", "tune"]
    source = ["--source-base", "few-base", "--source-model", "few-math"]
    yield ["align", "--base", "few-other", *source, *data, "--steps", "20", "-o", "align", "--controls", "cheap"]
    over = ["--over", "merge.sources.math=0:1:0.25", "merge.sources.code=0:1:0.25"]
    yield ["search", "recipe.yaml", *over, *data, "-o", "search"]
    for name in ("ofasd", "tune", "align", "search"):
        yield ["report", name, "-o", f"{name}.html"]


def _write_models() -> None:
    """Bases with two fine-tunes each, one of which changed late layers more, and data that follows a rule."""
    for prefix, layers in (("", LAYERS), ("few-", FEW)):
        config = tiny_llama_config(layers=layers)
        base = tiny_llama_tensors(layers=layers)
        _write(prefix, config, base, layers)
    write_checkpoint("few-other", tiny_llama_tensors(layers=FEW, seed=9), config=tiny_llama_config(layers=FEW))
    _write("moe-", {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, _mixture(FEW, 60), FEW)
    Path("recipe.yaml").write_text(yaml.safe_dump(_RECIPE), encoding="utf-8")
    rng = np.random.default_rng(0)
    ids = (rng.integers(0, 64, (96, 1)) + 3 * np.arange(8)) % 64
    np.savez("data.npz", input_ids=ids, labels=ids)


def _write(prefix: str, config: Mapping[str, object], base: dict[str, torch.Tensor], layers: int) -> None:
    write_checkpoint(f"{prefix}base", base, config=config)
    write_checkpoint(f"{prefix}math", fine_tune(base, 1, size=0.006), config=config)
    code = fine_tune(base, 2)
    for name, tensor in code.items():
        words = name.split(".")
        late = int(words[2]) / layers if words[1] == "layers" else 0.0
        code[name] = base[name] + (tensor - base[name]) * (1 + 6 * late * (1.5 if "mlp" in words else 1.0))
    write_checkpoint(f"{prefix}code", code, config=config)


def _mixture(layers: int, experts: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, 16), "lm_head.weight": (64, 16)}
    for layer in range(layers):
        place = f"model.layers.{layer}"
        shapes |= {f"{place}.self_attn.{side}_proj.weight": (16, 16) for side in "qkvo"}
        shapes[f"{place}.mlp.gate.weight"] = (experts, 16)
        for expert in range(experts):
            for side, shape in (("gate", (8, 16)), ("up", (8, 16)), ("down", (16, 8))):
                shapes[f"{place}.mlp.experts.{expert}.{side}_proj.weight"] = shape
    return {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
