"""Fisher information and Gram matrices against autograd on the whole batch and numpy; the command; bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.cli import main
from mergekit_px.cli._output import Output
from mergekit_px.cli.learner import told
from mergekit_px.errors import InputError, UsageError
from mergekit_px.learn.data import Examples, examples
from mergekit_px.learn.labels import read_labels
from mergekit_px.learn.life import run_learner
from mergekit_px.learn.models import LearningModel, load_model
from mergekit_px.learn.state import StateFile
from mergekit_px.learn.stats import run, sums
from mergekit_px.learn.stats.fisher import FisherSums, Labels
from mergekit_px.learn.stats.gram import GramSums
from mergekit_px.testing import write_checkpoint

CODE = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3, bias=False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.inner(self.embed(input_ids)))

def small():
    return Small()

def tokens():
    return Tokens()
"""

Made = tuple[Path, Path, Path]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A code file, a checkpoint of ``small`` and data for it."""
    code = tmp_path / "models.py"
    code.write_text(CODE)
    torch.manual_seed(0)
    namespace: dict = {}
    exec(CODE, namespace)
    folder = write_checkpoint(tmp_path / "model", namespace["small"]().state_dict())
    data = tmp_path / "data.npz"
    np.savez(data, **arrays())
    return code, folder, data


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(10, 6)).astype(np.float32), "labels": np.arange(10) % 3}


def loaded(made: Made, function: str = "small", folder: Path | None = None) -> LearningModel:
    model = load_model(open_checkpoint(folder or made[1]), f"{made[0]}:{function}", allow_code=True)
    model.module.eval()
    return model


def data_of(given: dict[str, np.ndarray]):
    return examples({name: torch.from_numpy(array) for name, array in given.items()}, "data")


def fisher_information(
    model: LearningModel, data: Examples, labels: Labels = "expected", seed: int = 0
) -> dict[str, torch.Tensor]:
    device = torch.device("cpu")
    found = FisherSums(model, labels=labels, seed=seed, device=device, precision="float32")
    sums.add_up(found, read_labels(model.module, data, device)[0])
    return found.means(len(data))


def gram_matrices(model: LearningModel, data: Examples, batch: int = 64) -> dict[str, torch.Tensor]:
    device = torch.device("cpu")
    found = GramSums(model, batch=batch, device=device, precision="float32")
    sums.add_up(found, read_labels(model.module, data, device)[0])
    return found.means()


def dense_fisher(module: nn.Module, name: str, label_of) -> torch.Tensor:
    """Squared gradients of one log-probability at a time, from the definition, in float64."""
    given = arrays()
    module = module.double()
    total = torch.zeros_like(dict(module.named_parameters())[name])
    for row in range(10):
        scores = module(torch.from_numpy(given["x"][row : row + 1]).double()).log_softmax(-1)[0]
        for label, share in label_of(row, scores.detach().exp()):
            module.zero_grad()
            scores[label].backward(retain_graph=True)
            total += share * dict(module.named_parameters())[name].grad ** 2
    return total / 10


@pytest.mark.parametrize("labels", ["expected", "given"])
def test_fisher_is_the_mean_of_squared_gradients(made: Made, labels: Labels) -> None:
    found = fisher_information(loaded(made), data_of(arrays()), labels=labels)
    given = arrays()["labels"]

    def label_of(row: int, probabilities: torch.Tensor):
        return enumerate(probabilities) if labels == "expected" else [(int(given[row]), 1.0)]

    for name in ("first.weight", "first.bias", "norm.weight", "last.weight"):
        dense = dense_fisher(loaded(made).module, name, label_of)
        torch.testing.assert_close(found[name].double(), dense, rtol=1e-4, atol=1e-9)


def test_every_floating_tensor_has_fisher_information_and_what_is_not_used_has_none(made: Made) -> None:
    model = loaded(made)
    found = fisher_information(model, data_of(arrays()))
    assert set(found) == {name for name, one in model.tensors().items() if one.is_floating_point()}
    assert not found["unused"].any() and not found["norm.running_mean"].any()


def test_sampled_labels_follow_the_seed_and_come_near_the_expectation(made: Made) -> None:
    model = loaded(made)
    many = {name: np.tile(array, (80, *[1] * (array.ndim - 1))) for name, array in arrays().items()}
    first = fisher_information(model, data_of(many), labels="sampled", seed=3)
    again = fisher_information(model, data_of(many), labels="sampled", seed=3)
    other = fisher_information(model, data_of(many), labels="sampled", seed=4)
    assert torch.equal(first["last.weight"], again["last.weight"])
    assert not torch.equal(first["last.weight"], other["last.weight"])
    exact = fisher_information(model, data_of(arrays()))
    assert float(first["last.weight"].sum() / exact["last.weight"].sum()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_gram_matrices_are_of_the_inputs_of_linear_layers(made: Made, batch: int) -> None:
    model = loaded(made)
    found = gram_matrices(model, data_of(arrays()), batch=batch)
    assert set(found) == {"first.weight", "last.weight"}
    x = arrays()["x"].astype(np.float64)
    np.testing.assert_allclose(found["first.weight"].numpy(), x.T @ x / 10, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        hidden = torch.tanh(model.module.norm(model.module.first(torch.from_numpy(arrays()["x"])))).double()
    torch.testing.assert_close(found["last.weight"].double(), hidden.T @ hidden / 10, rtol=1e-5, atol=1e-6)


def test_masked_tokens_do_not_count_and_tied_weights_add_up(made: Made, tmp_path: Path) -> None:
    namespace: dict = {}
    exec(CODE, namespace)
    torch.manual_seed(1)
    state = namespace["tokens"]().state_dict()
    folder = write_checkpoint(tmp_path / "tokens", {name: tensor.clone() for name, tensor in state.items()})
    model = loaded(made, "tokens", folder)
    ids = np.array([[0, 1, 2], [3, 4, 0]])
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    given = data_of({"input_ids": ids, "attention_mask": mask, "labels": ids})
    found = gram_matrices(model, given)
    seen = state["embed.weight"][torch.from_numpy(ids)][torch.from_numpy(mask).bool()]
    torch.testing.assert_close(found["inner.weight"], seen.T @ seen / 5)
    fisher = fisher_information(model, given, labels="sampled")
    assert torch.equal(fisher["head.weight"], fisher["embed.weight"]) and fisher["embed.weight"].any()
    with pytest.raises(UsageError, match="--labels sampled"):
        fisher_information(model, given)


def command(made: Made, output: Path, *words: object) -> int:
    code, folder, data = made
    factory = ["--model", f"{code}:small", "--allow-code"]
    return main(["stats", str(folder), "--data", str(data), "-o", str(output), *factory, *map(str, words)])


def test_the_file_merges(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "statistics.safetensors"
    assert command(made, output) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert main(["verify", str(output), "-q"]) == 0
    found = load_file(output)
    torch.testing.assert_close(
        found["last.weight.fisher"], fisher_information(loaded(made), data_of(arrays()))["last.weight"]
    )
    report = json.loads(output.with_suffix(".json").read_text())
    assert (
        report["examples"] == 10
        and len(report["inputs"]["data"][0]["sha256"]) == 64
        and report["settings"]["seed"] == 0
    )
    x = arrays()["x"]
    assert report["gram_trace"]["first.weight"] == pytest.approx((x**2).sum() / 10, rel=1e-5)
    twice = [made[1], made[1], output, output]
    for method in ("fisher", "regmean"):
        merged = tmp_path / method
        assert main([method, "--sources", *map(str, twice), "-o", str(merged), "-q"]) == 0
        for name, tensor in load_file(merged / "model.safetensors").items():
            torch.testing.assert_close(tensor, load_file(made[1] / "model.safetensors")[name])
    output = tmp_path / "esm"
    assert main(["esm", "--base", str(made[1]), "--sources", *map(str, twice), "-o", str(output)]) == 0


def test_equal_commands_give_equal_files_and_nothing_is_replaced_unasked(made: Made, tmp_path: Path, capsys) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    words = ("--labels", "sampled", "--examples", 6, "--what", "fisher")
    assert command(made, first, *words) == command(made, second, *words) == 0
    assert first.read_bytes() == second.read_bytes()
    assert all(name.endswith(".fisher") for name in load_file(first))
    assert command(made, first) == 4 and "--overwrite" in capsys.readouterr().err
    assert command(made, first, "--overwrite", "--what", "gram") == 0
    assert set(load_file(first)) == {"first.weight.gram", "last.weight.gram"}


def test_bfloat16_is_for_passes_alone(made: Made, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.safetensors" for name in ("float32", "bfloat16")}
    for precision, output in files.items():
        assert command(made, output, "--precision", precision, "-q") == 0
        assert json.loads(output.with_suffix(".json").read_text())["settings"]["precision"] == precision
    single, half = (load_file(path) for path in files.values())
    for name, tensor in half.items():
        assert tensor.dtype == torch.float32 and bool(tensor.isfinite().all())
        torch.testing.assert_close(tensor, single[name], rtol=0.1, atol=0.02)
    assert not torch.equal(half["first.weight.fisher"], single["first.weight.fisher"])
    assert not torch.equal(half["last.weight.gram"], single["last.weight.gram"])


@pytest.mark.parametrize("stop", [3, 12])
def test_resumed_is_uninterrupted(made: Made, tmp_path: Path, monkeypatch, capsys, stop: int) -> None:
    whole, halved = tmp_path / "whole.safetensors", tmp_path / "halved.safetensors"
    words = ("--labels", "sampled", "--batch", 2, "-q")
    assert command(made, whole, *words) == 0
    add, seen = sums.add_up, []

    def interrupted(*given, after, **named):
        def counted(batches: int) -> None:
            after(batches)
            seen.append(batches)
            if len(seen) == stop:
                raise KeyboardInterrupt

        add(*given, after=counted, **named)

    with monkeypatch.context() as patch:
        patch.setattr(run, "add_up", interrupted)
        patch.setattr(StateFile, "due", True)
        assert command(made, halved, *words) == 130
    assert "--resume" in capsys.readouterr().err and not halved.exists()
    assert command(made, halved, *words) == 4 and "an unfinished run is there" in capsys.readouterr().err
    assert command(made, halved, *words, "--resume", "--seed", 1) == 4
    assert "another plan" in capsys.readouterr().err
    assert command(made, halved, *words, "--resume", "--overwrite") == 2
    assert command(made, halved, *words, "--resume") == 0
    assert halved.read_bytes() == whole.read_bytes()
    assert halved.with_suffix(".json").read_bytes() == whole.with_suffix(".json").read_bytes()
    assert not (tmp_path / ".halved.pxmerge").exists()
    assert command(made, halved, *words, "--resume") == 4 and "no unfinished run" in capsys.readouterr().err


def test_bad_input(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, folder, data = made
    output = tmp_path / "out.safetensors"

    def refused(given: dict[str, np.ndarray]) -> str:
        np.savez(data, **given)
        assert command(made, output) == 3 and not output.exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "its arguments are x" in refused({"pixels": arrays()["x"], "labels": arrays()["labels"]})
    assert "labels go from 0 to 7" in refused({**arrays(), "labels": np.array([7] + [0] * 9)})
    assert "nothing can be learnt from one class" in refused({**arrays(), "labels": np.zeros(10, dtype=np.int64)})
    assert "no examples" in refused({"x": np.zeros((0, 6), np.float32), "labels": np.zeros(0, np.int64)})
    assert "cannot take the arrays (x [5] for an example)" in refused({**arrays(), "x": arrays()["x"][:, :5]})
    assert command(made, output, "--what", "hessian") == 2
    assert main(["stats", str(folder), "--data", str(data), "-o", str(tmp_path / "out.bin")]) == 4
    assert main(["stats", str(folder), "--data", str(data), "-o", str(output), "--model", f"{code}:small"]) == 2
    assert "--allow-code" in capsys.readouterr().err


def test_values_are_no_classes(made: Made, tmp_path: Path) -> None:
    np.savez(made[2], x=arrays()["x"], labels=np.linspace(0, 1, 10, dtype=np.float32))
    code = {"model": f"{made[0]}:small", "allow_code": True}
    with pytest.raises(InputError, match="taken for classes"):
        run_learner("stats", checkpoint=made[1], data=made[2], output=tmp_path / "out.safetensors", **code)


def test_progress_is_told_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    tell = told(Output("human"), clock=lambda: now[0])
    for done, seconds in enumerate((1.0, 9.9, 10.0, 11.0, 19.9, 20.0)):
        now[0] = seconds
        tell("examples", done, 6)
    assert capsys.readouterr().err == "examples: 2 of 6\nexamples: 5 of 6\n"
    now[0] = 99.0
    told(Output("quiet"), clock=lambda: now[0] * 2)("examples", 1, 6)
    assert capsys.readouterr().err == ""
