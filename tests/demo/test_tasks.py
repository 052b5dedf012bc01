"""The digits and what is done to them."""

from __future__ import annotations

import numpy as np
import pytest

from mergekit_px.demo.tasks import FINE_TUNES, TEST_IMAGES, Task, load_tasks


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return load_tasks(0)


def test_every_task_has_the_same_digits(tasks: dict[str, Task]) -> None:
    plain = tasks["plain"]
    assert plain.test_images.shape == (TEST_IMAGES, 8, 8) and plain.train_images.shape == (1797 - TEST_IMAGES, 8, 8)
    assert plain.test_images.dtype == np.float32
    assert set(plain.test_labels) == set(range(10))
    for name in FINE_TUNES:
        assert np.array_equal(tasks[name].test_labels, plain.test_labels)
        assert np.array_equal(tasks[name].train_labels, plain.train_labels)
        assert not np.array_equal(tasks[name].test_images, plain.test_images)
        assert tasks[name].test_images.min() >= 0 and tasks[name].test_images.max() <= 1


def test_no_digit_is_on_both_sides(tasks: dict[str, Task]) -> None:
    from sklearn.datasets import load_digits

    given = load_digits().images.reshape(1797, 64) / 16
    plain = tasks["plain"]
    together = np.concatenate([plain.train_images, plain.test_images]).reshape(1797, 64)
    assert np.array_equal(np.sort(together, axis=0), np.sort(given.astype(np.float32), axis=0))


def test_distortions_are_what_they_say(tasks: dict[str, Task]) -> None:
    plain, faint, slanted = (tasks[name].test_images for name in ("plain", "faint", "slanted"))
    assert np.allclose(faint, 0.25 * plain + 0.6)
    assert np.array_equal(slanted[:, 0, 3:], plain[:, 0, :-3])
    assert np.array_equal(slanted[:, 7, :-3], plain[:, 7, 3:])
    assert not slanted[:, 0, :3].any() and not slanted[:, 7, -3:].any()
    turned = tasks["turned"].test_images
    assert turned.sum() == pytest.approx(plain.sum(), rel=0.15)
    assert np.abs(turned - plain).mean() > 0.05


def test_seeds_choose_the_split() -> None:
    again, other = load_tasks(0), load_tasks(1)
    first = load_tasks(0)
    for name, task in first.items():
        assert np.array_equal(task.train_images, again[name].train_images)
    assert not np.array_equal(first["plain"].test_labels, other["plain"].test_labels)
