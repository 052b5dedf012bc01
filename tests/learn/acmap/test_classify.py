from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mergekit_px.adapters.acmap_stored import StoredState
from mergekit_px.errors import InputError, OutputError
from mergekit_px.learn.acmap.classify import ClassifyOptions, classify, nearest, write_predictions
from mergekit_px.learn.acmap.export import require_new, write_adapter, write_head
from mergekit_px.learn.acmap.mapping import MapOptions, map_task


@pytest.fixture
def mapped(problem):
    for task in range(1, 5):
        file = problem.write_features(task, plain=True)
        map_task(MapOptions(state=problem.state, features=file, concatenate=True))
    return problem


def write_test(problem, *, labels: bool = True) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """New examples around those of the first four tasks: the file, features under A_3 and without adapter, labels."""
    random = np.random.default_rng(11)
    x = np.concatenate(problem.inputs[:4])
    x = x + 0.5 * random.normal(size=x.shape)
    found = np.concatenate(problem.labels[:4])
    order = random.permutation(len(x))
    x, found = x[order], found[order]
    features, plain = problem.features(1, 3, x), problem.features(1, 0, x)
    path = problem.folder / "test.npz"
    arrays = {"features": features, "features_0": plain} | ({"labels": found} if labels else {})
    np.savez(path, **arrays)
    return str(path), features, plain, found


def cosines(features: np.ndarray, table: np.ndarray) -> np.ndarray:
    return (features @ table.T) / np.linalg.norm(features, axis=1)[:, None] / np.linalg.norm(table, axis=1)


@pytest.mark.parametrize("mapping", [True, False])
@pytest.mark.parametrize("concatenate", [True, False])
def test_the_largest_cosine_wins(mapped, mapping: bool, concatenate: bool) -> None:
    file, features, plain, labels = write_test(mapped)
    found = classify(ClassifyOptions(mapped.state, features=file, mapped=mapping, concatenate=concatenate))
    tables = mapped.by_hand(4)
    table = np.stack([tables[mapping][c] for c in sorted(tables[0])])
    if concatenate:
        means = []
        for c in sorted(tables[0]):
            task = next(number for number, known in enumerate(mapped.labels, 1) if c in known)
            means.append(mapped.features(task, 0)[mapped.labels[task - 1] == c].mean(axis=0))
        table, features = np.hstack([table, np.stack(means)]), np.hstack([features, plain])
    scores = cosines(features, table)
    np.testing.assert_array_equal(found.classes.numpy(), scores.argmax(axis=1))
    np.testing.assert_allclose(found.cosines.numpy(), scores.max(axis=1), atol=1e-12)
    right = scores.argmax(axis=1) == labels
    accuracy = found.report["accuracy"]
    assert accuracy["overall"] == pytest.approx(100 * right.mean())
    assert 40 < accuracy["overall"] < 100
    for task in range(1, 5):
        owned = np.isin(labels, mapped.labels[task - 1])
        assert accuracy["tasks"][str(task)] == pytest.approx(100 * right[owned].mean())
    tasks = np.array([next(n for n, known in enumerate(mapped.labels, 1) if c in known) for c in scores.argmax(axis=1)])
    np.testing.assert_array_equal(found.tasks.numpy(), tasks)


def test_a_permuted_table_gives_the_same_predictions() -> None:
    generator = torch.Generator().manual_seed(0)
    table, features = torch.randn(30, 16, generator=generator), torch.randn(500, 16, generator=generator)
    order = torch.randperm(30, generator=generator)
    places, cosine = nearest(features, table)
    permuted, same = nearest(features, table[order])
    assert torch.equal(order[permuted], places)
    torch.testing.assert_close(cosine, same)
    assert len(places.unique()) > 10


def test_scaling_changes_nothing_and_zeros_have_no_direction() -> None:
    table = torch.eye(3)
    features = torch.tensor([[2.0, 1, 0], [0, 0, 1e-20], [0, 0, 0]])
    assert nearest(features, table)[0].tolist() == nearest(features * 7, table * 3)[0].tolist() == [0, 2, 0]
    assert nearest(features, table)[1][2] == 0


def test_labels_are_not_needed(mapped) -> None:
    file, *_ = write_test(mapped)
    expected = classify(ClassifyOptions(mapped.state, features=file))
    file, *_ = write_test(mapped, labels=False)
    found = classify(ClassifyOptions(mapped.state, features=file))
    assert torch.equal(found.classes, expected.classes)
    assert found.labels is None and "accuracy" not in found.report
    assert "label" in next(expected.lines()) and "label" not in next(found.lines())


def test_predictions_as_a_file(mapped) -> None:
    file, *_, labels = write_test(mapped)
    found = classify(ClassifyOptions(mapped.state, features=file))
    write_predictions(found, mapped.folder / "deep" / "predictions.npz")
    with np.load(mapped.folder / "deep" / "predictions.npz") as archive:
        assert sorted(archive.files) == ["class", "cosine", "labels", "task"]
        np.testing.assert_array_equal(archive["class"], found.classes.numpy())
        np.testing.assert_array_equal(archive["labels"], labels)


@pytest.mark.parametrize("raw", [False, True])
def test_the_exported_head_in_a_linear_layer(mapped, raw: bool) -> None:
    file, features, _, _ = write_test(mapped)
    path = mapped.folder / "head.safetensors"
    said = write_head(StoredState(mapped.state), path, prefix="head.", bias=True, raw=raw)
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(8, 10)})
    model.load_state_dict(load_file(path))
    with safe_open(path, "pt") as opened:
        assert json.loads(opened.metadata()["pxmerge.classes"]) == said["classes"] == list(range(10))
    scores = model["head"](torch.from_numpy(features).float())
    expected = classify(ClassifyOptions(mapped.state, features=file)).classes
    assert torch.equal(scores.argmax(1), expected) != raw
    norms = model["head"].weight.norm(dim=1)
    assert torch.allclose(norms, torch.ones(10), atol=1e-6) != raw


def test_an_exported_adapter_is_the_mean_of_the_first(mapped) -> None:
    write_adapter(StoredState(mapped.state), mapped.folder / "two.safetensors", 2)
    for name, tensor in load_file(mapped.folder / "two.safetensors").items():
        np.testing.assert_array_equal(tensor.numpy(), mapped.merged(2)[name].astype(np.float32))
    write_adapter(StoredState(mapped.state), mapped.folder / "five.safetensors", 5)
    write_adapter(StoredState(mapped.state), mapped.folder / "three.safetensors", 3)
    assert (mapped.folder / "five.safetensors").read_bytes() == (mapped.folder / "three.safetensors").read_bytes()


@pytest.mark.parametrize("mode", ["average", "trim", "aper", "none"])
def test_without_the_past_only_the_newest_adapter_is_there(problem, mode: str) -> None:
    problem.merge(mode=mode, trim_rate=0.3, keep_past=True)
    with_past = StoredState(problem.state).adapter(3)
    problem.merge(mode=mode, trim_rate=0.3, keep_past=False)
    stored = StoredState(problem.state)
    found = stored.adapter(3)
    assert all(torch.equal(tensor, found[name]) for name, tensor in with_past.items())
    with pytest.raises(InputError, match="of 2 of the 3 tasks is not in the state; it was begun with --no-past"):
        stored.adapter(2)


def test_a_test_file_of_one_class(mapped) -> None:
    path = mapped.folder / "one.npz"
    np.savez(path, features=mapped.features(1, 3)[:3], labels=np.zeros(3, dtype=np.int32))
    assert classify(ClassifyOptions(mapped.state, features=str(path))).report["accuracy"]["tasks"].keys() == {"1"}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": np.ones((2, 8)), "labels": np.array([0, 77])}, "label 77 is a class of no task"),
        ({"features": np.ones((2, 5))}, "features of 5 numbers, the prototypes have 8"),
        ({"features": np.full((2, 8), np.nan)}, "NaN"),
        ({"x": np.ones((2, 8))}, "no array 'features', it has x"),
        ({"features": np.ones((2, 8)), "x": np.ones(2)}, "x has no meaning"),
        ({"features": np.ones((0, 8))}, "no examples"),
    ],
)
def test_files_that_do_not_fit(mapped, arrays, message: str) -> None:
    path = mapped.folder / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=message):
        classify(ClassifyOptions(mapped.state, features=str(path)))


def test_a_state_without_what_is_asked(problem) -> None:
    file, *_ = write_test(problem)
    with pytest.raises(InputError, match="no prototypes yet"):
        classify(ClassifyOptions(problem.state, features=file))
    map_task(MapOptions(state=problem.state, features=problem.write_features(1)))
    options = ClassifyOptions(problem.state, features=problem.write_features(1))
    with pytest.raises(InputError, match="map the tasks with --concatenate"):
        classify(replace(options, concatenate=True))
    assert classify(options).report["not_mapped"] == [2, 3]


def test_what_cannot_be_written_is_refused_first(problem) -> None:
    for name, suffix in (("a.txt", ".npz"), ("a.npz", ".safetensors")):
        with pytest.raises(OutputError, match="end the name so"):
            require_new(problem.folder / name, overwrite=True, suffix=suffix)
    (problem.folder / "a.npz").write_bytes(b"")
    with pytest.raises(OutputError, match="exists already"):
        require_new(problem.folder / "a.npz", overwrite=False, suffix=".npz")
