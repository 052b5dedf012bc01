"""ACMap's merging against float64 and exact rational means; bottleneck adapters of a small vision transformer."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_px.adapters.acmap import AcmapState
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.whole import read_tensors
from mergekit_px.errors import InputNotFoundError, MalformedCheckpointError, TensorMismatchError, UsageError

WIDTH, BOTTLENECK = 6, 2


def task_adapter(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The tensors of one bottleneck adapter for each of two blocks, over many orders of magnitude."""
    random = np.random.default_rng(seed)
    shapes = {"down.weight": (BOTTLENECK, WIDTH), "down.bias": (BOTTLENECK,), "up.weight": (WIDTH, BOTTLENECK)}
    shapes["up.bias"] = (WIDTH,)
    return {
        f"blocks.{block}.adapter_{name}": torch.from_numpy(
            random.normal(size=shape) * 10.0 ** random.integers(-6, 4, size=shape)
        ).to(dtype)
        for block in range(2)
        for name, shape in shapes.items()
    }


def merged(adapters: list[dict[str, torch.Tensor]], **settings: Any) -> dict[str, torch.Tensor]:
    state = AcmapState(**settings)
    for number, adapter in enumerate(adapters):
        state.add(adapter, f"task{number}")
    return state.merged()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_running_mean_is_the_mean(dtype: torch.dtype) -> None:
    adapters = [task_adapter(seed, dtype) for seed in range(7)]
    got = merged(adapters)
    for name, tensor in got.items():
        exact = [sum(Fraction(float(a[name].flatten()[i])) for a in adapters) / 7 for i in range(tensor.numel())]
        expected = torch.tensor([float(value) for value in exact], dtype=torch.float64).to(dtype)
        assert tensor.dtype == dtype
        assert torch.equal(tensor.flatten(), expected)


@pytest.mark.parametrize("mode", ["average", "trim"])
def test_the_order_of_the_tasks_leaves_no_trace(mode: str) -> None:
    adapters = [task_adapter(seed) for seed in range(5)]
    first = merged(adapters, mode=mode, trim_rate=0.4)
    for order in list(permutations(adapters))[1::7]:
        again = merged(list(order), mode=mode, trim_rate=0.4)
        assert all(torch.equal(first[name], tensor) for name, tensor in again.items())


def test_trim_is_the_mean_over_the_adapters_that_keep_an_entry() -> None:
    adapters, rate = [task_adapter(seed) for seed in range(4)], 0.4
    got = merged(adapters, mode="trim", trim_rate=rate)
    for name in adapters[0]:
        values = np.stack([adapter[name].double().numpy() for adapter in adapters])
        cuts = [np.sort(np.abs(v).ravel())[int(rate * v.size)] for v in values]
        kept = np.stack([np.abs(v) >= cut for v, cut in zip(values, cuts, strict=True)])
        expected = (values * kept).sum(axis=0) / np.maximum(kept.sum(axis=0), 1)
        np.testing.assert_allclose(got[name].double().numpy(), expected, rtol=1e-6)
        assert name.endswith("down.bias") or (kept.sum(axis=0) < 4).any()


def test_published_trimming_follows_the_authors_recursion() -> None:
    adapters, rate = [task_adapter(seed) for seed in range(4)], 0.4
    got = merged(adapters, mode="trim_published", trim_rate=rate)
    everything = np.sort(np.abs(np.concatenate([t.double().numpy().ravel() for t in adapters[0].values()])))
    whole_cut = everything[min(int(rate * len(everything)), len(everything) - 1)]
    for name in adapters[0]:
        first = adapters[0][name].double().numpy()
        expected = np.where(np.abs(first) >= whole_cut, first, 0)
        for number, adapter in enumerate(adapters[1:], start=1):
            current = adapter[name].double().numpy()
            kept = np.abs(current) >= np.sort(np.abs(current).ravel())[int(rate * current.size)]
            divisor = np.where(kept, number + 1, number)
            expected = (expected * number + current * kept) / divisor
        np.testing.assert_allclose(got[name].double().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("mode", "wanted"), [("aper", 0), ("none", 2)])
def test_one_adapter_modes(mode: str, wanted: int) -> None:
    adapters = [task_adapter(seed) for seed in range(3)]
    got = merged(adapters, mode=mode)
    assert all(torch.equal(tensor, adapters[wanted][name]) for name, tensor in got.items())


def test_nothing_changes_after_the_stop() -> None:
    adapters = [task_adapter(seed) for seed in range(5)]
    state = AcmapState(limit=3)
    assert [state.add(adapter, f"task{n}") for n, adapter in enumerate(adapters)] == [True, True, True, False, False]
    expected = merged(adapters[:3])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.merged().items())
    assert (state.count, len(state.tasks), sorted(state.past)) == (3, 5, [1, 2, 3])
    endless = AcmapState(limit=0, keep_past=False)
    assert all(endless.add(adapter, "task") for adapter in adapters * 3)
    assert endless.past == {}


def test_past_adapters_and_the_first_are_remembered() -> None:
    adapters = [task_adapter(seed) for seed in range(3)]
    state = AcmapState()
    for number, adapter in enumerate(adapters, start=1):
        state.add(adapter, f"task{number}")
        expected = merged(adapters[:number])
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.past[number].items())
    assert all(torch.equal(tensor, state.first[name]) for name, tensor in adapters[0].items())


@pytest.mark.parametrize("mode", ["average", "trim", "trim_published", "aper", "none"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(mode: str, tmp_path: Path) -> None:
    adapters = [task_adapter(seed) for seed in range(4)]
    path = tmp_path / "acmap.safetensors"
    state = AcmapState(mode=mode, trim_rate=0.3, limit=4)
    for number, adapter in enumerate(adapters):
        state.add(adapter, f"task{number}")
        state.save(path)
        state = AcmapState.load(path)
    unbroken = AcmapState(mode=mode, trim_rate=0.3, limit=4)
    for number, adapter in enumerate(adapters):
        unbroken.add(adapter, f"task{number}")
    unbroken.save(tmp_path / "unbroken.safetensors")
    assert path.read_bytes() == (tmp_path / "unbroken.safetensors").read_bytes()
    assert state.tasks == unbroken.tasks


def test_adapters_come_from_checkpoints_and_integers_stay(tmp_path: Path) -> None:
    adapters = [task_adapter(seed) | {"positions": torch.arange(4)} for seed in range(2)]
    state = AcmapState()
    for number, adapter in enumerate(adapters):
        save_file(adapter, tmp_path / f"{number}.safetensors")
        state.add(read_tensors(open_checkpoint(tmp_path / f"{number}.safetensors")), f"{number}")
    result = state.merged()
    assert torch.equal(result["positions"], torch.arange(4))
    save_file(result, tmp_path / "merged.safetensors")
    assert set(load_file(tmp_path / "merged.safetensors")) == set(adapters[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.adapter_up.bias": None}, "blocks.0.adapter_up.bias is missing"),
        ({"extra": torch.zeros(1)}, "extra is not in the first adapter"),
        ({"blocks.0.adapter_up.bias": torch.zeros(7)}, r"is \[7\], in the first adapter \[6\]"),
        ({"positions": torch.arange(1, 5)}, "positions holds integers other than"),
    ],
)
def test_adapters_of_another_kind_are_refused(change: dict[str, Any], message: str) -> None:
    state = AcmapState()
    state.add(task_adapter(0) | {"positions": torch.arange(4)}, "one")
    other = task_adapter(1) | {"positions": torch.arange(4)} | change
    with pytest.raises(TensorMismatchError, match=message):
        state.add({name: tensor for name, tensor in other.items() if tensor is not None}, "two")
    assert state.count == 1


@pytest.mark.parametrize(
    "settings", [{"mode": "mean"}, {"limit": -1}, {"trim_rate": 1.0}, {"trim_rate": -0.1}], ids=str
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        AcmapState(**settings)


def test_state_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError):
        AcmapState.load(tmp_path / "nowhere.safetensors")
    path = tmp_path / "state.safetensors"
    save_file(task_adapter(0), path)
    with pytest.raises(MalformedCheckpointError, match="not a state of acmap"):
        AcmapState.load(path)
    state = AcmapState()
    state.add(task_adapter(0), "task")
    state.save(path)
    tensors = load_file(path)
    metadata = open_checkpoint(path).metadata
    save_file({name: t for name, t in tensors.items() if not name.startswith("low:")}, path, metadata)
    with pytest.raises(MalformedCheckpointError, match="do not fit the first adapter"):
        AcmapState.load(path)
    save_file(tensors, path, {name: "{}" for name in metadata})
    with pytest.raises(MalformedCheckpointError, match="settings cannot be read"):
        AcmapState.load(path)


def test_nothing_merged_yet() -> None:
    with pytest.raises(UsageError, match="no adapter has been merged"):
        AcmapState().merged()
