"""The digits and what is done to them."""

from __future__ import annotations

import numpy as np
import pytest

from mergekit_px.demo.tasks import TASKS, TEST_IMAGES, Images, Task, load_tasks


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return load_tasks(0)


@pytest.fixture(scope="module")
def digits() -> Images:
    from sklearn.datasets import load_digits

    return (load_digits().images / 16).astype(np.float32)


def test_every_task_has_the_same_digits(tasks: dict[str, Task]) -> None:
    first, *others = tasks.values()
    assert tuple(tasks) == TASKS
    assert first.test_images.shape == (TEST_IMAGES, 8, 8) and first.train_images.shape == (1797 - TEST_IMAGES, 8, 8)
    assert set(first.test_labels) == set(range(10))
    for task in others:
        assert np.array_equal(task.test_labels, first.test_labels)
        assert np.array_equal(task.train_labels, first.train_labels)
        assert not np.array_equal(task.test_images, first.test_images)
        assert task.test_images.dtype == np.float32
        assert task.test_images.min() >= 0 and task.test_images.max() <= 1


def test_no_digit_is_on_both_sides(tasks: dict[str, Task], digits: Images) -> None:
    mirrored = tasks["mirrored"]
    together = np.concatenate([mirrored.train_images, mirrored.test_images])[:, :, ::-1].reshape(1797, 64)
    assert np.array_equal(np.sort(together, axis=0), np.sort(digits.reshape(1797, 64), axis=0))


def test_distortions_are_what_they_say(tasks: dict[str, Task]) -> None:
    turned, faint, slanted, mirrored = (tasks[name].test_images for name in TASKS)
    plain = mirrored[:, :, ::-1]
    assert np.allclose(faint, 0.25 * plain + 0.6)
    assert np.array_equal(slanted[:, 0, 3:], plain[:, 0, :-3])
    assert np.array_equal(slanted[:, 7, :-3], plain[:, 7, 3:])
    assert not slanted[:, 0, :3].any() and not slanted[:, 7, -3:].any()
    assert turned.sum() == pytest.approx(plain.sum(), rel=0.15)
    assert np.abs(turned - plain).mean() > 0.05


def test_seeds_choose_the_split() -> None:
    again, other = load_tasks(0), load_tasks(1)
    first = load_tasks(0)
    for name, task in first.items():
        assert np.array_equal(task.train_images, again[name].train_images)
        assert not np.array_equal(task.test_labels, other[name].test_labels)
