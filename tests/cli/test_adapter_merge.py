"""`pxmerge adapter merge` byte for byte as the library, whose arithmetic is checked in tests/adapters, and next to
PEFT where it computes the same thing."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_px.adapters.lora_modules import LoraModule
from mergekit_px.adapters.merge import merge_adapters
from mergekit_px.adapters.merge_options import METHODS, MergeOptions
from mergekit_px.adapters.open import open_adapter
from mergekit_px.adapters.save import save_peft

SHAPES = {"model.layers.0.mlp.up_proj": (12, 8), "model.layers.1.mlp.up_proj": (12, 8)}
Changes = dict[str, torch.Tensor]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_adapter(folder: str, seed: int, rank: int, mask: torch.Tensor | None = None) -> Changes:
    """A LoRA with alpha twice its rank; returns its exact changes. ``mask`` silences some of the rank's directions."""
    factors, changes = {}, {}
    for place, (module, (rows, columns)) in enumerate(SHAPES.items()):
        a, b = draw(10 * seed + place, rank, columns), draw(10 * seed + 5 + place, rows, rank)
        if mask is not None:
            a, b = a * mask[:, None], b * mask
        factors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        changes[module] = 2 * b.double() @ a.double()
    Path(folder).mkdir()
    save_file(factors, f"{folder}/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["up_proj"]}
    Path(folder, "adapter_config.json").write_text(json.dumps(config))
    return changes


@pytest.fixture
def loras(models) -> list[Changes]:
    return [write_adapter("one", 1, 2), write_adapter("two", 2, 3)]


def updates(folder: str) -> Changes:
    """dW of a PEFT folder as the format defines them."""
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    assert not config["use_rslora"]
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    found = {}
    for module in SHAPES:
        b, a = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "BA")
        rank, alpha = (
            config[f"{pattern}_pattern"].get(re.escape(module), config[common])
            for pattern, common in (("rank", "r"), ("alpha", "lora_alpha"))
        )
        assert rank == len(a)
        found[module] = alpha / rank * b @ a
    return found


CASES: list[tuple[str, dict[str, Any]]] = [
    ("svd --rank 3 --weights 0.7 -0.4", {"method": "svd", "rank": 3, "weights": [0.7, -0.4]}),
    ("linear --rank 4", {"method": "linear", "rank": 4}),
    ("cat --scale 0.5", {"method": "cat", "scale": 0.5}),
    ("ties --density 0.5", {"method": "ties", "density": 0.5}),
    ("ties --scope tensor --divide-by count", {"method": "ties", "scope": "tensor", "divide_by": "count"}),
    ("dare-linear --seed 3 --density 0.7", {"method": "dare_linear", "seed": 3, "density": 0.7}),
    ("dare-ties --divide-by nothing", {"method": "dare_ties", "divide_by": "nothing"}),
    ("magnitude-prune --dtype bfloat16", {"method": "magnitude_prune", "dtype": "bfloat16"}),
    ("knots --merger magnitude-prune", {"method": "knots", "merger": "magnitude_prune"}),
    ("knots --merger ties --calibrate", {"method": "knots", "merger": "ties", "calibrate": True}),
    *(
        (f"core --merger {merger.replace('_', '-')}", {"method": "core", "merger": merger})
        for merger in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
    ),
    ("core --merger linear --isotropic", {"method": "core", "merger": "linear", "isotropic": True}),
    ("core --scope model", {"method": "core", "scope": "model"}),
    ("ctm --balance 0.5", {"method": "ctm", "balance": 0.5}),
    ("ctm --merger dare-ties --seed 9 --rank 4", {"method": "ctm", "merger": "dare_ties", "seed": 9, "rank": 4}),
    ("svd --calibrate", {"method": "svd", "calibrate": True}),
]


def test_every_method_has_a_case() -> None:
    assert {options["method"] for _, options in CASES} == set(METHODS) - {"robust"}


@pytest.mark.parametrize(("words", "options"), CASES, ids=[words for words, _ in CASES])
def test_the_command_writes_what_the_library_computes(run, models, loras, words: str, options: dict[str, Any]) -> None:
    outcome = run("adapter", "merge", "one", "two", "--method", *words.split(), "-o", "both", "--json")
    assert outcome.code == 0, outcome.stderr
    merged = merge_adapters([open_adapter("one"), open_adapter("two")], MergeOptions(**options))
    merged.save(Path("wanted"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert Path("both", name).read_bytes() == Path("wanted", name).read_bytes()
    document = outcome.document()
    assert document["captured_energy"] == merged.captured_energy
    assert [tuple(row["cosines"]) for row in document["modules"]] == [report.cosines for report in merged.reports]
    # and the model that is written is the base with just this
    assert run("adapter", "merge", "one", "two", "--method", *words.split(), "--into", "base", "-o", "out").code == 0
    found = load_file("out/model.safetensors")
    kept = updates("out-adapter")
    tolerance = 5e-2 if "bfloat16" in words else 1e-5
    for name, before in models.weights["base"].items():
        change = kept.get(name.removesuffix(".weight"), torch.zeros(()))
        torch.testing.assert_close(found[name].double(), before.double() + change, rtol=0, atol=tolerance)
    for module, change in updates("both").items():
        assert (change - kept[module]).norm() < 5e-3 * change.norm()


def test_robust_merge_too(run, models) -> None:
    write_adapter("one", 1, 4)
    write_adapter("two", 2, 4)
    assert run("adapter", "merge", "one", "two", "--method", "robust", "-o", "both").code == 0
    merge_adapters([open_adapter("one"), open_adapter("two")], MergeOptions(method="robust")).save(Path("wanted"))
    name = "adapter_model.safetensors"
    assert Path("both", name).read_bytes() == Path("wanted", name).read_bytes()


def test_adapters_of_different_modules_are_merged_on_their_base(run, models) -> None:
    changes = []
    for number, module in enumerate(SHAPES):
        changes.append(write_adapter(f"half{number}", number, 2))
        file = Path(f"half{number}/adapter_model.safetensors")
        save_file({name: tensor for name, tensor in load_file(file).items() if module in name}, file)
    words = ("adapter", "merge", "half0", "half1", "--method", "linear", "--weights", 1, 0.5, "-o", "both")
    refused = run(*words)
    assert refused.code == 3 and "share no module" in refused.stderr and "--base" in refused.stderr
    assert run(*words, "--base", "base").code == 0
    first, second = updates("both").values()
    torch.testing.assert_close(first, changes[0][next(iter(SHAPES))], rtol=0, atol=2e-5)
    torch.testing.assert_close(second, 0.5 * changes[1][list(SHAPES)[1]], rtol=0, atol=2e-5)


def test_the_number_of_threads_changes_no_byte(run, loras) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert run("adapter", "merge", "one", "two", "--rank", 2, "-o", f"with{count}").code == 0
            assert torch.get_num_threads() == count
            found.append(Path(f"with{count}/adapter_model.safetensors").read_bytes())
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


# --- PEFT ----------------------------------------------------------------------------------------------------

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft


def by_peft(kind: str, weights: list[float], rank: int | None = None, **options: Any) -> Changes:
    """dW of what ``add_weighted_adapter`` makes of the adapters in the folders one and two."""
    base = torch.nn.Linear(1, 1)
    layers = torch.nn.ModuleList()
    for rows, columns in SHAPES.values():
        mlp = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(columns, rows, bias=False)})
        layers.append(torch.nn.ModuleDict({"mlp": mlp}))
    base = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": layers})})
    model = peft.PeftModel.from_pretrained(base, "one", adapter_name="one")
    model.load_adapter("two", "two")
    model.add_weighted_adapter(["one", "two"], weights, "merged", kind, svd_rank=rank, **options)
    modules = dict(model.base_model.model.named_modules())
    return {name: modules[name].get_delta_weight("merged").double() for name in SHAPES}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("words", "kind", "options"),
    [
        ("cat", "cat", {}),
        ("svd --rank 2", "svd", {"rank": 2}),
        ("magnitude-prune --scope tensor --density 0.5 --rank 3", "magnitude_prune_svd", {"rank": 3, "density": 0.5}),
        # PEFT divides by the number of adapters that agree
        ("ties --scope tensor --divide-by count --density 0.5 --rank 3", "ties_svd", {"rank": 3, "density": 0.5}),
    ],
)
def test_peft_computes_the_same(run, loras, words: str, kind: str, options: dict[str, Any]) -> None:
    weights = [0.6, 0.6] if kind == "ties_svd" else [0.7, 0.4]
    outcome = run("adapter", "merge", "one", "two", "--weights", *weights, "--method", *words.split(), "-o", "both")
    assert outcome.code == 0, outcome.stderr
    for module, expected in by_peft(kind, weights, **options).items():
        torch.testing.assert_close(updates("both")[module], expected, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_pefts_linear_is_ours_where_its_cross_terms_vanish(run, models) -> None:
    """PEFT adds the A and the B each by itself; that is the sum of the updates if no B meets another's A."""
    own = torch.tensor([1.0, 1.0, 0.0, 0.0])
    changes = [write_adapter("one", 1, 4, own), write_adapter("two", 2, 4, 1 - own)]
    assert run("adapter", "merge", "one", "two", "--weights", 0.7, 0.4, "--method", "linear", "-o", "both").code == 0
    for module, expected in by_peft("linear", [0.7, 0.4]).items():
        exact = 0.7 * changes[0][module] + 0.4 * changes[1][module]
        torch.testing.assert_close(updates("both")[module], exact, rtol=0, atol=2e-5)
        torch.testing.assert_close(updates("both")[module], expected, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_pefts_linear_has_cross_terms_otherwise(run, models) -> None:
    write_adapter("one", 1, 3)
    write_adapter("two", 2, 3)
    assert run("adapter", "merge", "one", "two", "--weights", 0.7, 0.4, "--method", "linear", "-o", "both").code == 0
    for module, theirs in by_peft("linear", [0.7, 0.4]).items():
        assert (updates("both")[module] - theirs).norm() > 0.1 * theirs.norm()


def lora_files(names: dict[str, tuple[int, int]], a: str, b: str, alpha: bool = False) -> None:
    for number, path in enumerate(("one.safetensors", "two.safetensors")):
        noise = torch.Generator().manual_seed(number)
        tensors = {}
        for name, (rows, columns) in names.items():
            tensors[f"{name}.{a}.weight"] = torch.randn(2, columns, generator=noise)
            tensors[f"{name}.{b}.weight"] = torch.randn(rows, 2, generator=noise)
            if alpha:
                tensors[f"{name}.alpha"] = torch.tensor(1.0)
        save_file(tensors, path)


KOHYA = {"lora_unet_mid_block_proj": (8, 6), "lora_te1_text_fc1": (4, 4), "lora_te2_text_fc1": (6, 4)}
DIFFUSERS = {"unet.mid_block.proj": (8, 6), "text_encoder.text.fc1": (4, 4), "text_encoder_2.text.fc1": (6, 4)}


@pytest.mark.parametrize(
    ("names", "a", "b", "alpha"),
    [(KOHYA, "lora_down", "lora_up", True), (DIFFUSERS, "lora_A", "lora_B", False)],
)
@pytest.mark.parametrize("output", ["merged.safetensors", "merged"])
def test_files_for_a_pipeline_give_a_file_for_a_pipeline(
    run, monkeypatch, tmp_path: Path, names: dict[str, tuple[int, int]], a: str, b: str, alpha: bool, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lora_files(names, a, b, alpha)
    outcome = run(
        *("adapter", "merge", "one.safetensors", "two.safetensors", "--method", "cat"),
        *("-o", output, "--weights", "0.7", "-0.3"),
    )
    assert outcome.code == 0, outcome.stderr
    merged = load_file(output if output.endswith("s") else f"{output}/pytorch_lora_weights.safetensors")
    sources = [load_file(path) for path in ("one.safetensors", "two.safetensors")]
    scale = 0.5 if alpha else 1.0
    for name in names:
        expected = sum(
            weight * scale * source[f"{name}.{b}.weight"] @ source[f"{name}.{a}.weight"]
            for weight, source in zip((0.7, -0.3), sources, strict=True)
        )
        torch.testing.assert_close(merged[f"{name}.{b}.weight"] @ merged[f"{name}.{a}.weight"], expected)
    apply = run("adapter", "inspect", output)
    assert apply.code == 0, apply.stderr


def test_another_format_on_request(run, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    lora_files(DIFFUSERS, "lora_A", "lora_B")
    words = ("adapter", "merge", "one.safetensors", "two.safetensors")
    assert run(*words, "--to", "kohya", "-o", "k.safetensors").code == 0
    assert {name.split("_text")[0] for name in load_file("k.safetensors") if "te" in name and "alpha" in name} >= {
        "lora_te1",
        "lora_te2",
    }
    refused = run(*words, "--to", "peft", "-o", "folder")
    assert refused.code == 3
    assert "of one part" in refused.stderr
    assert not Path("folder").exists()
    assert run(*words, "--to", "peft", "-o", "x.safetensors").code == 2


def test_different_bases_are_named(run, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, base in (("one", "org/a"), ("two", "org/b")):
        factors = LoraModule("q_proj", torch.randn(2, 4), torch.randn(4, 2), alpha=2.0)
        save_peft(Path(name), [factors], base_model_name=base)
    outcome = run("adapter", "merge", "one", "two", "-o", "both")
    assert outcome.code == 0
    assert "different bases (org/a, org/b)" in outcome.stderr
    assert json.loads(Path("both/adapter_config.json").read_text())["base_model_name_or_path"] is None
