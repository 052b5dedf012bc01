from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file


def merged(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.to(found[name].dtype), rtol=0, atol=2e-7, msg=name)


def combined(models, **coefficients: float) -> dict[str, torch.Tensor]:
    parts = {name: models.weights[name] for name in coefficients}
    return {
        tensor: sum(factor * parts[name][tensor].double() for name, factor in coefficients.items()).float()
        for tensor in models.weights["base"]
    }


RECIPE = """\
pxmerge: 1
models: {base: base, math: math, code: code}
merge:
  method: task_arithmetic
  base: base
  sources: {math: 0.6, code: 0.4}
output: {path: from-recipe}
"""

MERGEKIT = """\
merge_method: linear
models:
  - {model: math, parameters: {weight: 0.5}}
  - {model: code, parameters: {weight: 0.5}}
dtype: float32
"""


@pytest.fixture
def recipe(models) -> Path:
    path = Path("recipe.yaml")
    path.write_text(RECIPE)
    return path


# One command for each method


def test_a_method_is_a_command(run, models) -> None:
    outcome = run("linear", "--sources", models.math, models.code, "--weights", 0.75, 0.25, "-o", "out")
    assert (outcome.code, outcome.stdout) == (0, "out\n")
    assert_equal(merged("out"), combined(models, math=0.75, code=0.25))


def test_without_an_output_it_is_merged(run, models) -> None:
    assert run("linear", "--sources", "math", "code").stdout.strip() == "merged"
    assert Path("merged/model.safetensors").exists()


def test_negative_weights_and_options_in_any_order(run, models) -> None:
    words = "task-arithmetic -o out --weights 1 -0.5 --base base --sources math --sources code --dtype float32"
    outcome = run(*words.split())
    assert outcome.code == 0, outcome.stderr
    assert_equal(merged("out"), combined(models, base=0.5, math=1, code=-0.5))


def test_the_recipe_is_kept_and_gives_the_same_bytes(run, models) -> None:
    words = "dare-linear --base base --sources math code --density 0.5 0.3 --weights 1 0.5 --like peft --seed 3"
    assert run(*words.split(), "--no-normalize", "--dtype", "bfloat16", "-o", "first").code == 0
    recipe = yaml.safe_load(Path("first/pxmerge.yaml").read_text().replace("/first", ""))
    assert recipe["models"] == {"base": "base", "math": "math", "code": "code"}
    assert recipe["seed"] == 3
    assert recipe["merge"] == {
        "method": "dare_linear",
        "base": "base",
        "sources": {"math": 1, "code": 0.5},
        "params": {"density": {"math": 0.5, "code": 0.3}, "normalize": False},
        "like": "peft",
    }
    assert recipe["output"] == {"dtype": "bfloat16"}
    assert run("run", "first/pxmerge.yaml", "-o", "second").code == 0
    assert Path("first/model.safetensors").read_bytes() == Path("second/model.safetensors").read_bytes()


def test_values_over_depth(run, models) -> None:
    assert run("linear", "--sources", "math", "code", "--weights", "0,1", "1,0", "-o", "out").code == 0
    found = merged("out")
    first, last = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert_equal({first: found[first]}, {first: models.weights["code"][first]})
    assert_equal({last: found[last]}, {last: models.weights["math"][last]})


def test_keys_of_the_recipe_can_be_set(run, models) -> None:
    words = "linear --sources math code --set merge.rules=[{match:\xa0'lm_head.*',take:\xa0math}] output.dtype=float16"
    outcome = run(*[word.replace("\xa0", " ") for word in words.split(" ")], "-o", "out")
    assert outcome.code == 0, outcome.stderr
    found = merged("out")
    assert {value.dtype for name, value in found.items() if name != "lm_head.weight"} == {torch.float16}
    torch.testing.assert_close(found["lm_head.weight"].float(), models.weights["math"]["lm_head.weight"].half().float())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("slerp --sources math", 2, "slerp takes exactly 2 sources, 1 given"),
        ("linear --sources math code --weights 1", 2, "--weights has 1 value for 2 sources"),
        ("ties --base base --sources math code --density 0.1 0.2 0.3", 2, "--density has 3 values"),
        ("ties --base base --sources math code --density 2", 2, "--density must be from 0 to 1, not 2"),
        ("linear --sources math nowhere", 3, "nowhere"),
        ("linear --sources math code --set merge.methud=ties", 2, "method"),
        ("linear --sources math code --set output.dtype", 2, "not key=value"),
        ("linear --sources math code --memory lots", 2, "--memory: 'lots' is not a size"),
        ("linear --sources math code --shard-size lots", 2, "--shard-size lots: 'lots' is not a size"),
        ("linear --sources math code --dtype float7", 2, "--dtype float7: "),
        ("linear --sources math code --dtype float31", 2, "float32"),
        ("linear --sources math code --resume --overwrite", 2, "give one of them"),
        ("linear --sources math code --private", 2, "--private goes with --push"),
        ("linear --sources math code -o math", 4, "math"),
        ("linear --sources math code --memory 1MB", 4, "the program itself needs 340 MB"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(run, models, words: str, code: int, message: str) -> None:
    before = sorted(Path().rglob("*"))
    outcome = run(*words.split())
    assert outcome.code == code
    assert message in outcome.stderr
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert outcome.stdout == ""
    assert sorted(Path().rglob("*")) == before


# run


def test_run_carries_out_a_recipe(run, models, recipe: Path) -> None:
    outcome = run("run", recipe)
    assert (outcome.code, outcome.stdout) == (0, "from-recipe\n")
    assert "peak memory" in outcome.stderr
    assert "/s)" in outcome.stderr
    assert_equal(merged("from-recipe"), combined(models, math=0.6, code=0.4))
    assert json.loads(Path("from-recipe/config.json").read_text())["num_hidden_layers"] == 2
    assert Path("from-recipe/tokenizer.json").exists()


def test_run_in_json(run, models, recipe: Path) -> None:
    document = run("run", recipe, "-o", "out", "--json").document()
    assert document["output"] == "out"
    assert document["tensors"] == 7
    assert set(document["files"]) >= {"model.safetensors", "config.json", "pxmerge.yaml"}
    assert document["bytes_written"] == Path("out/model.safetensors").stat().st_size


def test_a_profile_tells_where_the_time_went(run, models, recipe: Path) -> None:
    result = run("run", recipe, "--profile", "-q")
    stages = {line.split()[0]: line.split()[1:] for line in result.stderr.splitlines()}
    assert {"start", "plan", "read", "arithmetic", "write", "hash", "other"} <= set(stages)
    seconds = {name: float(words[0]) for name, words in stages.items() if words[1].endswith("%")}
    everything = seconds.pop("all")
    assert everything == pytest.approx(sum(seconds.values()), abs=0.2)
    assert result.stdout == "from-recipe\n"


def test_quiet_prints_the_folder_alone(run, models, recipe: Path) -> None:
    outcome = run("run", recipe, "-q")
    assert (outcome.stdout, outcome.stderr) == ("from-recipe\n", "")


def test_a_full_folder_is_kept_unless_it_is_to_be_replaced(run, models, recipe: Path) -> None:
    assert run("run", recipe, "-q").code == 0
    again = run("run", recipe)
    assert (again.code, again.stdout) == (0, "from-recipe\n")
    assert "up to date" in again.stderr
    other = run("run", recipe, "--set", "merge.sources.math=1.0")
    assert (other.code, other.stdout) == (4, "")
    assert "--overwrite" in other.stderr
    planned = run("plan", recipe, "--set", "merge.sources.math=1.0")
    assert planned.code == 0 and "a run would be refused" in planned.stderr
    assert run("run", recipe, "--overwrite", "--set", "merge.sources.math=1.0").code == 0
    assert_equal(merged("from-recipe"), combined(models, base=-0.4, math=1, code=0.4))


def test_a_mergekit_config_runs(run, models) -> None:
    Path("config.yml").write_text(MERGEKIT)
    assert run("run", "config.yml", "-o", "out").code == 0
    assert_equal(merged("out"), combined(models, math=0.5, code=0.5))


def test_an_error_in_a_recipe_has_its_place(run, models, recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("  base: base", "  bose: base"))
    outcome = run("run", recipe)
    assert outcome.code == 2
    assert "recipe.yaml:5:3" in outcome.stderr
    assert "base" in outcome.stderr


def test_a_nan_stops_the_run_unless_it_is_allowed(run, models, recipe: Path) -> None:
    weights = dict(models.weights["math"])
    weights["model.norm.weight"] = torch.full((8,), float("nan"))
    save_file(weights, models.math / "model.safetensors")
    outcome = run("run", recipe)
    assert outcome.code == 5
    assert "model.norm.weight" in outcome.stderr
    assert not Path("from-recipe/model.safetensors").exists()
    assert run("run", recipe, "--allow-nonfinite", "--overwrite").code == 0


def test_shapes_that_differ_are_refused_in_the_plan(run, models, recipe: Path) -> None:
    weights = dict(models.weights["math"]) | {"model.norm.weight": torch.zeros(9)}
    save_file(weights, models.math / "model.safetensors")
    outcome = run("run", recipe)
    assert outcome.code == 4
    assert "model.norm.weight" in outcome.stderr


def test_ctrl_c_says_how_to_go_on(run, models, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_px.execute import run as engine

    def interrupted(*args: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "run_plans", interrupted)
    outcome = run("run", recipe, "-o", "a folder")
    assert outcome.code == 130
    assert outcome.stderr.splitlines()[-1] == "interrupted; to go on: pxmerge run recipe.yaml -o 'a folder' --resume"


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process")
def test_an_interrupted_run_resumes_to_the_same_bytes(run, models, recipe: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from mergekit_px.checkpoint.writer import CheckpointWriter\n"
        "publish = CheckpointWriter.publish\n"
        "def stop(self, *a, **k): signal.raise_signal(signal.SIGINT)\n"
        "CheckpointWriter.publish = stop\n"
        "from mergekit_px.cli import main\n"
        "sys.exit(main(['run', 'recipe.yaml', '-o', 'out']))"
    )
    stopped = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert stopped.returncode == 130, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert stopped.stderr.splitlines()[-1] == "interrupted; to go on: pxmerge run recipe.yaml -o out --resume"
    assert not Path("out/model.safetensors").exists()
    assert run("run", recipe, "-o", "out").code == 4
    resumed = run("run", recipe, "-o", "out", "--resume")
    assert resumed.code == 0 and "begins a new one" not in resumed.stderr
    assert "begins a new one" in run("run", recipe, "-o", "anew", "--resume").stderr
    assert run("run", recipe, "-o", "whole").code == 0
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


# plan and convert


def test_plan_prints_and_writes_nothing(run, models, recipe: Path) -> None:
    outcome = run("plan", recipe)
    assert outcome.code == 0
    for heading in ("Inputs", "Steps", "Tensors", "Output", "Cost"):
        assert f"\n{heading}\n" in outcome.stdout
    for word in ("task_arithmetic", "peak memory", "disk", "bytes moved", "tied embeddings"):
        assert word in outcome.stdout
    assert not Path("from-recipe").exists()


def test_plan_in_json_is_the_dry_run_of_a_method(run, models) -> None:
    outcome = run("linear", "--sources", "math", "code", "--dry-run", "--json")
    document = outcome.document()
    assert document["tensors"]["merged"] == 7
    assert not Path("merged").exists()


def test_plan_lists_what_is_missing_and_dropped(run, models) -> None:
    weights = {name: value for name, value in models.weights["code"].items() if name != "model.norm.weight"}
    save_file(weights, models.code / "model.safetensors")
    assert run("linear", "--sources", "math", "code", "--dry-run").code == 4
    words = ["linear", "--sources", "math", "code", "--missing", "present"]
    shown = run(*words, "--dry-run", "--set", "merge.rules=[{match: lm_head.*, drop: true}]").stdout
    assert "not in code: model.norm.weight" in shown
    assert "Dropped" in shown
    assert "lm_head.weight" in shown.partition("Dropped")[2]


def test_a_narrow_plan_stays_within_the_terminal(run, models, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = run("plan", recipe).stdout.splitlines()
    assert max(len(line) for line in lines if not line.startswith("- ")) <= 40


def test_convert_prints_a_recipe_that_does_the_same(run, models) -> None:
    Path("config.yml").write_text(MERGEKIT.replace("dtype: float32", "dtype: float32\nparameters: {int8_mask: true}"))
    outcome = run("convert", "config.yml")
    assert outcome.code == 0
    assert outcome.stdout.startswith("#")
    assert "int8_mask" in outcome.stdout
    Path("recipe.yaml").write_text(outcome.stdout)
    assert run("run", "recipe.yaml", "-o", "ours").code == run("run", "config.yml", "-o", "theirs").code == 0
    assert Path("ours/model.safetensors").read_bytes() == Path("theirs/model.safetensors").read_bytes()


def test_the_schema_accepts_the_recipe(run) -> None:
    import jsonschema

    jsonschema.validate(yaml.safe_load(RECIPE), run("schema").document())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(RECIPE.replace("merge:", "murge:")), run("schema").document())


def test_a_plan_that_does_not_fit_on_this_disk_is_shown_and_said(run, models, recipe: Path, monkeypatch) -> None:
    import shutil

    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    outcome = run("plan", recipe, "-o", "out", "--json")
    assert outcome.code == 0 and outcome.document()["output"]["bytes"] > 100
    assert "a run here would be refused" in outcome.stderr and "100 are free" in outcome.stderr
    outcome = run("run", recipe, "-o", "out")
    assert outcome.code == 4 and "100 are free" in outcome.stderr and not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device tpu", "'tpu' is not a device; write auto, cpu, cuda or cuda:1"),
        ("--device xpu", "device 'xpu' cannot be used"),
        ("--threads 0", "--threads must be at least 1"),
        ("--threads x", "--threads must be a whole number"),
        ("--memory 1KB", "the budget is 0.001 MB"),
        ("--weights nan 1", "error: merge: sources: math: nan is not a finite number"),
    ],
)
def test_options_that_cannot_be_meant_leave_nothing(run, models, options: str, message: str) -> None:
    outcome = run("linear", "--sources", "math", "code", *options.split(), "-o", "out")
    assert outcome.code in (2, 4) and message in outcome.stderr
    assert not Path("out").exists()
