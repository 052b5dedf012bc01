"""What every learner says to bad input: one line that names it, the exit code of its kind, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_px.checkpoint.fingerprint import fingerprint
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.task_vector import task_vector_metadata
from mergekit_px.cli import main
from mergekit_px.testing.checkpoints import write_checkpoint

CODE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x):
        return self.second(self.first(x).relu())


def net():
    return Net()


class Bad(Net):
    def forward(self, x):
        return super().forward(x) / 0 * 0


def bad():
    return Bad()


def other():
    return 3


def refused():
    raise AssertionError("code that is not allowed was run")


raising = refused
"""

LEARNERS = ["ofasd", "align", "tune", "search", "stats", "regmean-order"]
Refused = Callable[..., str]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, two fine-tunes, the components and the task vector of one, a recipe and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(CODE)
    generator = torch.Generator().manual_seed(0)
    shapes = {"first.weight": (16, 8), "first.bias": (16,), "second.weight": (4, 16), "second.bias": (4,)}
    base = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    write_checkpoint(tmp_path / "base", base)
    for number in range(2):
        tuned = {name: one + 0.1 * torch.randn(one.shape, generator=generator) for name, one in base.items()}
        write_checkpoint(tmp_path / f"client{number}", tuned)
    write_task_vector("tau", {name: tuned[name] - one for name, one in base.items()}, "base")
    u, s, v = torch.linalg.svd(tuned["first.weight"] - base["first.weight"], full_matrices=False)
    write_components({"first.weight.U": u, "first.weight.S": s, "first.weight.V": v.T}, "base")
    (tmp_path / "recipe.yaml").write_text(
        "models: {base: ./base, a: ./client0, b: ./client1}\n"
        "merge: {method: task_arithmetic, base: base, sources: {a: 0.5, b: 0.5}}\n"
    )
    write_data()
    return tmp_path


def write_task_vector(name: str, tensors: dict[str, Tensor], base: str) -> None:
    write_checkpoint(Path(name), tensors, metadata=task_vector_metadata(fingerprint_of(base)))


def write_components(tensors: dict[str, Tensor], base: str) -> None:
    metadata = {"pxmerge.kind": "components", "pxmerge.base_fingerprint": fingerprint_of(base)}
    save_file({name: one.contiguous() for name, one in tensors.items()}, "components.safetensors", metadata)


def fingerprint_of(base: str) -> str:
    checkpoint = open_checkpoint(Path(base))
    with closing(open_reader(checkpoint)) as reader:
        return fingerprint(checkpoint, reader)


def write_data(**changes: Any) -> None:
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(40, 8)).astype(np.float32), "labels": np.arange(40) % 4, **changes}
    np.savez("data.npz", **{name: one for name, one in arrays.items() if one is not None})


def words_of(learner: str, *more: str, model: str = "net.py:net") -> list[str]:
    transported = ["--source-base", "base", "--source-model", "client0", "--base", "client1"]
    own = {
        "ofasd": ["ofasd", "--base", "base", "--sources", "client0", "client1", "--steps", "2"],
        "align": ["align", *transported, "--sites", "all", "--sided", "two", "--steps", "2"],
        "tune": ["tune", "components.safetensors", "--base", "base", "--steps", "2"],
        "search": ["search", "recipe.yaml", "--over", "merge.sources.a=0,1"],
        "stats": ["stats", "base"],
        "regmean-order": ["regmean-order", "--sources", "client0", "client1"],
    }[learner]
    output = "out.safetensors" if learner == "stats" else "out"
    end = ["--data", "data.npz", "-o", output, "--device", "cpu", "-q", "--allow-code"]
    return [*own, *end, *(["--model", model] if model else []), *more]


@pytest.fixture
def refused(world: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a learner that has to refuse; returns the line that it says."""

    def run(code: int, words: list[str], *, keeps: bool = False) -> str:
        capsys.readouterr()
        assert main(words) == code, capsys.readouterr().err
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
        assert keeps or not (Path("out/model").exists() or Path("out.safetensors").exists())
        assert keeps or not Path("out/coefficients.safetensors").exists()
        return captured.err

    return run


@pytest.mark.parametrize("learner", LEARNERS)
def test_the_world_is_good(learner: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words_of(learner, "--json")) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) and captured.err == ""


@pytest.mark.parametrize("learner", LEARNERS)
def test_data_that_does_not_fit(learner: str, refused: Refused) -> None:
    inputs = np.zeros((40, 8), np.float32)
    write_data(x=None, pixels=inputs)
    error = refused(3, words_of(learner))
    assert "data.npz: the arrays (pixels) are not those of the model's forward pass" in error
    assert "it needs x; it takes no pixels; its arguments are x" in error
    write_data(x=inputs[:, :5])
    assert "the model cannot take the arrays (x [5] for an example)" in refused(3, words_of(learner))
    write_data(labels=np.arange(40) % 5)
    assert "labels go from 0 to 4, the model has classes 0 to 3" in refused(3, words_of(learner))
    write_data(labels=np.arange(40) % 4 - 1)
    assert "labels go from -1 to 2" in refused(3, words_of(learner))
    write_data(x=inputs[:0], labels=np.zeros(0, np.int64))
    assert "data.npz: it holds no examples" in refused(3, words_of(learner))
    write_data(labels=np.full(40, 2))
    assert "every label is 2: nothing can be learnt from one class" in refused(3, words_of(learner))
    write_data(x=np.full((40, 8), np.nan, np.float32))
    assert "x holds a NaN or an infinity" in refused(3, words_of(learner))
    write_data(x=np.array([{}] * 40, dtype=object))
    assert "data.npz: it holds Python objects, which are not read" in refused(3, words_of(learner))
    Path("data.npz").unlink()
    assert "data.npz: no such data file" in refused(3, words_of(learner))


@pytest.mark.parametrize("learner", LEARNERS)
def test_code_that_makes_no_model(learner: str, refused: Refused) -> None:
    words = words_of(learner, model="net.py:raising")
    words.remove("--allow-code")
    assert "allow it with --allow-code" in refused(2, words)
    assert "the file has no function nett" in refused(2, words_of(learner, model="net.py:nett"))
    assert "nothing.py: no such file" in refused(3, words_of(learner, model="nothing.py:net"))
    assert "it returned int, not a torch.nn.Module" in refused(2, words_of(learner, model="net.py:other"))
    assert "names no function; write file.py:function" in refused(2, words_of(learner, model="net.py"))
    assert "it has no config.json that names a class" in refused(3, words_of(learner, model=""))


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_checkpoint_without_its_head(learner: str, refused: Refused) -> None:
    for name in ("base", "client0", "client1"):
        path = Path(name) / "model.safetensors"
        save_file({k: v for k, v in load_file(path).items() if k.startswith("first")}, path, {"format": "pt"})
    components = load_file("components.safetensors")
    write_components(components, "base")
    error = refused(4, words_of(learner))
    assert "does not fit the model net.py:net: it lacks second.weight, second.bias" in error


def test_a_class_without_a_head(refused: Refused) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    model = transformers.BertModel(config)
    for name in ("base", "client0", "client1"):
        shutil.rmtree(name)
        model.save_pretrained(name)
    write_data(x=None, input_ids=np.zeros((40, 3), np.int64))
    for learner in ("ofasd", "search", "stats"):
        error = refused(3, words_of(learner, model=""))
        assert "data.npz: BertModel has no head that scores classes" in error
        assert "its last tensors are pooler.dense.weight, pooler.dense.bias" in error


@pytest.mark.parametrize("learner", ["ofasd", "align", "tune", "search"])
def test_models_of_other_shapes(learner: str, refused: Refused) -> None:
    name = "base" if learner == "tune" else "client0"
    path = Path(name) / "model.safetensors"
    save_file({**load_file(path), "first.weight": torch.zeros(16, 9)}, path, {"format": "pt"})
    words = words_of(learner, *(["--allow-base-mismatch"] if learner == "tune" else []))
    error = refused(4, words)
    assert "first.weight" in error and "[16, 9]" in error and "[16, 8]" in error


def test_a_task_vector_of_another_base(world: Path, refused: Refused) -> None:
    ofasd = [word.replace("client1", "tau") for word in words_of("ofasd")]
    align = words_of("align")
    align[align.index("--source-model") : align.index("--source-model") + 2] = ["--task-vector", "tau"]
    recipe = Path("recipe.yaml").read_text().replace("./client1", "./tau")
    Path("recipe.yaml").write_text(recipe)
    for words in (ofasd, align, words_of("search")):
        assert main(words) == 0
        shutil.rmtree("out")
    write_task_vector("tau", load_file("tau/model.safetensors"), "client1")
    for words in (ofasd, align, words_of("search")):
        assert "another base" in refused(4, words)
    write_components(load_file("components.safetensors"), "client0")
    assert "of another base" in refused(3, words_of("tune"))


@pytest.mark.parametrize(
    ("learner", "words"),
    [
        ("ofasd", ["--learning-rate", "1e37", "--steps", "9"]),
        ("ofasd", ["--learning-rate", "1e300"]),
        ("tune", ["--learning-rate", "3e37", "--steps", "9"]),
        ("tune", ["--learning-rate", "1e38"]),
        ("align", ["--learning-rate", "1e30", "--steps", "9"]),
        ("align", ["--learning-rate", "1e38"]),
        ("align", ["--learning-rate", "1e38", "--param", "polar"]),
        ("align", ["--tune-rate", "1e30"]),
        ("align", ["--tune-rate", "1e38"]),
    ],
)
def test_a_rate_far_too_large_keeps_the_last_good_artefact(learner: str, words: list[str], refused: Refused) -> None:
    error = refused(5, words_of(learner, *words), keeps=True)
    assert error.startswith("error: out: ") and "kept" in error and "lower" in error and "--overwrite" in error
    artefact = {
        "ofasd": "out/coefficients.safetensors",
        "tune": "out/components.safetensors",
        "align": "out/task_vector/model.safetensors",
    }[learner]
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(artefact).values())


def test_a_control_that_diverges_leaves_what_was_asked_for(refused: Refused) -> None:
    error = refused(5, words_of("align", "--tune-rate", "1e38"), keeps=True)
    assert "of a few-shot fine-tune; the transported task vector is kept, without scores" in error
    whole = words_of("align", "-o", "whole")
    assert main(whole) == 0
    for name in ("task_vector/model.safetensors", "rotations.safetensors"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()


@pytest.mark.parametrize(
    ("learner", "flag"), [("ofasd", "--learning-rate"), ("align", "--learning-rate"), ("align", "--tune-rate")]
)
def test_a_rate_is_a_finite_number(learner: str, flag: str, refused: Refused) -> None:
    for word in ("inf", "nan", "0"):
        assert f"{flag} must be " in refused(2, words_of(learner, flag, word))


def test_statistics_that_are_no_numbers(refused: Refused) -> None:
    error = refused(5, words_of("stats", model="net.py:bad"))
    assert "a statistic is NaN or infinite" in error and "first.bias" in error
