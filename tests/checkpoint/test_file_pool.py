"""Pools of open files stay within what the system allows, all of them together."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mergekit_px.checkpoint import file_pool
from mergekit_px.checkpoint.file_pool import FilePool


class _File:
    open_now = 0

    def __init__(self, name: str) -> None:
        _File.open_now += 1

    def close(self) -> None:
        _File.open_now -= 1


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FilePool]]:
    monkeypatch.setattr(file_pool, "files_at_once", lambda: 10)
    made = [FilePool(_File) for _ in range(5)]  # type: ignore[arg-type]
    yield made
    for pool in made:
        pool.close()
    assert _File.open_now == 0


def test_all_pools_together_respect_the_limit_of_the_process(pools: list[FilePool]) -> None:
    most = 0
    for number in range(40):
        for pool in pools:
            with pool.use(str(number)):
                most = max(most, _File.open_now)
    assert 5 <= most <= 10


def test_files_in_use_are_never_closed(pools: list[FilePool]) -> None:
    with pools[0].use("a") as file:
        for number in range(30):
            with pools[1].use(str(number)):
                pass
        with pools[0].use("a") as again:
            assert again is file


def test_the_limit_follows_the_system() -> None:
    resource = pytest.importorskip("resource")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == resource.RLIM_INFINITY or 4 <= file_pool.files_at_once() <= max(4, soft)
