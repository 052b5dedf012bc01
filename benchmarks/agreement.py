"""The same mergekit YAML through mergekit and through pxmerge, compared element by element.

    python benchmarks/agreement.py                        # makes an environment with mergekit 0.1.5, runs all cases
    python benchmarks/agreement.py --peer path/to/venv    # one that has it already
    python benchmarks/agreement.py --cases ties slerp

Small Llama-shaped checkpoints, stored in bf16 but for a few cases; every recipe has ``dtype: float32`` and
``out_dtype: bfloat16``. A case agrees if both results have the same tensors, no element differs by more than one bf16
ulp, and 99 % are equal. Elements that tie at the trim threshold of ``ties`` are counted and left aside: there mergekit
keeps those that its sort has in front, and pxmerge keeps all. Where operands cancel almost to zero, what is left is the
float32 rounding of both tools: differences below that of the tensor's largest element count as one ulp. Weights are no
round numbers but in one case: bf16 numbers weighted by tenths often have a mean midway between two others, and task
vectors so weighted often cancel in the election of ``ties``; there the last bit of float32 decides.

Exits with 1 if a case does not agree. Everything is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peers import peer_environment

if TYPE_CHECKING:
    import torch

LAYERS = 6
MODELS = ("base", "fine0", "fine1", "fine2")
EQUAL = 0.99
"""Share of the elements that must be equal."""
ROUNDING = 2.0**-23
"""Of float32, relative."""


def _models(*settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"model": f"fine{number}", "parameters": dict(each)} for number, each in enumerate(settings)]


def _slice(*sources: tuple[str, int, int], **parameters: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"sources": [{"model": model, "layer_range": [a, b]} for model, a, b in sources]}
    return {**found, "parameters": parameters} if parameters else found


_WEIGHTS = ({"weight": 0.4871}, {"weight": 0.3119}, {"weight": 0.2237})
_DENSE = tuple({**each, "density": 1.0} for each in _WEIGHTS)
_HALF = tuple({**each, "density": 0.5} for each in _WEIGHTS)
_MOST = tuple({**each, "density": 0.9, "gamma": 0.01} for each in _WEIGHTS)
_BY_PART = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]

_TENTHS = ({"weight": 0.5}, {"weight": 0.3}, {"weight": 0.2})
"""Where means midway between two numbers are frequent."""

CASES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": _models(*_WEIGHTS)},
    "linear, tenths": {"merge_method": "linear", "models": _models(*_TENTHS)},
    "linear, as they are": {
        "merge_method": "linear",
        "models": _models({"weight": 0.6873}, {"weight": 0.6127}),
        "parameters": {"normalize": False},
    },
    "linear, gradients": {
        "merge_method": "linear",
        "models": _models({"weight": [0, 1]}, {"weight": [1, 0.4871, 0.2237]}, {"weight": 0.3119}),
    },
    "linear, slices": {
        "merge_method": "linear",
        "slices": [_slice(("fine0", 0, 4), ("fine1", 2, 6), weight=1.0), _slice(("fine2", 3, 6), weight=1.0)],
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "fine0",
        "models": [{"model": "fine0"}, {"model": "fine1"}],
        "parameters": {"t": 0.3871},
    },
    "slerp, filters": {
        "merge_method": "slerp",
        "base_model": "fine0",
        "slices": [_slice(("fine0", 0, LAYERS), ("fine1", 0, LAYERS))],
        "parameters": {"t": _BY_PART},
    },
    "task_arithmetic": {"merge_method": "task_arithmetic", "base_model": "base", "models": _models(*_WEIGHTS)},
    "task_arithmetic, lambda": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": _models({"weight": 0.4871}, {"weight": -0.3119}, {"weight": [0.1237, 0.9]}),
        "parameters": {"lambda": 0.7, "normalize": True},
    },
    "ties": {"merge_method": "ties", "base_model": "base", "models": _models(*_HALF)},
    "ties, as they are": {
        "merge_method": "ties",
        "base_model": "base",
        "models": _models(*_HALF),
        "parameters": {"normalize": False, "lambda": 0.7, "int8_mask": True},
    },
    "ties, gradients": {
        "merge_method": "ties",
        "base_model": "base",
        "models": _models(
            {"weight": 0.4871, "density": [1, 0.7, 0.1]},
            {"weight": [0.0113, 0.3, 0.7, 1], "density": 0.5},
            {"weight": [{"filter": "mlp", "value": 0.5129}, {"value": 0.1237}], "density": 0.33},
        ),
    },
    "ties, float32": {"merge_method": "ties", "base_model": "base", "models": _models(*_HALF)},
    "breadcrumbs": {"merge_method": "breadcrumbs", "base_model": "base", "models": _models(*_MOST)},
    "breadcrumbs_ties": {"merge_method": "breadcrumbs_ties", "base_model": "base", "models": _models(*_MOST)},
    "dare_linear": {"merge_method": "dare_linear", "base_model": "base", "models": _models(*_DENSE)},
    "dare_ties": {"merge_method": "dare_ties", "base_model": "base", "models": _models(*_DENSE)},
    "nuslerp": {"merge_method": "nuslerp", "models": _models(*_WEIGHTS[:2])},
    "nuslerp, base": {"merge_method": "nuslerp", "base_model": "base", "models": _models(*_WEIGHTS[:2])},
    "multislerp": {"merge_method": "multislerp", "models": _models(*_WEIGHTS)},
    "multislerp, base": {"merge_method": "multislerp", "base_model": "base", "models": _models(*_WEIGHTS)},
    "nearswap": {
        "merge_method": "nearswap",
        "base_model": "base",
        "models": [{"model": "fine0"}],
        "parameters": {"t": 0.00113},
    },
    "model_stock": {"merge_method": "model_stock", "base_model": "base", "models": _models({}, {}, {})},
    "passthrough, slices": {
        "merge_method": "passthrough",
        "slices": [_slice(("fine0", 0, 4)), _slice(("fine1", 2, 5)), _slice(("fine0", 4, 6))],
    },
    "passthrough, scale": {
        "merge_method": "passthrough",
        "slices": [
            _slice(("fine0", 0, 3)),
            _slice(("fine0", 2, 6), scale=[{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]),
        ],
    },
}
"""What is compared, in mergekit's own words; models are folders beside the recipe."""

WIDE = frozenset(("ties, float32", "breadcrumbs", "breadcrumbs_ties", "multislerp, base"))
"""Cases on float32 checkpoints, of which hardly any task vectors have elements that tie."""


@dataclass(frozen=True)
class Comparison:
    """How two results differ, in elements."""

    elements: int
    equal: int
    near: int
    """Equal or one ulp apart."""
    worst: int
    """The largest distance in ulps."""
    aside: int
    """Elements tied at a trim threshold, which count nowhere else."""

    @property
    def agrees(self) -> bool:
        return self.worst <= 1 and self.equal >= EQUAL * self.elements


def ulps(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Distance of two bfloat16 tensors in representable numbers between them, int32; the zeros are one number."""
    import torch

    bits = [value.contiguous().view(torch.int16).int() for value in (left, right)]
    # Negative numbers count downwards in sign and magnitude.
    places = [torch.where(each < 0, -(each & 0x7FFF), each) for each in bits]
    return (places[0] - places[1]).abs()


def tied_at_threshold(source: torch.Tensor, base: torch.Tensor, density: float) -> torch.Tensor:
    """Elements of a task vector of which trimming keeps some and not others, though they are equally large (bool)."""
    import torch

    magnitude = (source.float() - base.float()).abs()
    kept = int(density * magnitude.numel())
    if not 0 < kept < magnitude.numel():
        return torch.zeros_like(magnitude, dtype=torch.bool)
    threshold = magnitude.flatten().sort(descending=True).values[kept - 1]
    tied = magnitude == threshold
    some_left_out = int((magnitude >= threshold).sum()) > kept
    return tied if some_left_out else torch.zeros_like(tied)


def compare(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], aside: Mapping[str, torch.Tensor]
) -> Comparison:
    """Compare two results; ``aside`` has boolean masks of elements to leave out, by tensor name.

    Raises:
        ValueError: they have other tensors, shapes or dtypes.
    """
    import torch

    if ours.keys() != theirs.keys():
        raise ValueError(f"only one of them has {sorted(ours.keys() ^ theirs.keys())[:4]}")
    elements = equal = near = worst = left_out = 0
    for name, value in ours.items():
        other = theirs[name]
        if (value.shape, value.dtype) != (other.shape, other.dtype):
            raise ValueError(f"{name}: {list(value.shape)} {value.dtype}, {list(other.shape)} {other.dtype}")
        distance = ulps(value, other)
        cancelled = (value.float() - other.float()).abs() <= ROUNDING * other.float().abs().max()
        distance = torch.where(cancelled, distance.clamp(max=1), distance)
        if name in aside:
            left_out += int(aside[name].sum())
            distance = distance[~aside[name]]
        elements += distance.numel()
        equal += int((distance == 0).sum())
        near += int((distance <= 1).sum())
        worst = max(worst, int(distance.max()) if distance.numel() else 0)
    return Comparison(elements, equal, near, worst, left_out)


def make_checkpoints(work: Path, dtype: torch.dtype) -> None:
    """A base and three fine-tunes, seeded; norms are not all one."""
    from mergekit_px.testing import fine_tune, tiny_llama_config, tiny_llama_tensors, write_checkpoint

    shape = {"hidden": 192, "layers": LAYERS, "vocabulary": 512}
    base = fine_tune(tiny_llama_tensors(**shape), seed=0, size=0.01)
    for number, name in enumerate(MODELS):
        tensors = base if name == "base" else fine_tune(base, seed=number, size=0.003)
        write_checkpoint(work / name, tensors, dtype=dtype, config=tiny_llama_config(**shape))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def write_recipe(case: Mapping[str, Any], work: Path) -> Path:
    """The case as YAML (of which JSON is a part), with the models' folders in place of their names."""

    def placed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: placed(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [placed(inner) for inner in value]
        return str(work / value) if value in MODELS else value

    path = work / "recipe.yml"
    path.write_text(json.dumps({**placed(case), "dtype": "float32", "out_dtype": "bfloat16"}, indent=1))
    return path


def trim_ties(case: Mapping[str, Any], work: Path) -> dict[str, torch.Tensor]:
    """Elements tied at a trim threshold, by tensor name; for any density that the case gives to any layer."""
    if case["merge_method"] != "ties":
        return {}
    base = read_tensors(work / "base")
    masks: dict[str, torch.Tensor] = {}
    for entry in case["models"]:
        source = read_tensors(work / entry["model"])
        for name, value in source.items():
            density = _density(entry["parameters"]["density"], name)
            tied = tied_at_threshold(value, base[name], density)
            masks[name] = masks[name] | tied if name in masks else tied
    return masks


def _density(value: Any, name: str) -> float:
    """A density at a tensor's depth; outside of the layers mergekit takes the first of a list."""
    if not isinstance(value, list):
        return float(value)
    parts = name.split(".")
    depth = int(parts[2]) / (LAYERS - 1) if parts[1] == "layers" else 0.0
    place = depth * (len(value) - 1)
    below = min(int(place), len(value) - 2)
    return float(value[below] + (place - below) * (value[below + 1] - value[below]))


def run_case(case: Mapping[str, Any], work: Path, peer: Path) -> Comparison:
    """Both tools on one recipe.

    Raises:
        ValueError: their results have other tensors or another number of layers.
        subprocess.CalledProcessError: one of the tools failed.
    """
    recipe = write_recipe(case, work)
    outputs = {"pxmerge": work / "out-pxmerge", "mergekit": work / "out-mergekit"}
    commands = {
        "pxmerge": [sys.executable, "-m", "mergekit_px", "run", str(recipe), "-o", str(outputs["pxmerge"]), "-q"],
        "mergekit": [str(peer / "bin" / "mergekit-yaml"), str(recipe), str(outputs["mergekit"]), "--quiet"],
    }
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for tool, command in commands.items():
        shutil.rmtree(outputs[tool], ignore_errors=True)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{tool} failed with {done.returncode}: {' '.join(done.stderr.split())[-300:]}")
    counts = {tool: json.loads((out / "config.json").read_text())["num_hidden_layers"] for tool, out in outputs.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"num_hidden_layers {counts}")
    found = {tool: read_tensors(out) for tool, out in outputs.items()}
    return compare(found["pxmerge"], found["mergekit"], trim_ties(case, work))


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--peer", type=Path, help="a virtual environment with mergekit")
    options = parser.parse_args()
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}")
    work = Path(tempfile.mkdtemp(prefix="pxmerge-agreement-"))
    disagreeing = []
    try:
        for stored in (torch.bfloat16, torch.float32):
            make_checkpoints(work / str(stored), stored)
        peer = peer_environment(options.peer, work)
        print("| case | elements | equal | within one ulp | worst, ulps | tied at the threshold, aside |")
        print("|" + " --- |" * 6, flush=True)
        for name in options.cases:
            try:
                stored = torch.float32 if name in WIDE else torch.bfloat16
                found = run_case(CASES[name], work / str(stored), peer)
            except ValueError as problem:
                disagreeing.append(name)
                print(f"| {name} | {problem} |", flush=True)
                continue
            if not found.agrees:
                disagreeing.append(name)
            shares = [f"{count / max(found.elements, 1):.4%}" for count in (found.equal, found.near)]
            print(
                f"| {name} | {found.elements:,} | {' | '.join(shares)} | {found.worst} | {found.aside:,} |", flush=True
            )
    finally:
        shutil.rmtree(work)
    if disagreeing:
        sys.exit(f"no agreement: {', '.join(disagreeing)}")


if __name__ == "__main__":
    main()
