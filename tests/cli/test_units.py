from __future__ import annotations

import pytest

from mergekit_px.cli._units import show_bytes, show_count, show_rate, show_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (1_234_567_890, "1.23 GB"), (5e12, "5 TB")],
)
def test_bytes(count: float, text: str) -> None:
    assert show_bytes(count) == text


def test_rates() -> None:
    assert show_rate(2.5e8) == "250 MB/s"


@pytest.mark.parametrize(("count", "text"), [(0, "0"), (9999, "9999"), (10_000, "10 k"), (8_030_261_248, "8.03 G")])
def test_counts(count: int, text: str) -> None:
    assert show_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4e-6, "under 1 ms"), (0.0123, "0.0123 s"), (59.96, "60 s"), (125, "2 min 5 s"), (3840, "1 h 4 min")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text
