from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_px.adapters.acmap import AcmapState
from mergekit_px.adapters.acmap_stored import StoredState
from mergekit_px.errors import InputError, UsageError
from mergekit_px.learn.acmap.mapping import MapOptions, map_task
from mergekit_px.learn.acmap.prototypes import Prototypes


def table_of(state: Path) -> Prototypes:
    return Prototypes.of(StoredState(state))


def map_features(problem, of: int, **given):
    return map_task(MapOptions(state=problem.state, features=problem.write_features(of), **given))


def check(problem, upto: int) -> None:
    originals, mapped = problem.by_hand(upto)
    table = table_of(problem.state)
    assert table.classes.tolist() == sorted(originals)
    np.testing.assert_allclose(table.vectors.numpy(), np.stack([originals[c] for c in sorted(originals)]), atol=1e-12)
    np.testing.assert_allclose(table.mapped().numpy(), np.stack([mapped[c] for c in sorted(mapped)]), atol=1e-12)


def test_every_step_is_what_the_pseudo_code_gives(problem) -> None:
    for task in range(1, 6):
        report = map_features(problem, task)
        check(problem, task)
        assert (report["t"], report["L"], report["adapter"]) == (task, 3, min(task, 3))
    originals, mapped = problem.by_hand(5)
    moved = [c for c in originals if not np.array_equal(originals[c], mapped[c])]
    assert moved == [0, 1, 2, 3, 4]  # the classes of tasks 1 and 2; at L = 3 too, and none after it


def test_the_last_task_before_the_stop_is_mapped_too(problem) -> None:
    for task in (1, 2):
        map_features(problem, task)
    before = table_of(problem.state).shifts.clone()
    report = map_features(problem, 3)
    after = table_of(problem.state).shifts
    assert not torch.allclose(after[0], before[0])
    assert report["shifts"]["1"]["norm"] == pytest.approx(float(after[0].norm()))
    assert report["shifts"]["3"]["norm"] == 0


def test_after_the_stop_nothing_changes(problem) -> None:
    for task in (1, 2, 3):
        map_features(problem, task)
    before = table_of(problem.state)
    for task in (4, 5):
        map_features(problem, task)
    after = table_of(problem.state)
    old = torch.isin(after.classes, before.classes)
    assert torch.equal(after.mapped()[old], before.mapped())
    assert torch.equal(after.mapped()[~old], after.vectors[~old])


def test_a_pure_translation_is_undone_exactly(problem) -> None:
    """Each merged adapter moves every feature by a vector of its own; old prototypes end where old data would."""
    random = np.random.default_rng(0)
    moves = np.round(random.normal(size=(4, 5)) * 8) / 8
    clouds = [np.round(random.normal(size=(12, 5)) * 8) / 8 for _ in range(3)]
    for task in (1, 2, 3):
        cloud, labels = clouds[task - 1], np.arange(12) % 4 + 4 * task
        arrays = {"features": cloud + moves[task], "labels": labels}
        arrays |= {f"features_{number}": cloud + moves[number] for number in range(1, task)}
        file = problem.folder / f"moved{task}.npz"
        np.savez(file, **arrays)
        map_task(MapOptions(state=problem.state, features=str(file)))
    table = table_of(problem.state)
    truth = torch.from_numpy(
        np.stack([(clouds[c // 4 - 1] + moves[3])[(np.arange(12) % 4) == c % 4].mean(axis=0) for c in range(4, 16)])
    )
    assert float((table.mapped() - truth).abs().max()) < 1e-14
    assert float((table.vectors - truth).abs().max()) > 0.1


def test_without_movement_mapped_and_original_are_the_same(problem) -> None:
    for task in (1, 2, 3):
        features = np.random.default_rng(task).normal(size=(6, 4))
        arrays = {"features": features, "labels": np.arange(6) % 2 + 2 * task}
        arrays |= {f"features_{number}": features for number in range(1, task)}
        np.savez(problem.folder / "still.npz", **arrays)
        map_task(MapOptions(state=problem.state, features=str(problem.folder / "still.npz")))
    table = table_of(problem.state)
    assert torch.equal(table.mapped(), table.vectors)


def test_prototypes_do_not_depend_on_the_order_of_examples_or_adapters(problem) -> None:
    for task in (1, 2, 3):
        map_features(problem, task)
    expected = table_of(problem.state)
    problem.merge()
    for task in (1, 2, 3):
        rows = np.random.default_rng(task).permutation(len(problem.labels[task - 1]))
        problem.labels[task - 1] = problem.labels[task - 1][rows]
        problem.inputs[task - 1] = problem.inputs[task - 1][rows]
        map_features(problem, task)
    torch.testing.assert_close(table_of(problem.state).mapped(), expected.mapped(), rtol=0, atol=1e-13)
    problem.adapters[:3] = problem.adapters[2::-1]
    state = AcmapState(limit=3)
    for number, adapter in enumerate(problem.adapters, 1):
        state.add(adapter, f"{number}")
    merged = StoredState(problem.state).adapter(3)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in state.merged().items())


def test_merging_goes_on_between_mappings(problem) -> None:
    whole = problem.folder / "whole"
    for task in (1, 2, 3):
        map_features(problem, task)
    problem.state.rename(whole)
    for task in (1, 2, 3):
        if task == 1:
            problem.merge(upto=1)
        else:
            state = AcmapState.load(problem.state)
            state.add(problem.adapters[task - 1], f"task{task}")
            state.save(problem.state)
        map_features(problem, task)
    for adapter in (3, 4):
        state = AcmapState.load(problem.state)
        state.add(problem.adapters[adapter], f"task{adapter + 1}")
        state.save(problem.state)
    assert problem.state.read_bytes() == whole.read_bytes()


def test_again_changes_nothing(problem) -> None:
    for task in (1, 2, 3):
        map_features(problem, task)
    before = problem.state.read_bytes()
    for task in (1, 3, 2):
        assert map_features(problem, task)["was_mapped_already"]
        assert map_features(problem, task, task=task)["task"] == task
    assert problem.state.read_bytes() == before


def test_other_data_for_a_mapped_task_is_refused(problem) -> None:
    map_features(problem, 1)
    before = problem.state.read_bytes()
    with pytest.raises(InputError, match=r"task 1 was mapped from other data.*as task 2"):
        map_task(MapOptions(state=problem.state, features=problem.write_features(2), task=1))
    with pytest.raises(InputError, match="concatenate False, now it is True"):
        map_features(problem, 1, concatenate=True)
    assert problem.state.read_bytes() == before


def test_tasks_come_in_their_order(problem) -> None:
    with pytest.raises(InputError, match="task 3 comes after task 1, which has no prototypes"):
        map_features(problem, 3, task=3)


def test_an_adapter_must_be_merged_before_its_task_is_mapped(problem) -> None:
    problem.merge(upto=1)
    map_features(problem, 1)
    with pytest.raises(InputError, match="task 2 needs the merged adapter of 2 tasks, and 1 have been merged"):
        map_features(problem, 2)


def test_after_the_stop_adapters_need_not_be_merged(problem) -> None:
    problem.merge(upto=3)
    for task in (1, 2, 3, 4):
        map_features(problem, task)
    check(problem, 4)


def test_a_class_belongs_to_one_task(problem) -> None:
    map_features(problem, 1)
    problem.labels[1][0] = 1
    with pytest.raises(InputError, match="class 1 belongs to task 1 already"):
        map_features(problem, 2)


def test_the_oracle_measures_drift(problem) -> None:
    for task in (1, 2):
        map_features(problem, task)
    files = []
    for task in (1, 2):
        path = problem.folder / f"old{task}.safetensors"
        arrays = {"features": problem.features(task, 3), "labels": problem.labels[task - 1]}
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
        files.append(str(path))
    drift = map_features(problem, 3, oracle=tuple(files))["drift"]
    originals, mapped = problem.by_hand(3)
    for task in (1, 2):
        features, labels = problem.features(task, 3), problem.labels[task - 1]
        truth = {c: features[labels == c].mean(axis=0) for c in np.unique(labels)}
        for name, table in (("before", originals), ("after", mapped)):
            relative = [np.linalg.norm(truth[c] - table[c]) / np.linalg.norm(originals[c]) for c in truth]
            assert drift["tasks"][str(task)][name] == pytest.approx(np.mean(relative))
    again = map_features(problem, 3, oracle=tuple(files))
    assert again["was_mapped_already"] and again["drift"] == drift


def test_oracles_that_do_not_fit(problem) -> None:
    np.savez(problem.folder / "unlabelled.npz", features=np.ones((2, 8)))
    np.savez(problem.folder / "later.npz", features=np.ones((2, 8)), labels=np.array([0, 50]))
    np.savez(problem.folder / "narrow.npz", features=np.ones((2, 3)), labels=np.array([0, 1]))
    np.savez(problem.folder / "good.npz", features=np.ones((2, 8)), labels=np.array([0, 1]))
    before = problem.state.read_bytes()
    for names, message in [(["missing.npz"], "no such"), (["unlabelled.npz"], "no array 'labels'")]:
        with pytest.raises(InputError, match=message):
            map_features(problem, 1, oracle=tuple(str(problem.folder / name) for name in names))
        assert problem.state.read_bytes() == before
    for names, message in [
        (["later.npz"], "class 50 is in no task that has been mapped"),
        (["narrow.npz"], "features of 3 numbers, the prototypes have 8"),
        (["good.npz", "good.npz"], "another oracle has too"),
    ]:
        with pytest.raises(InputError, match=message):
            map_features(problem, 1, oracle=tuple(str(problem.folder / name) for name in names))


def test_an_oracle_without_mapping_moves_nothing_when_the_adapter_is_the_same(problem) -> None:
    report = map_features(problem, 1, oracle=(problem.write_features(1, name="old.npz"),))
    assert report["drift"]["before"] == report["drift"]["after"] == 0


def test_the_file_of_prototypes(problem) -> None:
    for task in (1, 2, 3):
        map_features(problem, task, output=problem.folder / "prototypes.safetensors")
    found = load_file(problem.folder / "prototypes.safetensors")
    table = table_of(problem.state)
    assert torch.equal(found["prototypes"], table.mapped().float())
    assert torch.equal(found["original"], table.vectors.float())
    assert found["class"].tolist() == list(range(7)) and found["class"].dtype == torch.int64
    assert found["task"].tolist() == [1, 1, 2, 2, 2, 3, 3]
    assert found["count"].tolist() == [4, 7, 4, 7, 10, 4, 7]


def test_a_task_of_one_class(problem) -> None:
    problem.labels[0][:] = 40
    map_features(problem, 1)
    map_features(problem, 2)
    np.testing.assert_allclose(table_of(problem.state).mapped()[-1].numpy(), problem.by_hand(2)[1][40], atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "no array 'labels'"),
        ({"features": None}, "no array 'features', it has features_1, labels"),
        ({"features_1": None}, "no features_1; expected are features, features_1, labels, found features, labels"),
        ({"features_9": np.ones((4, 3))}, "features_9 has no meaning; expected are features, features_1, labels"),
        ({"features_1": np.ones((3, 3))}, "features_1 has 3 rows and labels has 4"),
        ({"features_1": np.ones((4, 2))}, "features of 2 numbers, the prototypes of earlier tasks have 3"),
        ({"features": np.ones((4, 2)), "features_1": np.ones((4, 2))}, "features of 2 numbers"),
        ({"features": np.ones((4, 3, 2))}, r"features is float64 \[4, 3, 2\]"),
        ({"features": np.ones((4, 3), dtype=np.int64)}, "floating-point"),
        ({"features": np.full((4, 3), np.nan)}, "features holds a NaN"),
        ({"features_1": np.full((4, 3), np.inf)}, "features_1 holds a NaN or an infinity"),
        ({"labels": np.array([5, 5, 6, -1])}, "labels go from -1"),
        ({"labels": np.array([5, 5, 6, 1])}, "class 1 belongs to task 1"),
        ({"labels": np.array([[5, 5, 6, 6]])}, "one class number for each example"),
        ({"labels": np.array([5.0, 5.0, 6.0, 6.0])}, "one class number for each example"),
        ({"labels": np.zeros(0, dtype=np.int64)}, "no examples"),
        ({"labels": np.array(["a", "b", "c", "d"])}, "labels holds no numbers"),
    ],
)
def test_files_that_do_not_fit(problem, change, message: str) -> None:
    good = {"features": np.ones((4, 3)), "labels": np.array([0, 1, 0, 1])}
    np.savez(problem.folder / "first.npz", **good)
    map_task(MapOptions(state=problem.state, features=str(problem.folder / "first.npz")))
    before = problem.state.read_bytes()
    arrays = good | {"features_1": np.ones((4, 3)), "labels": np.array([5, 5, 6, 6])} | change
    np.savez(problem.folder / "second.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(InputError, match=message):
        map_task(MapOptions(state=problem.state, features=str(problem.folder / "second.npz")))
    assert problem.state.read_bytes() == before


@pytest.mark.parametrize(
    ("classes", "message"),
    [((0, 1, 2), "class 2 of the task has no examples"), ((0,), "class 1 is in the labels and not among the classes")],
)
def test_classes_that_contradict_the_labels(problem, classes: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        map_features(problem, 1, classes=classes)
    map_features(problem, 1, classes=(0, 1))


def test_features_without_an_adapter_for_all_tasks_or_none(problem) -> None:
    map_task(MapOptions(state=problem.state, features=problem.write_features(1, plain=True), concatenate=True))
    with pytest.raises(UsageError, match="kept for task 1"):
        map_features(problem, 2)
    map_task(MapOptions(state=problem.state, features=problem.write_features(2, plain=True), concatenate=True))
    table = table_of(problem.state)
    for c in range(5):
        task = 1 if c < 2 else 2
        expected = problem.features(task, 0)[problem.labels[task - 1] == c].mean(axis=0)
        np.testing.assert_allclose(table.plain[c].numpy(), expected, atol=1e-12)


def test_a_state_whose_table_contradicts_itself_is_refused(problem) -> None:
    map_features(problem, 1)
    state = AcmapState.load(problem.state)
    for name, tensor, message in [
        ("class", torch.tensor([1, 1]), "a class twice"),
        ("task", torch.tensor([1, 2]), "never mapped"),
        ("count", torch.tensor([1, 2, 3]), "different lengths"),
        ("shifts", torch.zeros(2, 8, dtype=torch.float64), "translations"),
        ("vectors", torch.zeros(2, 8), "other types"),
    ]:
        broken = AcmapState.load(problem.state)
        broken.prototypes = state.prototypes | {name: tensor}
        broken.save(problem.folder / "broken")
        with pytest.raises(InputError, match=message):
            table_of(problem.folder / "broken")


def test_what_is_no_state(problem) -> None:
    save_file({"a": torch.ones(2)}, problem.folder / "other.safetensors")
    with pytest.raises(InputError, match="not a state of acmap"):
        map_task(MapOptions(state=problem.folder / "other.safetensors", features=problem.write_features(1)))
    with pytest.raises(InputError, match="nowhere"):
        map_task(MapOptions(state=problem.folder / "nowhere", features=problem.write_features(1)))
    assert not list(problem.folder.glob("*.lock"))


def test_features_or_data_not_both(problem) -> None:
    for given in ({}, {"features": "a.npz", "data": "b.npz"}):
        with pytest.raises(UsageError, match="either --features or --data"):
            map_task(MapOptions(state=problem.state, **given))
