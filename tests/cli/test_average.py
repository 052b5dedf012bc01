from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mergekit_px.checkpoint.contents import StoredTensor
from mergekit_px.checkpoint.reader import FileReader
from mergekit_px.testing import fine_tune, tiny_llama_config, tiny_llama_tensors, write_checkpoint

Weights = dict[str, torch.Tensor]


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, Weights]:
    """The checkpoints 100, 200, ... 600 of one run, as a trainer leaves them, by step."""
    monkeypatch.chdir(tmp_path)
    saved = {}
    base = tiny_llama_tensors(layers=1, dtype=torch.bfloat16)
    for step in range(100, 700, 100):
        saved[step] = fine_tune(base, seed=step, size=0.01)
        folder = Path(f"run/checkpoint-{step}")
        write_checkpoint(folder, saved[step], config=tiny_llama_config(layers=1))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (folder / "optimizer.pt").write_bytes(b"state")
    Path("run/tmp-checkpoint-700").mkdir()
    return saved


def expect(folder: str, saved: dict[int, Weights], **weights: float) -> None:
    """The folder holds exactly the mean with these weights (``s100=1``), made in float64 and rounded once."""
    found = load_file(Path(folder) / "model.safetensors")
    total = sum(weights.values())
    for name, value in found.items():
        wanted = sum(weight * saved[int(key[1:])][name].double() for key, weight in weights.items()) / total
        assert torch.equal(value, wanted.to(value.dtype)), name


def test_all_checkpoints_of_a_folder(run, training) -> None:
    outcome = run("average", "run", "-o", "out")
    assert outcome.code == 0, outcome.stderr
    expect("out", training, s100=1, s200=1, s300=1, s400=1, s500=1, s600=1)
    assert "from step 100 to step 600" in outcome.stderr and "optimizer.pt" in outcome.stderr
    assert "run/tmp-checkpoint-700 is skipped" in outcome.stderr
    assert not Path("out/optimizer.pt").exists() and not Path("out/trainer_state.json").exists()


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        ("run --last 2", {"s500": 1, "s600": 1}),
        ("run --every 2", {"s200": 1, "s400": 1, "s600": 1}),
        ("run --every 2 --last 2", {"s400": 1, "s600": 1}),
        ("run --from 200 --to 300", {"s200": 1, "s300": 1}),
        ("run/checkpoint-[12]00 --weights 1 3", {"s100": 1, "s200": 3}),
        ("run/checkpoint-600 run/checkpoint-100 --weights 0.25 0.75", {"s100": 0.25, "s600": 0.75}),
        ("run --last 4 --weights linear", {"s300": 1, "s400": 1, "s500": 1, "s600": 1}),
        ("run --last 3 --weights ema:0.5", {"s400": 0.25, "s500": 0.25, "s600": 0.5}),
    ],
)
def test_choices(run, training, words: str, weights: dict[str, float]) -> None:
    outcome = run("average", *words.split(), "-o", "out")
    assert outcome.code == 0, outcome.stderr
    expect("out", training, **weights)


def test_the_recipe_and_the_card_say_the_weights_as_numbers(run, training) -> None:
    assert run("average", "run", "--last", 2, "--weights", "1-sqrt", "-o", "out").code == 0
    recipe = yaml.safe_load(Path("out/pxmerge.yaml").read_text())
    assert list(recipe["merge"]["sources"].values()) == pytest.approx([0.5**0.5, 1 - 0.5**0.5])
    assert "0.7071" in Path("out/README.md").read_text()


def test_many_float32_checkpoints_are_summed_without_drift(run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    saved = [{"w": 1 + torch.rand(64, generator=generator)} for _ in range(40)]
    for step, weights in enumerate(saved):
        write_checkpoint(Path(f"run/step-{step}"), weights, config={})
    assert run("average", "run", "-o", "out").code == 0
    mean = torch.stack([weights["w"].double() for weights in saved]).mean(dim=0)
    assert torch.equal(load_file("out/model.safetensors")["w"], mean.float())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("nowhere", 3, "no such file"),
        ("run --last 9", 3, "--last 9 of 6"),
        ("run --from 900", 3, "they go from 100 to 600"),
        ("run --from 300 --to 200", 2, "is after"),
        ("run --weights 1 2", 2, "2 values for 6 checkpoints"),
        ("run --weights sqrt", 2, "neither a number nor one of"),
        ("run --last 0", 2, "--last"),
        ("run --every 200", 3, "--every 200 counts checkpoints, and there are 6"),
    ],
)
def test_mistakes(run, training, words: str, code: int, message: str) -> None:
    outcome = run("average", *words.split(), "-o", "out")
    assert (outcome.code, outcome.stdout) == (code, "")
    assert message in outcome.stderr and outcome.stderr.count("\n") == 1
    assert not Path("out").exists()


def test_a_step_that_is_missing_is_named(run, training) -> None:
    Path("run/checkpoint-300").rename("elsewhere")
    outcome = run("average", "run", "-o", "out")
    assert outcome.code == 3 and "step 300 is missing" in outcome.stderr
    assert run("average", "run", "--last", 3, "-o", "out").code == 0


def test_checkpoints_of_different_shapes_are_refused(run, training) -> None:
    weights = dict(training[600], **{"model.norm.weight": torch.zeros(9)})
    save_file(weights, "run/checkpoint-600/model.safetensors")
    outcome = run("average", "run", "-o", "out")
    assert outcome.code == 4 and "and [9] in 'checkpoint-600'" in outcome.stderr
    assert not Path("out").exists()


def test_a_checkpoint_that_is_cut_short_is_refused(run, training) -> None:
    file = Path("run/checkpoint-600/model.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    outcome = run("average", "run", "-o", "out")
    assert outcome.code == 3 and "checkpoint-600" in outcome.stderr and not Path("out").exists()


def test_windows_are_models_of_one_pass(run, training) -> None:
    outcome = run("average", "run", "--window", 3, "--stride", 1, "-o", "out", "--json")
    assert outcome.code == 0, outcome.stderr
    folders = sorted(path.name for path in Path("out").iterdir())
    assert folders == [f"steps-{first}-{first + 200}" for first in (100, 200, 300, 400)]
    for first in (100, 200, 300, 400):
        single = run("average", *(f"run/checkpoint-{first + gap}" for gap in (0, 100, 200)), "-o", f"single-{first}")
        assert single.code == 0
        name = f"out/steps-{first}-{first + 200}"
        assert Path(name, "model.safetensors").read_bytes() == Path(f"single-{first}/model.safetensors").read_bytes()
        assert run("verify", name).code == 0
    document = outcome.document()
    stored = sum(tensor.numel() * tensor.element_size() for tensor in training[100].values())
    assert document["bytes_read"] == 6 * stored
    assert list(document["outputs"]) == folders


def _noted_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """What is read from now on: checkpoint, tensor and first byte, of those that machine code reads 0."""
    reads: list[tuple[str, str, int]] = []
    read_into, located = FileReader.read_into, FileReader.located

    def noted(self: FileReader, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        reads.append((self._checkpoint.label, tensor.name, start))
        read_into(self, tensor, start, buffer)

    def noted_place(self: FileReader, tensor: StoredTensor) -> AbstractContextManager[tuple[int, int] | None]:
        reads.append((self._checkpoint.label, tensor.name, 0))
        return located(self, tensor)

    monkeypatch.setattr(FileReader, "read_into", noted)
    monkeypatch.setattr(FileReader, "located", noted_place)
    return reads


def test_windows_read_each_tensor_once(run, training, monkeypatch) -> None:
    reads = _noted_reads(monkeypatch)
    assert run("average", "run", "--window", 4, "--stride", 1, "--weights", "cosine", "-o", "out").code == 0
    assert len(reads) == len(set(reads)) == 6 * len(training[100])


def test_windows_that_do_not_divide_the_run_say_what_is_left(run, training) -> None:
    outcome = run("average", "run", "--window", 4, "-o", "out")
    assert outcome.code == 0 and "the last 2 of them fill no window" in outcome.stderr
    assert [path.name for path in Path("out").iterdir()] == ["steps-100-400"]


def test_an_interrupted_pass_over_windows_goes_on(run, training, monkeypatch) -> None:
    from mergekit_px.checkpoint.writer import CheckpointWriter
    from mergekit_px.errors import WriteError

    write, calls = CheckpointWriter.write, []

    def failing(self, name, start, buffer):
        calls.append(name)
        if len(calls) > 9:
            raise WriteError("the disk refused")
        write(self, name, start, buffer)

    words = ("average", "run", "--window", 3, "--stride", 1, "--threads", 1)
    assert run(*words, "-o", "whole").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", failing)
        assert run(*words, "-o", "out").code == 5
    assert not list(Path("out").glob("*/model.safetensors"))
    assert run(*words, "-o", "out", "--resume").code == 0
    for path in Path("whole").iterdir():
        one, other = (Path(each, path.name, "model.safetensors").read_bytes() for each in ("whole", "out"))
        assert one == other
    assert run(*words, "-o", "out", "--resume").code == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--window 7", 3, "--window 7 of 6 checkpoints"),
        ("--stride 2", 2, "--stride goes with --window"),
        ("--window 2 --push org/name", 2, "--push takes one model"),
        ("--window 2 --weights 1 2 3", 2, "3 values for 2 checkpoints"),
    ],
)
def test_mistakes_with_windows(run, training, words: str, code: int, message: str) -> None:
    outcome = run("average", "run", *words.split(), "-o", "out")
    assert outcome.code == code and message in outcome.stderr
    assert not Path("out").exists()


def test_distributed_checkpoints_of_a_run(run, tmp_path, monkeypatch) -> None:
    import warnings

    import torch.distributed.checkpoint as dcp

    monkeypatch.chdir(tmp_path)
    saved = {}
    for step in (100, 200):
        saved[step] = fine_tune(tiny_llama_tensors(layers=1), step, size=0.1)
        state = {"model": saved[step], "optim": {"state": {"exp_avg": torch.ones(3)}}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state, checkpoint_id=f"run/step-{step}", no_dist=True)
    outcome = run("average", "run", "-o", "out")
    assert outcome.code == 0, outcome.stderr
    assert "left out, since they are not the model: 1 of optim" in outcome.stderr
    expect("out", saved, s100=1, s200=1)
    outcome = run("inspect", "run/step-100", "--json")
    document = outcome.document()
    assert document["format"] == "distributed" and document["tensors"] == len(saved[100])
    assert "1 of optim" in document["notes"][0]
    Path("run/step-200/__0_0.distcp").unlink()
    outcome = run("average", "run", "-o", "other")
    assert outcome.code == 3 and "__0_0.distcp, which is missing" in outcome.stderr
    assert outcome.stderr.count("error") == 1 and not Path("other").exists()


def test_windows_over_encoded_checkpoints_read_each_tensor_once(run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 5):
        weights = {
            "model.layers.0.mlp.up_proj.weight": torch.randn(128, 256, generator=generator).to(torch.float8_e4m3fn),
            "model.layers.0.mlp.up_proj.weight_scale_inv": torch.rand(1, 2, generator=generator) + 0.5,
            "model.norm.weight": torch.randn(8, generator=generator),
        }
        config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
        write_checkpoint(Path(f"run/step-{step}"), weights, config=config)
    with monkeypatch.context() as patch:
        reads = _noted_reads(patch)
        outcome = run("average", "run", "--window", 3, "--stride", 1, "-o", "out", "--dtype", "float32")
    assert outcome.code == 0, outcome.stderr
    values = [read for read in reads if not read[1].endswith("scale_inv")]
    assert len(values) == len(set(values)) == 8
    assert run("average", "run", "--last", 3, "-o", "single", "--dtype", "float32").code == 0
    one, other = (load_file(f"{folder}/model.safetensors") for folder in ("out/steps-2-4", "single"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_are_sent_to_their_own_command(run, training) -> None:
    for step in (100, 200):
        folder = Path(f"run/checkpoint-{step}")
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text("{}")
    outcome = run("average", "run", "-o", "out")
    assert outcome.code == 2 and "run/checkpoint-100: this is an adapter" in outcome.stderr
    assert "pxmerge adapter merge" in outcome.stderr and outcome.stderr.count("\n") == 1
