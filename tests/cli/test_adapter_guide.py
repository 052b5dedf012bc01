"""The commands of the guide run, in their order."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import torch
from safetensors.torch import save_file

GUIDE = Path(__file__).parents[2] / "docs" / "adapters.md"
MODULES = [f"model.layers.{layer}.mlp.up_proj" for layer in range(2)]


def write_adapter(folder: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module in MODULES:
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(3, 8, generator=generator)
        factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(12, 3, generator=generator)
    Path(folder).mkdir()
    save_file(factors, f"{folder}/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["up_proj"]}
    Path(f"{folder}/adapter_config.json").write_text(json.dumps(config))


def test_the_guide_runs(run, models) -> None:
    for seed, name in enumerate(("math-lora", "code-lora")):
        write_adapter(name, seed)
    for number in range(1, 4):
        save_file({"down.weight": torch.full((2, 3), float(number))}, f"task{number}.safetensors")
    for seed, file in enumerate(("model", "style")):
        generator = torch.Generator().manual_seed(seed)
        block = {part: torch.randn(12, 8, generator=generator) for part in ("to_q.weight", "to_v.weight")}
        block["norm.weight"] = torch.randn(8, generator=generator)
        save_file(
            {f"model.diffusion_model.blocks.0.{part}": value for part, value in block.items()}, f"{file}.safetensors"
        )
    text = GUIDE.read_text()
    lines = re.findall(r"^    pxmerge (.*)$", text, re.MULTILINE)
    assert len(lines) > 15
    for line in lines:
        outcome = run(*shlex.split(line))
        assert outcome.code == 0, f"{line}: {outcome.stderr}"
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    Path("recipe.yaml").write_text(recipe)
    assert run("run", "recipe.yaml", "-o", "from-recipe").code == 0
    result, applied = (Path(folder, "model.safetensors").read_bytes() for folder in ("from-recipe", "math-model"))
    assert result == applied
