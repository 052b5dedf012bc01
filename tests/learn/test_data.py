from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mergekit_px.errors import InputError, InputNotFoundError, UsageError
from mergekit_px.learn.data import (
    BatchStream,
    Examples,
    derived_seed,
    examples,
    read_arrays,
    require_arguments,
    require_classes,
    shuffled,
    split_rows,
    to_device,
)


def load_examples(path: Path) -> Examples:
    return examples(read_arrays(path), str(path))


def few(rows: int = 10) -> dict[str, torch.Tensor]:
    return {"x": torch.arange(rows * 2.0).reshape(rows, 2), "labels": torch.arange(rows) % 3}


def test_npz_and_safetensors_hold_the_same(tmp_path: Path) -> None:
    arrays = few()
    np.savez(tmp_path / "a.npz", **{name: array.numpy() for name, array in arrays.items()})
    save_file(arrays, tmp_path / "a.safetensors")
    first, second = load_examples(tmp_path / "a.npz"), load_examples(tmp_path / "a.safetensors")
    for name, array in arrays.items():
        assert torch.equal(first.arrays[name], array)
        assert torch.equal(second.arrays[name], array)
    assert len(first) == 10


def test_labels_become_int64_and_values_stay() -> None:
    classes = examples({"x": torch.zeros(2, 1), "labels": torch.tensor([0, 1], dtype=torch.uint8)}, "d")
    assert classes.arrays["labels"].dtype is torch.int64
    values = examples({"x": torch.zeros(2, 1), "labels": torch.tensor([0.5, 1.5])}, "d")
    assert values.arrays["labels"].dtype is torch.float32


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": torch.zeros(2), "label": torch.zeros(2)}, "data: it has no array 'labels', it has label, x"),
        ({"labels": torch.tensor([0, 1])}, "it has 'labels' and no inputs"),
        ({"x": torch.zeros(3, 2), "labels": torch.tensor([0, 1])}, "x has 3 rows and labels has 2"),
        ({"x": torch.zeros(0, 2), "labels": torch.zeros(0)}, "it holds no examples"),
        ({"x": torch.zeros(2), "labels": torch.tensor([4, 4])}, "every label is 4: nothing can be learnt"),
        ({"x": torch.zeros(2), "labels": torch.tensor([1.5, 1.5])}, "every label is 1.5"),
        ({"x": torch.zeros(2), "labels": torch.tensor([-100, -100])}, "every label is -100, which is left out"),
        ({"x": torch.tensor([0.0, float("nan")]), "labels": torch.tensor([0, 1])}, "x holds a NaN or an infinity"),
        ({"x": torch.tensor(1.0), "labels": torch.tensor([0, 1])}, "x is a single value"),
    ],
)
def test_what_is_no_data(arrays: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError) as caught:
        examples(arrays, "data")
    assert message in str(caught.value)


def test_files_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no such data file"):
        load_examples(tmp_path / "none.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InputError, match=r"broken.npz: not a readable .npz file"):
        load_examples(tmp_path / "broken.npz")
    (tmp_path / "text.xyz").write_text("1,2")
    with pytest.raises(InputError, match=r"data comes as .jsonl"):
        load_examples(tmp_path / "text.xyz")
    np.savez(tmp_path / "words.npz", x=np.array(["a", "b"]), labels=np.array([0, 1]))
    with pytest.raises(InputError, match="x holds <U1, not numbers"):
        load_examples(tmp_path / "words.npz")


def test_python_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    np.savez(tmp_path / "trap.npz", x=np.array([Trap(), Trap()], dtype=object), labels=np.array([0, 1]))
    with pytest.raises(InputError, match="Python objects, which are not read"):
        load_examples(tmp_path / "trap.npz")
    assert not (tmp_path / "sprung").exists()


def test_big_endian_numbers_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "big.npz", x=np.array([[1.5], [2.5]], dtype=">f4"), labels=np.array([0, 1], dtype=">i2"))
    found = load_examples(tmp_path / "big.npz")
    assert found.arrays["x"].tolist() == [[1.5], [2.5]]
    assert found.arrays["labels"].tolist() == [0, 1]


class Takes(nn.Module):
    def forward(self, pixels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return pixels


class TakesAny(nn.Module):
    def forward(self, pixels: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        return pixels


def test_arrays_are_compared_with_the_forward_pass() -> None:
    require_arguments(Takes(), ["pixels", "labels"], "d")
    require_arguments(Takes(), ["pixels", "mask", "labels"], "d")
    require_arguments(TakesAny(), ["pixels", "extra"], "d")
    with pytest.raises(InputError) as caught:
        require_arguments(Takes(), ["pixel", "labels"], "d.npz")
    assert str(caught.value) == (
        "d.npz: the arrays (pixel) are not those of the model's forward pass: it needs pixels; it takes no pixel;"
        " its arguments are mask, pixels"
    )


def test_labels_are_compared_with_the_classes() -> None:
    require_classes(torch.tensor([0, 2, -100]), 3, "d")
    with pytest.raises(InputError, match="labels go from 0 to 3, the model has classes 0 to 2"):
        require_classes(torch.tensor([0, 3]), 3, "d")
    with pytest.raises(InputError, match="labels go from -1 to 1"):
        require_classes(torch.tensor([-1, 1]), 3, "d")


def test_a_split_is_a_partition_that_the_seed_decides() -> None:
    parts = split_rows(50, {"validation": 0.1, "test": 0.2}, 3, "d")
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 35, "validation": 5, "test": 10}
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(50))
    again, other = (split_rows(50, {"validation": 0.1, "test": 0.2}, seed, "d") for seed in (3, 4))
    assert all(torch.equal(parts[name], again[name]) for name in parts)
    assert not torch.equal(parts["train"], other["train"])


def test_a_split_leaves_something_to_train_on() -> None:
    assert len(split_rows(3, {"validation": 0.01, "test": 0.01}, 0, "d")["train"]) == 1
    with pytest.raises(UsageError, match="2 examples do not suffice for 1 of validation, 1 of test and training"):
        split_rows(2, {"validation": 0.01, "test": 0.01}, 0, "d")


def test_batches_go_through_every_epoch_in_a_new_order() -> None:
    data = examples(few(10), "d")
    stream = shuffled(data, 3, seed=1, label="m")
    epochs = [torch.cat([stream.next()["x"][:, 0] for _ in range(3)]).tolist() for _ in range(2)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert shuffled(data, 30, seed=1, label="m").next()["x"].shape == (10, 2)


def test_a_stream_goes_on_from_any_place() -> None:
    data = examples(few(10), "d")
    stream = shuffled(data, 3, seed=1, label="m")
    seen = []
    places = []
    for _ in range(8):
        places.append(stream.place)
        seen.append(stream.next()["x"])
    for place, expected in zip(places, seen, strict=True):
        fresh = shuffled(data, 3, seed=1, label="m")
        fresh.seek(place)
        assert torch.equal(fresh.next()["x"], expected)


def test_a_stream_without_batches_says_so() -> None:
    with pytest.raises(InputError, match=r"loader.py: the data has no batches"):
        BatchStream(lambda epoch: [], "loader.py").next()


def test_derived_seeds_tell_purposes_apart() -> None:
    seeds = {derived_seed(0, "a", 1), derived_seed(0, "a", 11), derived_seed(1, "a", 1), derived_seed(0, "a1")}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(0, "a", 1) == derived_seed(0, "a", 1)


def test_only_real_numbers_get_the_dtype_of_the_model() -> None:
    batch = {"x": torch.zeros(1, dtype=torch.float64), "labels": torch.zeros(1).long()}
    moved = to_device(batch, torch.device("cpu"), torch.float32)
    assert (moved["x"].dtype, moved["labels"].dtype) == (torch.float32, torch.int64)
