from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hub_server import FakeHub


def test_inspect_reads_headers_only(run, hub: FakeHub, models) -> None:
    document = run("inspect", "org/math@main", "--json").document()
    assert document["parameters"] == 472
    assert len(document["commit"]) == 40
    assert hub.sent("model.safetensors") < (models.math / "model.safetensors").stat().st_size


def test_plan_downloads_no_weights(run, hub: FakeHub, models) -> None:
    document = run("linear", "--sources", "org/math", "org/code", "--dry-run", "--json").document()
    assert len(document["inputs"]["math"]["commit"]) == 40
    assert document["inputs"]["math"]["local"] is False
    assert hub.sent("model.safetensors") < 2 * (models.math / "model.safetensors").stat().st_size


def test_a_merge_of_models_on_the_hub(run, hub: FakeHub, models) -> None:
    assert run("linear", "--sources", "org/math", "org/code", "-o", "remote").code == 0
    assert run("linear", "--sources", "math", "code", "-o", "local").code == 0
    assert Path("remote/model.safetensors").read_bytes() == Path("local/model.safetensors").read_bytes()


def test_pull_prints_the_folder(run, hub: FakeHub, models) -> None:
    outcome = run("pull", "org/math", "-o", "copy")
    assert (outcome.code, outcome.stdout) == (0, "copy\n")
    assert Path("copy/model.safetensors").read_bytes() == (models.math / "model.safetensors").read_bytes()
    assert run("pull", "org/math", "-o", "again", "--json").document() == {"output": "again"}
    cached = run("pull", "org/math")
    assert (Path(cached.stdout.strip()) / "config.json").exists()


def test_compare_fetches_what_it_needs(run, hub: FakeHub) -> None:
    outcome = run("compare", "math", "org/math", "--json")
    assert outcome.document()["total"]["models"][0]["tensors_equal"] == 7


def test_a_merge_is_pushed_in_one_commit(run, hub: FakeHub) -> None:
    outcome = run("linear", "--sources", "math", "code", "-o", "out", "--push", "org/merged", "--private", "--json")
    assert outcome.code == 0, outcome.stderr
    assert "org/merged" in outcome.document()["pushed"]
    there = hub.files("org/merged")
    assert there["model.safetensors"] == Path("out/model.safetensors").read_bytes()
    assert {"README.md", "pxmerge.yaml", "pxmerge.lock.json", "config.json"} <= set(there)


def test_a_push_that_fails_names_the_command_that_goes_on(run, hub: FakeHub) -> None:
    hub.fault("commit", status=403, times=None)
    outcome = run("linear", "--sources", "math", "code", "-o", "out", "--push", "org/merged", "--private")
    assert outcome.code == 3
    assert Path("out/model.safetensors").exists()
    assert outcome.stderr.splitlines()[-1].endswith("to upload it: pxmerge push out org/merged --private")


def test_a_push_that_cannot_work_is_refused_before_the_merge(
    run, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run("linear", "--sources", "math", "code", "-o", "out", "--push", "no repo")
    assert (outcome.code, outcome.stdout) == (2, "")
    monkeypatch.delenv("HF_TOKEN")
    outcome = run("linear", "--sources", "math", "code", "-o", "out", "--push", "org/merged")
    assert (outcome.code, outcome.stdout) == (3, "")
    assert "an upload needs a token, and none is set; log in with `hf auth login`" in outcome.stderr
    assert not Path("out").exists()


def test_push_prints_the_address(run, hub: FakeHub) -> None:
    outcome = run("push", "math", "org/again", "--message", "Once more", "--json")
    assert outcome.code == 0, outcome.stderr
    assert "org/again" in outcome.stdout
    assert hub.history("org/again")[0].message == "Once more"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("inspect org/none", "no such model"),
        ("pull org/math@nowhere", "no revision"),
        ("linear --sources org/math org/none", "no such model"),
    ],
)
def test_what_the_hub_refuses_is_one_line(run, hub: FakeHub, words: str, message: str) -> None:
    outcome = run(*words.split())
    assert (outcome.code, outcome.stdout) == (3, "")
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert hub.token not in outcome.stderr


def test_the_workflow_of_the_guide_runs(run, hub: FakeHub) -> None:
    page = (Path(__file__).parents[2] / "docs" / "hub.md").read_text()
    (text,) = re.findall(r"```yaml\n(# \.github.*?)```", page, re.DOTALL)
    workflow = yaml.safe_load(text)
    Path("recipe.yaml").write_text(
        "pxmerge: 1\nmodels: {a: org/math, b: org/code}\nmerge: {method: linear, sources: [a, b]}\n"
    )
    assert run("lock", "recipe.yaml").code == 0
    for name in ("math", "code"):  # what is merged is what was locked, whatever the branches have become
        hub.add(f"org/{name}", {"README.md": b"moved on"})
    commands = [step["run"].split("#")[0] for step in workflow["jobs"]["merge"]["steps"] if "run" in step]
    assert commands[0].startswith("pip install")
    for line in commands[1:]:
        program, *words = line.split(">")[0].split()
        assert program == "pxmerge"
        outcome = run(*words)
        assert outcome.code == 0, (line, outcome.stderr)
    assert {"README.md", "model.safetensors", "pxmerge.lock.json"} <= set(hub.files("org/merged"))
    assert Path("report.html").is_file()
