"""Coefficients of blocks: what a model becomes with them, and their gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import mergekit_px.learn.ofasd.blend as blends
from mergekit_px.artefacts.coefficients import group_numbers
from mergekit_px.checkpoint.contents import StoredTensor
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.task_vector import task_vector_metadata
from mergekit_px.checkpoint.whole import read_elements
from mergekit_px.errors import PlanError, TensorMismatchError, UsageError
from mergekit_px.learn.data import IGNORED, LABELS, Examples, shuffled
from mergekit_px.learn.labels import read_labels
from mergekit_px.learn.models import load_model
from mergekit_px.learn.objective import cross_entropy
from mergekit_px.learn.ofasd.blend import Blend, check_sources, find_sites, parameters_of
from mergekit_px.learn.ofasd.blocks import Parameter, make_blocks
from mergekit_px.learn.ofasd.learner import Learner
from mergekit_px.learn.ofasd.objective import distillation, entropy, penalty
from mergekit_px.learn.ofasd.settings import CoefficientSettings as Settings
from mergekit_px.testing.checkpoints import fine_tune, write_checkpoint

SETTINGS = [
    Settings(),
    Settings(granularity="layer"),
    Settings(granularity="model"),
    Settings(granularity="groups", groups=("bias", r"layers\.0")),
    Settings(granularity="random", random_groups=3, seed=4),
]


class Net(nn.Module):
    """Two numbered layers, a batch norm, and an output that is tied to the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.layers[1](self.layers[0](x).tanh()))
        logits: Tensor = self.head(hidden)
        return logits


def double_net() -> Net:
    return Net().double()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A base and three fine-tunes, float64."""
    torch.manual_seed(0)
    base = double_net().state_dict()
    base.pop("head.weight")
    models = [base, *(fine_tune(base, seed, size=0.3) for seed in range(3))]
    for model in models:
        model["norm.running_var"] = model["norm.running_var"].abs() + 0.5
    return [write_checkpoint(tmp_path / f"m{number}", model) for number, model in enumerate(models)]


@contextmanager
def blended(folders: list[Path], settings: Settings, *, stream: bool = False) -> Iterator[tuple[Blend, nn.Module]]:
    base, *sources = map(open_checkpoint, folders)
    check_sources(base, sources)
    model = load_model(base, double_net)
    sites = find_sites(model)
    blend = Blend(sites, make_blocks(*parameters_of(sites), settings), base, sources, stream=stream)
    yield blend, model.module.eval()
    blend.close()


def coefficients(blend: Blend, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, len(blend.blocks.names), generator=generator, dtype=torch.float64) * 0.5


def gradient_of(blend: Blend, values: Tensor, loss: Tensor) -> Tensor:
    values = values.clone().requires_grad_()
    with blend.gradients(values):
        loss.backward()
    assert values.grad is not None and all(site.target.grad is None for site in blend.sites)
    return values.grad


def stored(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (SETTINGS[0], ["a.0.w", "a.0.b", "a.1.w", "out"]),
        (SETTINGS[1], ["a.0", "a.1", "out"]),
        (SETTINGS[2], ["all"]),
        (Settings(granularity="groups", groups=("b$", "0")), ["0", "b$", "other"]),
        (Settings(granularity="random", random_groups=2), ["a.0.w [0]", "a.0.w [1]", "a.0.b", "a.1.w [0]", "a.1.w [1]",
                                                          "out"]),
    ],
)  # fmt: skip
def test_blocks_by_granularity(settings: Settings, expected: list[str]) -> None:
    shapes = {"a.0.w": (4, 4), "a.0.b": (4,), "a.1.w": (4, 4), "out": (4,)}
    parameters = [Parameter((name,), shape) for name, shape in shapes.items()]
    blocks = make_blocks(parameters, ["running"], settings)
    assert list(blocks.names) == [*expected, "running"]
    assert blocks.learned == (True,) * len(expected) + (False,)
    for name, (first, count) in blocks.tensors.items():
        assert first >= 0 and first + count <= len(blocks.names), name


def test_tied_names_share_a_block() -> None:
    blocks = make_blocks([Parameter(("a", "b"), (2, 2))], [], Settings())
    assert blocks.names == ("a",) and blocks.tensors["a"] == blocks.tensors["b"] == (0, 1)


@pytest.mark.parametrize("pattern", ["(", "nowhere"])
def test_bad_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"pattern|regular expression"):
        make_blocks([Parameter(("a",), (2,))], [], Settings(granularity="groups", groups=(pattern,)))


@pytest.mark.parametrize("settings", SETTINGS)
def test_assembled_tensors_are_the_sums(folders: list[Path], settings: Settings) -> None:
    base, *tuned = map(stored, folders)
    with blended(folders, settings) as (blend, module):
        values = coefficients(blend)
        blend.assemble(values)
        for name, tensor in base.items():
            if not tensor.is_floating_point():
                continue
            first, count = blend.blocks.tensors[name]
            rows = values[:, first : first + count].numpy()
            groups = group_numbers(settings.seed, name, tensor.numel(), count).reshape(tensor.shape).numpy()
            deltas = np.stack([(one[name] - tensor).numpy() for one in tuned])
            expected = tensor.numpy() + (rows[:, groups] * deltas).sum(axis=0)
            np.testing.assert_allclose(module.state_dict()[name].numpy(), expected, rtol=1e-12, atol=1e-14)


def test_equal_coefficients_are_the_mean_and_a_one_hot_row_is_that_source(folders: list[Path]) -> None:
    _, *tuned = map(stored, folders)
    with blended(folders, Settings()) as (blend, module):
        values = torch.full_like(coefficients(blend), 1 / 3)
        blend.assemble(values)
        for name in ("layers.1.weight", "norm.running_var"):
            mean = torch.stack([one[name] for one in tuned]).mean(dim=0)
            torch.testing.assert_close(module.state_dict()[name], mean, rtol=1e-12, atol=1e-14)
        blend.assemble(torch.eye(3, dtype=torch.float64)[1][:, None].expand_as(values))
        for name in ("layers.1.weight", "norm.running_var"):
            torch.testing.assert_close(module.state_dict()[name], tuned[1][name], rtol=1e-12, atol=1e-14)


def test_no_coefficients_are_the_base(folders: list[Path]) -> None:
    base = stored(folders[0])
    with blended(folders, Settings()) as (blend, module):
        blend.assemble(coefficients(blend))
        blend.assemble(torch.zeros_like(coefficients(blend)))
        assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in base.items())


@pytest.mark.parametrize("settings", SETTINGS)
def test_one_value_everywhere_is_that_value_for_the_whole_model(folders: list[Path], settings: Settings) -> None:
    values = torch.tensor([0.4, -0.3, 1.2], dtype=torch.float64)[:, None]
    with blended(folders, Settings(granularity="model")) as (whole, expected):
        whole.assemble(values.expand(3, len(whole.blocks.names)))
        with blended(folders, settings) as (blend, module):
            blend.assemble(values.expand(3, len(blend.blocks.names)))
            for name, tensor in expected.state_dict().items():
                torch.testing.assert_close(module.state_dict()[name], tensor, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("clip", "stream", "granularity", "reads"),
                         [(1e3, True, "tensor", 1), (0.05, True, "tensor", 2), (1e3, False, "tensor", 0),
                          (1e3, True, "model", 2)])  # fmt: skip
def test_learning_is_that_of_a_plain_loop_with_all_task_vectors_resident(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, clip: float, stream: bool, granularity: str, reads: int
) -> None:
    inputs, _, labels = losses()
    given = Examples({"x": inputs, LABELS: labels}, "data")
    options: dict[str, Any] = {"granularity": granularity, "clip": clip, "batch_norm": "mean"}
    settings = Settings(objective="cross-entropy", batch=3, steps=12, learning_rate=0.1, **options)
    base, *tuned = map(stored, folders)
    read: Counter[str] = Counter()

    def counting(reader: Any, tensor: StoredTensor, piece: slice, memory: Tensor) -> Tensor:
        read[tensor.name] += piece.stop - piece.start
        return read_elements(reader, tensor, piece, memory)

    monkeypatch.setattr(blends, "read_elements", counting)
    with blended(folders, settings, stream=stream) as (blend, module):
        data, _ = read_labels(module, given, torch.device("cpu"), inputs.dtype)
        start = torch.zeros(3, len(blend.blocks.names), dtype=torch.float64)
        filled = settings.filled(labelled=True)
        parts = {"train": data, "validation": data}
        learner = Learner(blend, module, parts, start, filled, torch.device("cpu"))
        blend.assemble(start)
        batches = shuffled(data, 3, settings.seed, "train")
        names = [site.name for site in blend.sites if site.is_parameter]
        columns = [blend.blocks.tensors[name][0] for name in names]
        free = torch.zeros(3, sum(blend.blocks.learned), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([free], lr=0.1, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        other = double_net().eval()
        other.load_state_dict({**base, "head.weight": base["layers.0.weight"]})
        for _ in range(12):
            read.clear()
            with blend.gradients(learner.values, learner.advance):
                found = learner.training.learn()
            assert {name: read[name] for name in names} == {name: 4 * reads * base[name].numel() for name in names}
            batch = batches.next()
            merged = {
                name: base[name] + sum(free[row, column] * (one[name] - base[name]) for row, one in enumerate(tuned))
                for column, name in zip(columns, names, strict=True)
            }
            loss = nn.functional.cross_entropy(functional_call(other, merged, batch["x"]), batch[LABELS])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([free], clip)
            optimizer.step()
            schedule.step()
            assert found == pytest.approx(float(loss.detach()), rel=1e-6)
            torch.testing.assert_close(learner.values.detach()[:, : len(free[0])], free.detach(), rtol=1e-5, atol=1e-6)
        assert free.abs().max() > 0.1
        exact = {name: module.state_dict()[name].clone() for name in names}
        blend.assemble(start)
        blend.assemble(learner.values.detach())
        assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in exact.items())


def losses() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    teacher = torch.randn(8, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    return inputs, teacher, torch.randint(0, 6, (8,), generator=generator)


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradient_is_that_of_autograd_and_of_finite_differences(folders: list[Path], settings: Settings) -> None:
    inputs, teacher, labels = losses()

    def loss_of(logits: Tensor) -> Tensor:
        return distillation(logits, teacher, 2.0) + 0.3 * cross_entropy(logits, labels) + 0.1 * entropy(logits)

    with blended(folders, settings) as (blend, module):
        values = coefficients(blend)
        blend.assemble(values)
        gradient = gradient_of(blend, values, loss_of(module(inputs)))
        learned = torch.tensor(blend.blocks.learned)
        assert gradient[:, learned].abs().min() > 0 and not gradient[:, ~learned].any()

        free = values.clone().requires_grad_()
        base, *tuned = map(stored, folders)
        state = {}
        for site in blend.sites:
            if site.is_parameter:
                first, count = blend.blocks.tensors[site.name]
                groups = group_numbers(settings.seed, site.name, site.target.numel(), count).view(site.target.shape)
                deltas = [one[site.name] - base[site.name] for one in tuned]
                state[site.name] = base[site.name] + sum(
                    free[row, first : first + count][groups] * delta for row, delta in enumerate(deltas)
                )
        (expected,) = torch.autograd.grad(loss_of(functional_call(module, state, inputs)), free)
        torch.testing.assert_close(gradient[:, learned], expected[:, learned], rtol=1e-9, atol=1e-11)

        step = 1e-5
        for column in learned.nonzero().flatten()[:4]:
            found = []
            for sign in (1, -1):
                moved = values.clone()
                moved[2, column] += sign * step
                blend.assemble(moved)
                with torch.no_grad():
                    found.append(float(loss_of(module(inputs))))
            difference = (found[0] - found[1]) / (2 * step)
            assert float(gradient[2, column]) == pytest.approx(difference, rel=1e-5, abs=1e-8)


def test_streaming_changes_nothing(folders: list[Path]) -> None:
    inputs, teacher, _ = losses()
    found = []
    for stream in (False, True):
        with blended(folders, SETTINGS[4], stream=stream) as (blend, module):
            values = coefficients(blend)
            blend.assemble(values)
            gradient = gradient_of(blend, values, distillation(module(inputs), teacher, 1.0))
            found.append((gradient, {name: tensor.clone() for name, tensor in module.state_dict().items()}))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], tensor) for name, tensor in found[1][1].items())


def test_task_vectors_are_sources_too_but_only_on_their_base(folders: list[Path], tmp_path: Path) -> None:
    from contextlib import closing

    from mergekit_px.checkpoint.fingerprint import fingerprint
    from mergekit_px.checkpoint.reader import open_reader

    base, first, *_ = map(stored, folders)
    delta = {name: first[name] - tensor if tensor.is_floating_point() else tensor for name, tensor in base.items()}
    opened = open_checkpoint(folders[0])
    with closing(open_reader(opened)) as reader:
        right = fingerprint(opened, reader)
    vector = write_checkpoint(tmp_path / "tau", delta, metadata=task_vector_metadata(right))
    with blended([folders[0], folders[1]], Settings()) as (blend, module):
        blend.assemble(torch.full((1, len(blend.blocks.names)), 0.7, dtype=torch.float64))
        expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with blended([folders[0], vector], Settings()) as (blend, module):
        blend.assemble(torch.full((1, len(blend.blocks.names)), 0.7, dtype=torch.float64))
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-14)
    with pytest.raises(PlanError, match="another base"):
        check_sources(open_checkpoint(folders[2]), [open_checkpoint(vector)])


def test_sources_that_do_not_fit_are_refused(folders: list[Path], tmp_path: Path) -> None:
    base = open_checkpoint(folders[0])
    tensors = stored(folders[1])
    wider = write_checkpoint(tmp_path / "wider", {**tensors, "layers.0.bias": torch.zeros(7)})
    with pytest.raises(TensorMismatchError, match=r"layers\.0\.bias has shape \[7\] and \[6\]"):
        check_sources(base, [open_checkpoint(wider)])
    shorter = write_checkpoint(tmp_path / "shorter", {name: one for name, one in tensors.items() if "bias" not in name})
    with pytest.raises(TensorMismatchError, match=r"it lacks layers\.0\.bias"):
        check_sources(base, [open_checkpoint(shorter)])
    with pytest.raises(TensorMismatchError, match=r"the base has no more"):
        check_sources(base, [open_checkpoint(write_checkpoint(tmp_path / "more", {**tensors, "more": torch.ones(1)}))])


def test_losses_against_numpy() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = logits.numpy()

    def soft(values: np.ndarray) -> np.ndarray:
        return np.exp(values) / np.exp(values).sum(axis=1, keepdims=True)

    p = soft(scores)
    assert float(entropy(logits)) == pytest.approx(float(-(p * np.log(p)).sum(axis=1).mean()))
    teacher = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q, cool = soft(teacher.numpy() / 3), soft(scores / 3)
    expected = 9 * (q * np.log(q / cool)).sum(axis=1).mean()
    assert float(distillation(logits, (teacher / 3).log_softmax(-1), 3.0)) == pytest.approx(expected.item())
    labels = torch.tensor([0, IGNORED, 3, 1, IGNORED])
    expected = -np.log(p[[0, 2, 3], [0, 3, 1]]).mean()
    assert float(cross_entropy(logits, labels)) == pytest.approx(expected.item())
    assert float(cross_entropy(logits, torch.full((5,), IGNORED))) == 0.0


@pytest.mark.parametrize("norm", [1, 2])
def test_penalty_and_its_gradient(norm: int) -> None:
    values = torch.tensor([[0.5, 2.0, 7.0]], dtype=torch.float64, requires_grad=True)
    initial, learned = torch.tensor([[1.0, 1.0, 1.0]]).double(), torch.tensor([True, True, False])
    expected = 0.3 * ((values - initial)[:, learned].abs() ** norm).mean()
    expected.backward()
    found = penalty(values, initial, learned, 0.3, norm)
    assert torch.is_tensor(found) and found.item() == pytest.approx(expected.item())
    assert torch.allclose(torch.autograd.grad(found, values)[0], values.grad)
