from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tensors, make_models, merge, plan_of, recipe

from mergekit_px.errors import InputError, NonFiniteError, OutputError, PlanError
from mergekit_px.execute.events import Progress
from mergekit_px.execute.run import run_plan
from mergekit_px.plan.budget import BLOCK
from mergekit_px.testing import merge_tensors, tiny_llama_tensors, write_checkpoint

STEPS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "sources": {"fine0": 0.5, "fine1": 0.3, "fine2": 0.2}},
    "task_arithmetic": {"method": "task_arithmetic", "base": "base", "sources": {"fine0": 0.6, "fine1": 0.9}},
    "slerp": {"method": "slerp", "sources": ["fine0", "fine1"], "params": {"t": 0.3}},
    "ties": {
        "method": "ties",
        "base": "base",
        "sources": ["fine0", "fine1", "fine2"],
        "params": {"density": 0.4, "trim_scope": "tensor"},
    },
    "ties over the model": {
        "method": "ties",
        "base": "base",
        "sources": ["fine0", "fine1"],
        "params": {"density": 0.2, "trim_scope": "model"},
    },
    "dare_linear": {"method": "dare_linear", "base": "base", "sources": ["fine0", "fine1"], "params": {"density": 0.5}},
    "dare_ties": {"method": "dare_ties", "base": "base", "sources": ["fine0", "fine1"], "params": {"density": 0.5}},
    "della": {
        "method": "della",
        "base": "base",
        "sources": ["fine0", "fine1"],
        "params": {"density": 0.5, "epsilon": 0.2, "rescale": "l1"},
    },
    "arcee_fusion": {"method": "arcee_fusion", "sources": ["base", "fine0"]},
    "nuslerp of rows": {"method": "nuslerp", "sources": ["fine0", "fine1"], "params": {"along": "rows"}},
    "nuslerp of columns": {"method": "nuslerp", "sources": ["fine0", "fine1"], "params": {"along": "columns"}},
    "passthrough": {"method": "passthrough", "sources": ["fine1"], "params": {"scale": 0.5}},
}


def digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensors]]:
    folder = tmp_path_factory.mktemp("models")
    return folder, make_models(folder)


@pytest.mark.parametrize("name", STEPS)
def test_a_run_equals_the_plain_reference(name: str, models: tuple[Path, dict[str, Tensors]], tmp_path: Path) -> None:
    folder, tensors = models
    step = STEPS[name]
    merged = merge(recipe(folder, step, seed=7), tmp_path / "out")
    sources = [{f"merge/{key}": value.float() for key, value in tensors[source].items()} for source in step["sources"]]
    base = {f"merge/{key}": value.float() for key, value in tensors["base"].items()} if "base" in step else None
    weights = list(step["sources"].values()) if isinstance(step["sources"], dict) else None
    expected = merge_tensors(step["method"], sources, weights, step.get("params"), base=base, seed=7)
    assert merged.keys() == tensors["base"].keys()
    for key, value in merged.items():
        assert torch.equal(value, expected[f"merge/{key}"].bfloat16()), key


@pytest.mark.parametrize("name", ["linear", "slerp", "ties", "ties over the model", "dare_ties"])
def test_threads_and_chunks_change_no_byte(name: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(3 * BLOCK + 12_345, generator=generator).bfloat16(), "b": torch.ones(17).bfloat16()}
    for model in ("base", "fine0", "fine1", "fine2"):
        drift = {
            key: (value.float() + torch.randn(value.shape, generator=generator) * 0.01).bfloat16()
            for key, value in base.items()
        }
        write_checkpoint(tmp_path / "models" / model, base if model == "base" else drift)
    data = recipe(tmp_path / "models", STEPS[name], seed=3)
    digests = set()
    for threads, memory in ((1, None), (2, None), (5, None), (1, 362_000_000), (3, 380_000_000)):
        merge(data, tmp_path / f"out-{threads}-{memory}", threads=threads, memory=memory)
        digests.add(digest(tmp_path / f"out-{threads}-{memory}"))
    assert len(digests) == 1


def test_a_graph_of_steps_is_evaluated_without_intermediate_files(
    models: tuple[Path, dict[str, Tensors]], tmp_path: Path
) -> None:
    folder, tensors = models
    data = {
        "pxmerge": 1,
        "models": {name: str(folder / name) for name in tensors},
        "steps": {
            "mixed": {"method": "task_arithmetic", "base": "base", "sources": {"fine0": 0.5, "fine1": 0.5}},
            "final": {"method": "slerp", "sources": ["mixed", "fine2"], "params": {"t": 0.25}},
        },
        "output": {"from": "final"},
    }
    merged = merge(data, tmp_path / "out")
    widened = {name: {key: value.float() for key, value in state.items()} for name, state in tensors.items()}
    mixed = merge_tensors("task_arithmetic", [widened["fine0"], widened["fine1"]], [0.5, 0.5], base=widened["base"])
    expected = merge_tensors("slerp", [mixed, widened["fine2"]], params={"t": 0.25})
    for key, value in merged.items():
        assert torch.equal(value, expected[key].bfloat16()), key
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [
        ".json",
        ".json",
        ".md",
        ".safetensors",
        ".yaml",
    ]


def test_statistics_of_rows_where_another_method_holds_the_tensor_whole(
    models: tuple[Path, dict[str, Tensors]], tmp_path: Path
) -> None:
    folder, tensors = models
    data = {
        "pxmerge": 1,
        "models": {name: str(folder / name) for name in tensors},
        "steps": {
            "fused": {"method": "arcee_fusion", "sources": ["base", "fine0"]},
            "final": {"method": "nuslerp", "sources": ["fused", "fine1"], "params": {"along": "columns"}},
        },
        "output": {"from": "final"},
    }
    merged = merge(data, tmp_path / "out")
    widened = {name: {key: value.float() for key, value in state.items()} for name, state in tensors.items()}
    fused = merge_tensors("arcee_fusion", [widened["base"], widened["fine0"]])
    expected = merge_tensors("nuslerp", [fused, widened["fine1"]], params={"along": "columns"})
    for key, value in merged.items():
        assert torch.equal(value, expected[key].bfloat16()), key


def test_the_bf16_result_is_the_float64_result_rounded_once(
    models: tuple[Path, dict[str, Tensors]], tmp_path: Path
) -> None:
    folder, tensors = models
    # Round weights like 0.3 put sums of bf16 numbers exactly between two bf16 numbers, where no answer is right.
    weights = {"fine0": 0.5123, "fine1": 0.3011, "fine2": 0.1866}
    merged = merge(recipe(folder, {"method": "linear", "sources": weights}), tmp_path / "out")
    wrong = total = 0
    for key, value in merged.items():
        exact = sum(weight * tensors[name][key].double() for name, weight in weights.items())
        assert isinstance(exact, torch.Tensor)
        wrong += int((value != (exact / sum(weights.values())).bfloat16()).sum())
        total += value.numel()
    assert wrong <= total * 0.001


def test_the_output_is_complete_and_describes_itself(models: tuple[Path, dict[str, Tensors]], tmp_path: Path) -> None:
    folder, _ = models
    (folder / "fine0" / "tokenizer.json").write_bytes(b'{"kept": "as  it is"}')
    merge(recipe(folder, STEPS["linear"]), tmp_path / "out", dtype="float32")
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_bytes() == b'{"kept": "as  it is"}'
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    lock = json.loads((out / "pxmerge.lock.json").read_text())
    for name, entry in lock["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == entry["sha256"], name
    source = folder / "fine0" / "model.safetensors"
    recorded = lock["inputs"]["fine0"]["files"]["model.safetensors"]["sha256"]
    assert recorded == hashlib.sha256(source.read_bytes()).hexdigest()
    assert "linear" in (out / "README.md").read_text()
    assert not list(out.glob("*.part"))
    assert not (out / ".pxmerge").exists()


def test_shards_follow_the_asked_size(models: tuple[Path, dict[str, Tensors]], tmp_path: Path) -> None:
    folder, tensors = models
    merged = merge(recipe(folder, STEPS["linear"]), tmp_path / "out", shard_size="20KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert merged.keys() == index["weight_map"].keys() == tensors["base"].keys()
    assert len(set(index["weight_map"].values())) > 2


def test_fp8_and_packed_tensors_pass_through_and_fp8_is_computed_with(tmp_path: Path) -> None:
    packed = torch.randint(0, 255, (4, 8), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    fp8 = torch.randn(8, 8).to(torch.float8_e4m3fn)
    for name in ("fine0", "fine1"):
        write_checkpoint(tmp_path / "models" / name, {"a.packed": packed, "b.fp8": fp8, "c.w": torch.ones(2)})
    merged = merge(recipe(tmp_path / "models", {"method": "linear", "sources": ["fine0", "fine1"]}), tmp_path / "out")
    assert torch.equal(merged["a.packed"].view(torch.uint8), packed.view(torch.uint8))
    assert torch.equal(merged["b.fp8"].view(torch.uint8), fp8.view(torch.uint8))


def test_sizes_from_nothing_to_a_scalar_are_merged(tmp_path: Path) -> None:
    for value, name in ((1.0, "fine0"), (3.0, "fine1")):
        tensors = {"empty": torch.zeros(0, 4), "scalar": torch.tensor(value), "one": torch.tensor([value])}
        write_checkpoint(tmp_path / "models" / name, tensors)
    merged = merge(recipe(tmp_path / "models", {"method": "linear", "sources": ["fine0", "fine1"]}), tmp_path / "out")
    assert merged["scalar"].item() == 2.0
    assert merged["one"].tolist() == [2.0]
    assert merged["empty"].shape == (0, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stops_the_run_and_names_the_tensor(bad: float, tmp_path: Path) -> None:
    good = tiny_llama_tensors()
    broken = {**good, "model.norm.weight": torch.full((32,), bad)}
    write_checkpoint(tmp_path / "models" / "fine0", good)
    write_checkpoint(tmp_path / "models" / "fine1", broken)
    step = {"method": "linear", "sources": ["fine0", "fine1"]}
    with pytest.raises(NonFiniteError, match=r"fine1: model.norm.weight: .*NaN or infinity"):
        merge(recipe(tmp_path / "models", step), tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))
    merged = merge(recipe(tmp_path / "models", step), tmp_path / "allowed", allow_nonfinite=True)
    assert not merged["model.norm.weight"].isfinite().any()
    untouched = {**step, "rules": [{"match": "model.norm.weight", "take": "fine1"}]}
    merged = merge(recipe(tmp_path / "models", untouched), tmp_path / "copied")
    assert not merged["model.norm.weight"].isfinite().any()


def test_a_result_that_does_not_fit_its_dtype_is_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "models" / "fine0", {"w": torch.full((3,), 50_000.0, dtype=torch.float16)})
    step = {"method": "passthrough", "sources": ["fine0"], "params": {"scale": 2.0}}
    with pytest.raises(NonFiniteError, match=r"w: the merged value .* does not fit F16"):
        merge(recipe(tmp_path / "models", step), tmp_path / "out")


def test_task_vectors_are_files_of_their_own_bound_to_their_base(
    models: tuple[Path, dict[str, Tensors]], tmp_path: Path
) -> None:
    folder, tensors = models
    subtract = {"method": "combine", "sources": {"fine0": 1.0, "base": -1.0}}
    delta = merge(recipe(folder, subtract), tmp_path / "tau")
    for key, value in delta.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, tensors["fine0"][key].float() - tensors["base"][key].float())
    assert not (tmp_path / "tau" / "config.json").exists()
    data = recipe(folder, {"method": "task_arithmetic", "base": "base", "sources": ["tau"]})
    data["models"]["tau"] = str(tmp_path / "tau")
    restored = merge(data, tmp_path / "restored")
    for key, value in restored.items():
        assert torch.equal(value, tensors["fine0"][key]), key
    wrong = {**data, "merge": {**data["merge"], "base": "fine2"}}
    with pytest.raises(PlanError, match="taken from another base than 'fine2'"):
        plan_of(wrong, tmp_path / "wrong")
    assert plan_of(wrong, tmp_path / "wrong", allow_base_mismatch=True).items


def test_a_merge_of_local_files_opens_no_socket(
    models: tuple[Path, dict[str, Tensors]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = models

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    merge(recipe(folder, STEPS["ties"]), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_portable_reader_and_writer_give_the_same_bytes(
    models: tuple[Path, dict[str, Tensors]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = models
    merge(recipe(folder, STEPS["ties"]), tmp_path / "out")
    monkeypatch.setenv("PXMERGE_PORTABLE_IO", "1")
    merge(recipe(folder, STEPS["ties"]), tmp_path / "portable")
    assert digest(tmp_path / "portable") == digest(tmp_path / "out")


def test_a_long_tensor_stays_within_its_budget(tmp_path: Path) -> None:
    rows = 20_000
    for name in ("base", "fine0", "fine1"):
        write_checkpoint(tmp_path / "models" / name, {"w": torch.full((rows, 1000), 1.0, dtype=torch.bfloat16)})
    for number, step in enumerate((STEPS["slerp"], STEPS["ties"])):
        sources = list(step["sources"])[:2]
        data = recipe(tmp_path / "models", {**step, "sources": sources})
        script = SCRIPT.replace("time.sleep(0.05)", "pass").replace("mode=mode", "mode=mode, memory=400_000_000")
        script += "\nfrom mergekit_px.execute.run import peak_memory; print(peak_memory())"
        command = [sys.executable, "-c", script, json.dumps(data), str(tmp_path / f"out{number}"), "new"]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        # The tensor and its float32 copies would need 40 + 80 MB for each operand.
        assert peak < 400_000_000


def test_progress_ends_complete(models: tuple[Path, dict[str, Tensors]], tmp_path: Path) -> None:
    folder, tensors = models
    seen: list[Progress] = []
    run_plan(plan_of(recipe(folder, STEPS["ties"]), tmp_path / "out"), progress=seen.append)
    last = seen[-1]
    assert last.phase == "done"
    assert last.bytes_done == last.bytes_total
    assert last.tensors_done == last.tensors_total == len(tensors["base"])


SCRIPT = """
import sys
from pathlib import Path
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.options import PlanOptions
from mergekit_px.execute.run import run_plan
from mergekit_px.recipe.load import recipe_from_mapping
import json, time
import mergekit_px.execute.provenance as provenance
from mergekit_px.checkpoint.writer import CheckpointWriter
provenance._BEHIND = 0  # these files are hashed as soon as they are read
write = CheckpointWriter.write
def slowly(self, *args, **options):
    write(self, *args, **options)
    time.sleep(0.05)
CheckpointWriter.write = slowly
data, output, mode = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
run_plan(build_plan(recipe_from_mapping(data), PlanOptions(output=output, mode=mode)))
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_goes_on_to_the_same_bytes(
    kill: signal.Signals, models: tuple[Path, dict[str, Tensors]], tmp_path: Path
) -> None:
    folder, _ = models
    data = recipe(folder, STEPS["ties"])
    merge(data, tmp_path / "whole")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(data), str(out), "new"], stderr=subprocess.PIPE
    )
    journal = out / ".pxmerge" / "journal.jsonl"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") > 4):
        time.sleep(0.01)
    os.kill(process.pid, kill)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert not (out / "model.safetensors").exists()
    with pytest.raises(OutputError, match="--resume"):
        merge(data, out)
    merge(data, out, mode="resume")
    assert digest(out) == digest(tmp_path / "whole")


def test_another_plan_may_not_resume(tmp_path: Path) -> None:
    broken = {**tiny_llama_tensors(dtype=torch.bfloat16), "model.norm.weight": torch.full((32,), float("nan"))}
    write_checkpoint(tmp_path / "models" / "fine0", tiny_llama_tensors(dtype=torch.bfloat16))
    write_checkpoint(tmp_path / "models" / "fine1", broken)
    data = recipe(tmp_path / "models", {"method": "linear", "sources": ["fine0", "fine1"]})
    with pytest.raises(NonFiniteError):
        merge(data, tmp_path / "out", threads=1)
    other = {**data, "merge": {"method": "linear", "sources": {"fine0": 1, "fine1": 2}}}
    with pytest.raises(OutputError):
        merge(other, tmp_path / "out", mode="resume", allow_nonfinite=True)


def test_the_cost_of_tiny_tensors_grows_with_their_number(tmp_path: Path) -> None:
    seconds = []
    for count in (1_000, 1_000, 5_000):
        tensors = {f"layers.{n // 100}.experts.{n % 100}.w": torch.full((4,), float(n % 7)) for n in range(count)}
        folder = tmp_path / str(len(seconds))
        for name in ("fine0", "fine1"):
            write_checkpoint(folder / name, tensors)
        start = time.process_time()
        merged = merge(recipe(folder, {"method": "linear", "sources": ["fine0", "fine1"]}), folder / "out")
        seconds.append(time.process_time() - start)
        assert len(merged) == count
    # The first run also pays for imports. A quadratic schedule would cost 25 times as much, and a machine's own pace
    # is the same for both.
    assert seconds[2] < 12 * seconds[1]


def _stopped_run(data: dict[str, Any], out: Path) -> None:
    """Leave a run that was killed after a few tensors, when its inputs had been hashed."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.replace("0.05", "0.2"), json.dumps(data), str(out), "new"],
        stderr=subprocess.PIPE,
    )
    journal = out / ".pxmerge" / "journal.jsonl"
    deadline = time.monotonic() + 60
    inputs = out / ".pxmerge" / "inputs.json"
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") > 4 and b"null" not in inputs.read_bytes():
            break
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=30)


def _retrain(weights: Path, *, keep_times: bool) -> None:
    """Other bytes of the same size under the same header."""
    before = weights.stat()
    raw = bytearray(weights.read_bytes())
    raw[-64:] = bytes(64)
    time.sleep(0.02)
    weights.write_bytes(raw)
    if keep_times:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_only_the_inputs_that_a_run_began_with_are_resumed(tmp_path: Path) -> None:
    make_models(tmp_path / "models")
    data, out = recipe(tmp_path / "models", STEPS["ties"]), tmp_path / "out"
    merge(data, tmp_path / "whole")
    _stopped_run(data, out)
    weights = tmp_path / "models" / "fine1" / "model.safetensors"
    noted = json.loads((out / ".pxmerge" / "inputs.json").read_text())
    assert noted["fine1/model.safetensors"]["identity"][0] == weights.stat().st_size

    # Copied back from elsewhere: another inode and other times, the same bytes; that is known by their hash.
    shutil.copyfile(weights, tmp_path / "copy")
    assert noted["fine1/model.safetensors"]["sha256"] is not None
    (tmp_path / "copy").replace(weights)
    plan_of(data, out, mode="resume")
    shutil.copytree(out, tmp_path / "second")
    merge(data, out, mode="resume")
    assert digest(out) == digest(tmp_path / "whole")

    _retrain(weights, keep_times=True)
    with pytest.raises(InputError, match=r"fine1.*began with.*--overwrite"):
        merge(data, tmp_path / "second", mode="resume")
    assert not (tmp_path / "second" / "model.safetensors").exists()
    merge(data, tmp_path / "second", mode="overwrite")


@pytest.mark.parametrize("keep_times", [False, True])
def test_an_input_that_changes_during_the_run_stops_it(keep_times: bool, tmp_path: Path) -> None:
    make_models(tmp_path / "models")
    out = tmp_path / "out"
    plan = plan_of(recipe(tmp_path / "models", STEPS["linear"]), out)

    def change_once(state: Progress) -> None:
        if state.phase == "publishing":
            _retrain(tmp_path / "models" / "fine2" / "model.safetensors", keep_times=keep_times)

    with pytest.raises(InputError, match=r"fine2.*changed since its header was read"):
        run_plan(plan, progress=change_once)
    assert not list(out.glob("*.safetensors")) and not (out / "pxmerge.lock.json").exists()


def test_the_lock_names_the_hashes_of_all_inputs(models: tuple[Path, dict[str, Tensors]], tmp_path: Path) -> None:
    folder, _ = models
    merge(recipe(folder, STEPS["linear"]), tmp_path / "out")
    inputs = json.loads((tmp_path / "out" / "pxmerge.lock.json").read_text())["inputs"]
    for name, entry in inputs.items():
        raw = (folder / name / "model.safetensors").read_bytes()
        assert entry["files"]["model.safetensors"]["sha256"] == hashlib.sha256(raw).hexdigest()


def test_an_output_that_is_the_result_already_is_left_as_it_is(tmp_path: Path) -> None:
    make_models(tmp_path / "models")
    data, out = recipe(tmp_path / "models", STEPS["linear"]), tmp_path / "out"
    merge(data, out)
    before = (out / "model.safetensors").stat().st_mtime_ns
    for mode in ("new", "resume"):
        result = run_plan(plan_of(data, out, mode=mode))
        assert result.up_to_date and (out / "model.safetensors").stat().st_mtime_ns == before
        assert "model.safetensors" in result.files
    with pytest.raises(OutputError, match="not empty"):
        run_plan(plan_of(recipe(tmp_path / "models", STEPS["slerp"]), out))
    with (out / "config.json").open("a") as config:
        config.write(" ")  # the output is not what was written
    with pytest.raises(OutputError, match="not empty"):
        run_plan(plan_of(data, out))
    assert not run_plan(plan_of(data, out, mode="overwrite")).up_to_date
    _retrain(tmp_path / "models" / "fine0" / "model.safetensors", keep_times=True)
    with pytest.raises(OutputError, match="not empty"):
        run_plan(plan_of(data, out))
