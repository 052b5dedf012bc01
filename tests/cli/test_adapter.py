from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Changes = dict[str, torch.Tensor]
MODULES = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")


def write_adapter(folder: Path, seed: int, rank: int = 2, *, shape: tuple[int, int] = (12, 8), **more: Any) -> Changes:
    """A LoRA on both up_proj, alpha twice the rank; returns its exact changes in float64."""
    generator = torch.Generator().manual_seed(seed)
    factors, changes = {}, {}
    for module in MODULES:
        a = torch.randn(rank, shape[1], generator=generator) * 0.3
        b = torch.randn(shape[0], rank, generator=generator) * 0.3
        factors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        changes[f"{module}.weight"] = 2 * b.double() @ a.double()
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["up_proj"], **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return changes


@pytest.fixture
def loras(models) -> list[Changes]:
    return [write_adapter(Path(name), seed, rank) for name, seed, rank in (("one", 1, 2), ("two", 2, 3))]


def check(folder: str | Path, base: dict[str, torch.Tensor], *changes: tuple[float, Changes]) -> None:
    """The folder holds the base with these changes, taken densely in float64."""
    found = load_file(Path(folder) / "model.safetensors")
    assert found.keys() == base.keys()
    for name, value in found.items():
        wanted = base[name].double() + sum(factor * change[name] for factor, change in changes if name in change)
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


def updates(folder: str | Path) -> Changes:
    """dW of a PEFT folder as the format defines them, by tensor of the base."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    scale = config["lora_alpha"] / config["r"]
    return {
        f"{module}.weight": scale
        * tensors[f"base_model.model.{module}.lora_B.weight"].double()
        @ tensors[f"base_model.model.{module}.lora_A.weight"].double()
        for module in MODULES
    }


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def test_apply_writes_a_model_that_needs_no_adapter(run, models, loras) -> None:
    assert run("adapter", "apply", "base", "one", "two", "-o", "out", "--threads", 2).stdout == "out\n"
    check("out", models.weights["base"], (1, loras[0]), (1, loras[1]))
    assert run("verify", "out").code == 0


def test_a_recipe_kept_with_the_result_does_it_again(run, models, loras) -> None:
    assert run("adapter", "apply", "base", "one", "-o", "out").code == 0
    assert run("run", "out/pxmerge.yaml", "-o", "again").code == 0
    assert (Path("out") / "model.safetensors").read_bytes() == (Path("again") / "model.safetensors").read_bytes()


def test_apply_can_be_planned_only(run, models, loras) -> None:
    outcome = run("adapter", "apply", "base", "one", "-o", "out", "--dry-run", "--json")
    assert outcome.code == 0
    assert outcome.document()
    assert not Path("out").exists()


def test_merge_gives_the_nearest_of_the_rank_to_the_weighted_sum(run, loras) -> None:
    outcome = run("adapter", "merge", "one", "two", "--weights", 0.7, -0.4, "--rank", 3, "-o", "both", "--json")
    assert outcome.code == 0, outcome.stderr
    whole = kept = 0.0
    for name, found in updates("both").items():
        total = 0.7 * loras[0][name] - 0.4 * loras[1][name]
        torch.testing.assert_close(found, truncated(total, 3), rtol=0, atol=1e-5)
        whole, kept = whole + float(total.norm()) ** 2, kept + float(truncated(total, 3).norm()) ** 2
    document = outcome.document()
    assert document["captured_energy"] == pytest.approx(kept / whole, abs=1e-5)
    assert 0 < kept / whole < 0.9999
    assert [row["weight"] for row in document["adapters"]] == [0.7, -0.4]
    assert [row["name"] for row in document["modules"]] == list(MODULES)
    assert {row["rank"] for row in document["modules"]} == {3}


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_sums_are_exact_whatever_the_ranks(run, loras, method: str) -> None:
    outcome = run("adapter", "merge", "one", "two", "--method", method, "-o", "both")
    assert outcome.code == 0
    assert "hold 100.00% of the energy" in outcome.stderr
    for name, found in updates("both").items():
        torch.testing.assert_close(found, (loras[0][name] + loras[1][name]) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        "ties --density 0.5",
        "dare-linear --seed 3",
        "dare-ties --divide-by count",
        "magnitude-prune",
        "knots --merger magnitude-prune --calibrate",
        "core --merger dare-ties --isotropic",
        "ctm --balance 0.5",
    ],
)
def test_every_method_writes_an_adapter_that_can_be_applied(run, loras, words: str) -> None:
    assert run("adapter", "merge", "one", "two", "--method", *words.split(), "-o", "both").code == 0
    assert all(float(found.norm()) > 0 for found in updates("both").values())
    assert run("adapter", "apply", "base", "both", "-o", "out").code == 0


def test_robust_needs_equal_ranks(run, loras) -> None:
    write_adapter(Path("three"), 3, rank=2)
    assert run("adapter", "merge", "one", "three", "--method", "robust", "-o", "both").code == 0
    refused = run("adapter", "merge", "one", "two", "--method", "robust", "-o", "other")
    assert (refused.code, refused.stderr.count("\n")) == (2, 1)
    assert "equal ranks" in refused.stderr


def test_merge_into_a_model(run, models, loras) -> None:
    outcome = run(
        "adapter", "merge", "one", "two", "--weights", 1, 0.5, "--rank", 5, "--into", "base", "-o", "out", "--json"
    )
    assert outcome.code == 0, outcome.stderr
    assert outcome.document()["output"] == "out"
    check("out", models.weights["base"], (1, loras[0]), (0.5, loras[1]))
    assert Path("out-adapter/adapter_model.safetensors").exists()
    again = ("adapter", "merge", "one", "two", "--weights", 1, 0.5, "--rank", 5, "--into", "base", "-o", "out")
    assert run(*again).code == 4
    assert run(*again, "--overwrite").code == 0


def test_extract_at_full_rank_gives_the_fine_tune_back(run, models) -> None:
    outcome = run("adapter", "extract", "base", "math", "-o", "lora", "--rank", 16, "--json")
    assert outcome.code == 0, outcome.stderr
    document = outcome.document()
    assert document["captured_energy"] == pytest.approx(1, abs=1e-6)
    assert "model.norm.weight" in document["saved_whole"]
    assert json.loads(Path("lora/adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert run("adapter", "apply", "base", "lora", "-o", "out").code == 0
    check("out", models.weights["math"])


def test_extract_by_energy_takes_the_smallest_rank(run, models) -> None:
    words = ("--energy", 0.8, "--include", "*up_proj*", "-o", "lora", "--json")
    document = run("adapter", "extract", "base", "math", *words).document()
    assert [row["name"] for row in document["modules"]] == list(MODULES)
    assert not document["saved_whole"]
    for row in document["modules"]:
        delta = models.weights["math"][f"{row['name']}.weight"] - models.weights["base"][f"{row['name']}.weight"]
        squares = torch.linalg.svdvals(delta.double()).square()
        shares = (squares.cumsum(0) / squares.sum()).tolist()
        assert row["rank"] == 1 + sum(share < 0.8 for share in shares)
        assert row["captured_energy"] == pytest.approx(shares[row["rank"] - 1], abs=1e-5)


def test_extract_with_ranks_of_their_own(run, models) -> None:
    ranks = ("--rank", 2, "--module-rank", "*layers.1*=5", "lm_head*=0")
    words = (*ranks, "--exclude", "*embed*", "*norm*", "-o", "lora", "--json")
    outcome = run("adapter", "extract", "base", "math", *words)
    document = outcome.document()
    assert {row["name"]: row["rank"] for row in document["modules"]} == {MODULES[0]: 2, MODULES[1]: 5}
    assert document["left_out"] == ["lm_head.weight"]
    assert "lm_head.weight" in outcome.stderr


def test_convert_there_and_back_is_the_identity(run, loras) -> None:
    assert run("adapter", "convert", "one", "--to", "kohya", "-o", "one.safetensors").stdout == "one.safetensors\n"
    refused = run("adapter", "convert", "one.safetensors", "--to", "peft", "-o", "back")
    assert refused.code == 3 and "give the base model" in refused.stderr
    done = run("adapter", "convert", "one.safetensors", "--to", "peft", "--base", "base", "-o", "back")
    assert done.code == 0, done.stderr
    before, after = (load_file(Path(name) / "adapter_model.safetensors") for name in ("one", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert run("adapter", "convert", "one", "--to", "diffusers", "-o", "d.safetensors").code == 0
    assert run("adapter", "convert", "d.safetensors", "--to", "peft", "-o", "again").code == 0
    after = load_file("again/adapter_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_format_is_applied_alike(run, loras) -> None:
    assert run("adapter", "apply", "base", "one", "-o", "wanted").code == 0
    for to in ("kohya", "diffusers"):
        assert run("adapter", "convert", "one", "--to", to, "-o", f"{to}.safetensors").code == 0
        done = run("adapter", "apply", "base", f"{to}.safetensors", "-o", to)
        assert done.code == 0, done.stderr
        assert Path(to, "model.safetensors").read_bytes() == Path("wanted/model.safetensors").read_bytes()


def test_inspect_says_what_is_there(run, loras) -> None:
    document = run("adapter", "inspect", "two", "--base", "base", "--json").document()
    assert (document["kind"], document["targets"], document["ranks"]) == ("LORA", {"up_proj": 2}, {"3": 2})
    assert document["changes"] == sorted(loras[1])
    for row in document["modules"]:
        assert row["scale"] == 2
        assert row["norm"] == pytest.approx(float(loras[1][f"{row['name']}.weight"].norm()), rel=1e-5)
    text = run("adapter", "inspect", "two", "--limit", 1, "--modules", "*mlp*").stdout
    assert MODULES[0] in text and MODULES[1] not in text and "and 1 more" in text
    headers = run("adapter", "inspect", "two", "--no-norms", "--modules", "*layers.1*", "--json").document()
    assert [(row["name"], row["norm"]) for row in headers["modules"]] == [(MODULES[1], None)]


def test_inspect_says_why_an_adapter_cannot_be_merged(run, models) -> None:
    write_adapter(Path("pissa"), 1, init_lora_weights="pissa")
    assert "residual" in run("adapter", "inspect", "pissa", "--json").document()["refusal"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("apply base", 2, "ADAPTER"),
        ("apply base nowhere", 3, "nowhere"),
        ("apply nowhere one", 3, "nowhere"),
        ("apply other one", 3, "model.layers.0.mlp.up_proj"),
        ("apply base wide", 3, "[12, 8]"),
        ("apply base half", 3, "lora_B"),
        ("apply base unknown", 3, "unknown peft_type NEWTUNE"),
        ("apply base prompt", 3, "PROMPT_TUNING cannot be merged"),
        ("apply base broken", 3, "broken/adapter_config.json"),
        ("apply base bare", 3, "adapter_config.json"),
        ("inspect nowhere", 3, "nowhere"),
        ("inspect broken", 3, "broken/adapter_config.json"),
        ("inspect one --base other", 3, "model.layers.0.mlp.up_proj"),
        ("merge one two --weights 1", 2, "--weights has 1 values for 2 adapters"),
        ("merge one two --weights 1 0.5,0.3", 2, "'0.5,0.3' is not a number"),
        ("merge one two --method tiess", 2, "--method"),
        ("merge one two --rank 0", 2, "--rank"),
        ("merge one two --memory 4GB", 2, "--memory is for models"),
        ("merge one two --set seed=1", 2, "--set is for models"),
        ("merge one two --dtype int8", 2, "--dtype"),
        ("merge one two --into base --base base", 2, "--into names the base already"),
        ("merge one two --into base --dry-run", 2, "--dry-run"),
        ("merge one two --density 0.3", 2, "--density has no effect on svd"),
        ("merge one two --method ties --seed 3", 2, "--seed has no effect on ties"),
        ("merge one two --method ties --merger linear", 2, "--merger has no effect on ties"),
        ("merge one two --method core --balance 1", 2, "--balance has no effect on core"),
        ("merge one two --method ctm --isotropic", 2, "--isotropic has no effect on ctm"),
        (
            "merge one two --method knots --merger linear --scope tensor",
            2,
            "--scope has no effect on knots with --merger",
        ),
        ("merge one two --method core --merger dare-linear --divide-by count", 2, "--divide-by has no effect on core"),
        ("merge one wide", 4, "model.layers.0.mlp.up_proj"),
        ("apply one two", 2, "is an adapter itself"),
        ("apply base math", 3, "is this a model, and no adapter?"),
        ("inspect math", 3, "is this a model, and no adapter?"),
        ("merge one two -o one", 4, "inputs are never changed"),
        ("extract base math --rank 2 --energy 0.9", 2, "exclude each other"),
        ("extract base math --energy 1.5", 2, "1.5"),
        ("extract base math --max-rank 3", 2, "--energy"),
        ("extract base math --module-rank *mlp*=x", 2, "GLOB=N"),
        ("extract base math --include *nothing*", 2, "fits no tensor"),
        ("extract base base", 2, "nothing to extract"),
        ("extract base other", 4, "missing"),
        ("extract base math -o one", 4, "not empty"),
        ("convert one --to kohya -o folder", 2, ".safetensors"),
        ("convert one --to peft -o file.safetensors", 2, "folder"),
        ("convert one --to kohya -o other.safetensors", 4, "already"),
        ("convert prompt --to kohya -o new.safetensors", 3, "PROMPT_TUNING"),
        ("aply base one", 2, "Did you mean 'apply'"),
    ],
)
def test_a_mistake_is_one_line(run, loras, words: str, code: int, message: str) -> None:
    save_file({"something.weight": torch.ones(4, 4)}, "other.safetensors")
    write_adapter(Path("wide"), 4, shape=(12, 10))
    write_adapter(Path("unknown"), 4, peft_type="NEWTUNE")
    write_adapter(Path("prompt"), 4, peft_type="PROMPT_TUNING")
    write_adapter(Path("half"), 4)
    factors = load_file("half/adapter_model.safetensors")
    save_file(
        {name: t for name, t in factors.items() if "1.mlp.up_proj.lora_B" not in name}, "half/adapter_model.safetensors"
    )
    write_adapter(Path("broken"), 4)
    Path("broken/adapter_config.json").write_text('{"peft_type": "LORA", "r":')
    write_adapter(Path("bare"), 4)
    Path("bare/adapter_config.json").unlink()
    typed = words.replace("other ", "other.safetensors ").split()
    if typed[-1:] == ["other"]:
        typed[-1] = "other.safetensors"
    outcome = run("adapter", *typed)
    assert (outcome.code, outcome.stdout) == (code, ""), outcome.stderr
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_a_group_explains_itself(run) -> None:
    text = run("adapter", "--help").stdout
    assert all(f"  {name} " in text for name in ("apply", "merge", "extract", "convert", "inspect"))
    assert "adapter" not in run("inspect", "--help").stdout
