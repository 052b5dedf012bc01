from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hub_server import FakeHub

RECIPE = """\
# Ours.
models:
  base: ./base
  math: {math}
  code: {code}
merge: {{method: task-arithmetic, base: base, sources: {{math: 0.6, code: 0.4}}}}
output: {{path: ./out}}
"""


def write_recipe(math: str = "./math", code: str = "./code", folder: str = ".", more: str = "") -> Path:
    path = Path(folder) / "recipe.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(RECIPE.format(math=math, code=code) + more)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_of(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def moved_on(hub: FakeHub, name: str, models) -> str:
    """The repository's branch at another commit, with other bytes."""
    return hub.add(f"org/{name}", files_of("base"))


def test_a_lock_holds_commits_and_the_hash_of_every_file(run, hub: FakeHub) -> None:
    write_recipe(math="org/math")
    outcome = run("lock", "recipe.yaml")
    assert (outcome.code, outcome.stdout) == (0, "pxmerge.lock.json\n"), outcome.stderr
    inputs = json.loads(Path("pxmerge.lock.json").read_text())["inputs"]
    assert inputs["math"]["commit"] == hub.history("org/math")[0].sha
    assert inputs["math"]["files"]["model.safetensors"]["sha256"] == sha256(Path("math/model.safetensors"))
    assert inputs["code"]["commit"] is None
    for name in ("config.json", "tokenizer.json"):
        assert inputs["code"]["side_files"][name]["sha256"] == sha256(Path("code") / name)
    assert hub.sent("model.safetensors") < Path("math/model.safetensors").stat().st_size


def test_a_lock_has_the_form_that_a_run_writes(run, hub: FakeHub) -> None:
    write_recipe(math="org/math")
    assert run("lock", "recipe.yaml").code == 0
    assert run("run", "recipe.yaml").code == 0
    locked, ran = (json.loads(Path(name).read_text()) for name in ("pxmerge.lock.json", "out/pxmerge.lock.json"))
    assert {key: ran[key] for key in locked} == locked


def test_a_moved_branch_means_the_locked_commit(run, hub: FakeHub, models) -> None:
    write_recipe(math="org/math")
    run("run", "recipe.yaml", "-o", "before")
    run("lock", "recipe.yaml")
    now = moved_on(hub, "math", models)
    outcome = run("run", "recipe.yaml", "--locked")
    assert outcome.code == 0, outcome.stderr
    assert "note: the inputs are those of the lock" not in outcome.stderr
    assert Path("out/model.safetensors").read_bytes() == Path("before/model.safetensors").read_bytes()
    assert run("run", "recipe.yaml", "-o", "today").code == 0
    assert json.loads(Path("today/pxmerge.lock.json").read_text())["inputs"]["math"]["commit"] == now


def test_the_published_recipe_carries_commits(run, hub: FakeHub, models) -> None:
    write_recipe(math="org/math@main")
    first = hub.history("org/math")[0].sha
    assert run("run", "recipe.yaml").code == 0
    moved_on(hub, "math", models)
    text = Path("out/pxmerge.yaml").read_text()
    assert text.startswith("# Ours.\n")
    assert f"math: org/math@{first}" in text
    assert run("run", "out/pxmerge.yaml", "-o", "again").code == 0
    for name in ("model.safetensors", "config.json", "pxmerge.yaml"):
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes()
    assert run("run", "out/pxmerge.yaml", "--locked", "-o", "third").code == 0


def test_a_recipe_names_its_lock(run, models) -> None:
    write_recipe(folder="ci", more="lock: ./pinned.json\n")
    assert run("run", "ci/recipe.yaml").stderr.startswith("error: ci/pinned.json: no such lock file")
    assert run("lock", "ci/recipe.yaml").stdout == "ci/pinned.json\n"
    assert run("run", "ci/recipe.yaml").code == 0
    assert "lock:" not in Path("out/pxmerge.yaml").read_text()
    Path("code/tokenizer.json").write_text("[]")
    assert run("run", "ci/recipe.yaml", "-o", "other").code == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Path("code/model.safetensors").write_bytes(Path("math/model.safetensors").read_bytes()), "model.safe"),
        (lambda: Path("code/tokenizer.json").write_text("[]"), "tokenizer.json of 'code' changed"),
        (lambda: Path("code/tokenizer.json").write_text("{ }"), "tokenizer.json of 'code' had 2 bytes and has 3"),
        (lambda: Path("code/tokenizer.json").unlink(), "tokenizer.json of 'code' is gone"),
        (lambda: Path("code/merges.txt").write_text("a b"), "merges.txt of 'code' is new"),
        (lambda: Path("code/model.safetensors").unlink(), "code"),
    ],
)
def test_what_changed_on_this_machine_is_named_and_nothing_is_merged(run, models, change, message: str) -> None:
    write_recipe()
    assert run("lock", "recipe.yaml").code == 0
    change()
    outcome = run("run", "recipe.yaml", "--locked")
    assert (outcome.code, outcome.stdout) == (3, "")
    assert message in outcome.stderr
    assert [line[:6] for line in outcome.stderr.splitlines()].count("error:") == 1
    assert not Path("out").exists()


def test_a_changed_file_that_looks_the_same_is_found(run, models) -> None:
    write_recipe()
    run("lock", "recipe.yaml")
    place = Path("math/model.safetensors")
    raw = bytearray(place.read_bytes())
    raw[-1] ^= 1
    place.write_bytes(raw)
    assert run("plan", "recipe.yaml", "--locked").code == 0
    outcome = run("run", "recipe.yaml", "--locked")
    assert (outcome.code, "model.safetensors of 'math' changed" in outcome.stderr) == (3, True)


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_lock_of_another_recipe_is_refused(run, models, command: str) -> None:
    path = write_recipe()
    run("lock", "recipe.yaml")
    text = path.read_text()
    path.write_text(text.replace("code", "kode").replace("./kode", "./code"))
    outcome = run(command, "recipe.yaml", "--locked")
    assert (outcome.code, outcome.stdout) == (4, "")
    assert "it has no input 'kode', which the recipe has" in outcome.stderr
    path.write_text(text.replace("code: 0.4", "").replace("0.6, ", "0.6"))
    assert "it has the input 'code', which the recipe does not use" in run(command, "recipe.yaml", "--locked").stderr


@pytest.mark.parametrize("asked", ["org/code", "org/math@v2", "org/math@" + 40 * "1"])
def test_a_reference_to_something_else_than_was_locked_is_refused(run, hub: FakeHub, asked: str) -> None:
    write_recipe(math="org/math")
    run("lock", "recipe.yaml")
    write_recipe(math=asked)
    outcome = run("run", "recipe.yaml", "--locked")
    assert outcome.code == 4
    first = hub.history("org/math")[0].sha
    assert f"input 'math' is {asked} in the recipe, and was org/math at {first}" in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_a_local_copy_of_what_was_locked_on_the_hub_is_refused(run, hub: FakeHub) -> None:
    write_recipe(math="org/math")
    run("lock", "recipe.yaml")
    write_recipe(math="./math")
    outcome = run("run", "recipe.yaml", "--locked")
    assert outcome.code == 3
    assert "'math' was org/math at" in outcome.stderr


def test_a_locked_commit_that_is_gone_is_named(run, hub: FakeHub) -> None:
    write_recipe(math="org/math")
    run("lock", "recipe.yaml")
    first = hub.history("org/math")[0].sha
    del hub.repositories["org/math"]
    hub.add("org/math", files_of("base"))
    outcome = run("run", "recipe.yaml", "--locked", "-o", "new")
    assert (outcome.code, outcome.stderr.count("\n")) == (3, 1)
    assert first in outcome.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such lock file"),
        ("{", "JSON"),
        ("{}", "no lock of a merge: pxmerge_lock: "),
        ('{"pxmerge_lock": 2}', "no lock of a merge: pxmerge_lock: "),
        ('{"pxmerge_lock": 1, "plan_hash": "", "inputs": {"a": {"reference": 1}}}', "inputs.a.reference"),
        (
            '{"pxmerge_lock": 1, "plan_hash": "", "inputs": {"a": {"reference": "", "commit": "x", "files": {}}}}',
            "inputs.a.commit",
        ),
    ],
)
def test_what_is_no_lock_is_one_line(run, models, content: str | None, message: str) -> None:
    write_recipe()
    if content is not None:
        Path("pxmerge.lock.json").write_text(content)
    outcome = run("run", "recipe.yaml", "--locked")
    assert (outcome.code, outcome.stdout, outcome.stderr.count("\n")) == (3, "", 1)
    assert message in outcome.stderr
    assert "pxmerge.lock.json" in outcome.stderr


def test_another_weight_runs_on_locked_inputs_and_is_said(run, models) -> None:
    write_recipe()
    run("lock", "recipe.yaml")
    outcome = run("run", "recipe.yaml", "--locked", "--set", "merge.sources.math=0.5")
    assert outcome.code == 0
    assert "the recipe or its options changed" in outcome.stderr


def test_an_upgrade_moves_one_input_and_leaves_the_others(run, hub: FakeHub, models) -> None:
    write_recipe(math="org/math", code="org/code")
    run("lock", "recipe.yaml")
    before = json.loads(Path("pxmerge.lock.json").read_text())["inputs"]
    now = {name: moved_on(hub, name, models) for name in ("math", "code")}
    outcome = run("lock", "recipe.yaml", "--upgrade", "math")
    assert outcome.code == 0
    assert f"'math' was org/math at {before['math']['commit']} and is org/math at {now['math']}" in " ".join(
        outcome.stderr.split()
    )
    after = json.loads(Path("pxmerge.lock.json").read_text())["inputs"]
    assert after["math"]["commit"] == now["math"]
    assert after["code"] == before["code"]
    assert run("run", "recipe.yaml", "--locked").code == 0
    assert run("lock", "recipe.yaml", "--json").document()["moved"] == [
        f"'code' was org/code at {before['code']['commit']} and is org/code at {now['code']}"
    ]
    assert "nothing moved" in run("lock", "recipe.yaml").stderr


def test_an_upgrade_does_not_take_other_changes_along(run, models) -> None:
    write_recipe()
    run("lock", "recipe.yaml")
    before = Path("pxmerge.lock.json").read_bytes()
    Path("code/notes.txt").write_text("[]")
    Path("math/notes.txt").write_text("[]")
    outcome = run("lock", "recipe.yaml", "--upgrade", "math")
    assert (outcome.code, "notes.txt of 'code' is new" in outcome.stderr) == (3, True)
    assert Path("pxmerge.lock.json").read_bytes() == before
    assert run("lock", "recipe.yaml", "--upgrade", "math", "code").code == 0


def test_an_upgrade_of_an_unknown_input_and_without_a_lock(run, models) -> None:
    write_recipe()
    assert run("lock", "recipe.yaml", "--upgrade", "math").code == 3
    run("lock", "recipe.yaml")
    outcome = run("lock", "recipe.yaml", "--upgrade", "maths")
    assert (outcome.code, outcome.stderr.count("\n")) == (2, 1)
    assert "no input 'maths' is locked; did you mean 'math'?" in outcome.stderr


def test_a_lock_replaces_nothing_but_a_lock(run, models) -> None:
    write_recipe()
    assert run("lock", "recipe.yaml", "-o", "recipe.yaml").code == 4
    assert Path("recipe.yaml").read_text().startswith("# Ours.")
    assert run("run", "recipe.yaml").code == 0
    outcome = run("lock", "out/pxmerge.yaml")
    assert (outcome.code, "the lock of a finished merge" in outcome.stderr) == (4, True)
    assert run("verify", "out").code == 0


def test_an_adapter_on_the_hub_is_pinned_like_a_model(run, hub: FakeHub) -> None:
    from safetensors.torch import save_file

    def adapter(seed: int) -> dict[str, bytes]:
        generator = torch.Generator().manual_seed(seed)
        module = "base_model.model.model.layers.0.mlp.up_proj"
        factors = {"lora_A": torch.randn(2, 8, generator=generator), "lora_B": torch.randn(12, 2, generator=generator)}
        save_file({f"{module}.{name}.weight": factor for name, factor in factors.items()}, "adapter.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "base"}
        return {
            "adapter_model.safetensors": Path("adapter.safetensors").read_bytes(),
            "adapter_config.json": json.dumps(config).encode(),
        }

    first = hub.add("org/lora", adapter(0))
    write_recipe(math="{model: org/math, adapter: org/lora}")
    run("run", "recipe.yaml", "-o", "before")
    assert f"adapter: org/lora@{first}" in Path("before/pxmerge.yaml").read_text()
    assert run("lock", "recipe.yaml").code == 0
    entry = json.loads(Path("pxmerge.lock.json").read_text())["inputs"]["math"]["adapters"][0]
    assert (entry["reference"], entry["commit"]) == ("org/lora", first)
    assert entry["files"]["adapter_model.safetensors"]["sha256"] == sha256(Path("adapter.safetensors"))
    second = hub.add("org/lora", adapter(1))
    assert run("run", "recipe.yaml", "--locked").code == 0
    assert Path("out/model.safetensors").read_bytes() == Path("before/model.safetensors").read_bytes()
    moved = run("lock", "recipe.yaml", "--upgrade", "math", "--json").document()["moved"]
    assert moved == [f"adapter of 'math' was org/lora at {first} and is org/lora at {second}"]


def test_a_file_of_coefficients_that_changed_is_named(run, models) -> None:
    from mergekit_px.artefacts.coefficients import CoefficientTable, write_table

    def write(value: float) -> None:
        places = {name: (0, 1) for name in models.weights["base"]}
        table = CoefficientTable(("math",), ("all",), places, 0, ((value,),))
        write_table(table, Path("coefficients.safetensors"))

    write(0.5)
    Path("recipe.yaml").write_text(
        "models: {base: ./base, math: ./math}\n"
        "merge: {method: anisotropic, base: base, sources: [math], params: {coefficients: coefficients.safetensors}}\n"
    )
    assert run("lock", "recipe.yaml").code == 0
    assert run("run", "recipe.yaml", "--locked", "-o", "out").code == 0
    write(0.25)
    outcome = run("run", "recipe.yaml", "--locked", "-o", "new")
    assert (outcome.code, "the coefficients coefficients.safetensors changed" in outcome.stderr) == (3, True)
    assert not Path("new").exists()
