"""An output that ends in .safetensors is one file: whole or not there, resumable, verifiable, replaceable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import write_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_px.cli import main
from mergekit_px.errors import OutputError, OutputLockedError, RunError
from mergekit_px.execute import run as run_module
from mergekit_px.execute.run import run_plan
from mergekit_px.inspection.verify import verify
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.model import Plan
from mergekit_px.plan.options import PlanOptions
from mergekit_px.recipe.load import recipe_from_mapping

DESCRIBED = {
    "format": "pt",
    "modelspec.title": "A title",
    "modelspec.architecture": "stable-diffusion-xl-v1-base",
    "modelspec.hash_sha256": "0x1234",
    "ss_base_model_version": "sdxl_base_v1-0",
    "unknown": "left out",
}
TENSORS = {
    name: {f"block.{n}.weight": torch.full((8, 4), float(n + seed)) for n in range(6)} for seed, name in enumerate("ab")
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, tensors in TENSORS.items():
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata=DESCRIBED if name == "a" else None)
    return tmp_path


def plan_of(folder: Path, output: str = "out.safetensors", **options: Any) -> Plan:
    models = {name: str(folder / f"{name}.safetensors") for name in TENSORS}
    recipe = {"models": models, "merge": {"method": "linear", "sources": [*TENSORS]}}
    return build_plan(recipe_from_mapping(recipe), PlanOptions(output=folder / output, **options))


def merge(folder: Path, output: str = "out.safetensors", **options: Any) -> Any:
    return run_plan(plan_of(folder, output, **options))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_all_weights_are_in_the_one_file_beside_its_lock_file(folder: Path) -> None:
    plan = plan_of(folder, shard_size="100")
    assert [shard.file for shard in plan.layout.shards] == ["out.safetensors"] and not plan.side_files
    result = run_plan(plan)
    assert names(folder) == {"a.safetensors", "b.safetensors", "out.safetensors", "out.pxmerge.lock.json"}
    for name, tensor in load_file(folder / "out.safetensors").items():
        assert torch.equal(tensor, (TENSORS["a"][name] + TENSORS["b"][name]) / 2)
    assert result.output == folder / "out.safetensors" and set(result.files) == {
        "out.safetensors",
        "out.pxmerge.lock.json",
    }
    lock = json.loads((folder / "out.pxmerge.lock.json").read_text())
    assert "method: linear" in lock["recipe"]


def test_the_header_says_of_the_model_what_the_donor_says_and_what_was_merged(folder: Path) -> None:
    merge(folder)
    with safe_open(folder / "out.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "modelspec.title": "A title",
            "modelspec.architecture": "stable-diffusion-xl-v1-base",
            "ss_base_model_version": "sdxl_base_v1-0",
            "modelspec.merged_from": "a,b",
        }


def test_equal_runs_are_up_to_date_and_changed_inputs_are_not(folder: Path) -> None:
    merge(folder)
    assert merge(folder).up_to_date
    save_file(TENSORS["a"], folder / "b.safetensors")
    with pytest.raises(OutputError, match="there is such a file already"):
        merge(folder)
    assert not merge(folder, mode="overwrite").up_to_date
    assert torch.equal(load_file(folder / "out.safetensors")["block.1.weight"], TENSORS["a"]["block.1.weight"])
    assert verify(folder / "out.safetensors").is_intact


def test_a_file_that_no_merge_wrote_is_never_replaced(folder: Path) -> None:
    (folder / "out.safetensors").write_bytes(b"precious")
    for mode in ("new", "resume", "overwrite"):
        with pytest.raises(OutputError):
            merge(folder, mode=mode)
    assert (folder / "out.safetensors").read_bytes() == b"precious"
    assert names(folder) == {"a.safetensors", "b.safetensors", "out.safetensors"}


def test_an_input_is_never_the_output(folder: Path) -> None:
    with pytest.raises(OutputError, match="inputs are never changed"):
        plan_of(folder, "a.safetensors", mode="overwrite")


def test_verify_tells_a_changed_and_a_missing_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge(folder)
    assert main(["verify", str(folder / "out.safetensors")]) == 0
    raw = bytearray((folder / "out.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "out.safetensors").write_bytes(raw)
    assert main(["verify", str(folder / "out.safetensors")]) == 3
    assert "changed: out.safetensors" in capsys.readouterr().out
    (folder / "out.safetensors").unlink()
    assert main(["verify", str(folder / "out.safetensors")]) == 3
    assert "no such file" in capsys.readouterr().err
    merge(folder)  # the lock file of a file that is gone stands in nobody's way
    assert verify(folder / "out.safetensors").is_intact


def test_an_interrupted_run_leaves_nothing_by_the_name_and_is_resumed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(folder, "whole.safetensors")
    plan = plan_of(folder)
    execute = run_module.execute

    def stopping(plan: Plan, readers: Any, sink: Any, advance: Any) -> None:
        def count(name: str, nbytes: int) -> None:
            if name.endswith("3.weight"):
                raise RunError("stopped")
            advance(name, nbytes)

        execute(plan, readers, sink, count)

    with monkeypatch.context() as patch, pytest.raises(RunError, match="stopped"):
        patch.setattr(run_module, "execute", stopping)
        run_plan(plan)
    assert ".out.pxmerge" in names(folder) and "out.safetensors" not in names(folder)
    with pytest.raises(OutputError, match="an unfinished run is there"):
        merge(folder)
    merge(folder, mode="resume")
    assert (folder / "out.safetensors").read_bytes() == (folder / "whole.safetensors").read_bytes()
    assert ".out.pxmerge" not in names(folder)


def test_killed_while_it_is_put_in_place_it_is_resumed(folder: Path) -> None:
    program = (
        "import os, pathlib, signal\n"
        "from mergekit_px.cli import main\n"
        "replace = pathlib.Path.replace\n"
        "def killing(self, target):\n"
        "    if str(target).endswith('lock.json') and 'stage' in str(self):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return replace(self, target)\n"
        "pathlib.Path.replace = killing\n"
        "main(['linear', '--sources', 'a.safetensors', 'b.safetensors', '-o', 'out.safetensors'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, check=False, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert not (folder / "out.pxmerge.lock.json").exists()
    words = ["linear", "--sources", str(folder / "a.safetensors"), str(folder / "b.safetensors"), "-q"]
    assert main([*words, "-o", str(folder / "out.safetensors")]) == 4
    assert main([*words, "-o", str(folder / "out.safetensors"), "--overwrite"]) == 0
    assert verify(folder / "out.safetensors").is_intact
    assert names(folder) == {"a.safetensors", "b.safetensors", "out.safetensors", "out.pxmerge.lock.json"}


def test_two_files_are_written_side_by_side_and_one_by_one_run_only(folder: Path) -> None:
    from mergekit_px.checkpoint.writer import CheckpointWriter

    plan = plan_of(folder)
    assert plan.output is not None
    with CheckpointWriter(plan.output, plan.layout, plan.hash, mode="new"):
        merge(folder, "other.safetensors")
        with pytest.raises(OutputLockedError):
            merge(folder, mode="resume")
    assert names(folder) >= {"other.safetensors", "other.pxmerge.lock.json"} and ".out.pxmerge" not in names(folder)


def test_an_older_folder_by_such_a_name_stays_a_folder(folder: Path) -> None:
    (folder / "old.safetensors").mkdir()
    merge(folder, "old.safetensors")
    assert (folder / "old.safetensors" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "words",
    [
        ("svd", "--as", "components", "--base", "a.safetensors", "--sources", "b.safetensors"),
        ("adapter", "extract", "--base", "a.safetensors", "b.safetensors"),
    ],
)
def test_what_is_a_folder_is_not_written_as_a_file(
    folder: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main([*words, "-o", "new.safetensors"]) in (2, 4), capsys.readouterr().err
    assert len(capsys.readouterr().err.strip().splitlines()) <= 3
    assert names(folder) == {"a.safetensors", "b.safetensors"}


def test_a_task_vector_is_one_file_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    a, b = "a.safetensors", "b.safetensors"
    assert main(["subtract", b, a, "-o", "v.safetensors", "-q"]) == 0
    assert main(["task_arithmetic", "--base", a, "--sources", "v.safetensors", "-o", "again.safetensors", "-q"]) == 0
    for name, tensor in load_file(folder / "again.safetensors").items():
        torch.testing.assert_close(tensor, TENSORS["b"][name])


def test_what_needs_a_folder_is_refused(folder: Path) -> None:
    write_pipeline(folder / "p", 1)
    words = ["linear", "--sources", str(folder / "p"), str(folder / "p"), "-o", str(folder / "new.safetensors")]
    assert main(words) == 4
    words = ["linear", "--sources", str(folder / "a.safetensors"), str(folder / "b.safetensors"), "--push", "a/b"]
    assert main([*words, "-o", str(folder / "new.safetensors")]) == 4
    assert names(folder) == {"a.safetensors", "b.safetensors", "p"}
