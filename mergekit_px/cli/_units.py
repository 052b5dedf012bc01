"""Numbers for people: sizes in decimal units as on the Hub, counts, durations."""

from __future__ import annotations

import math

_PREFIXES = ("", "k", "M", "G", "T", "P")


def show_bytes(count: float) -> str:
    """``1234567890`` -> ``1.23 GB``; decimal units, three digits."""
    return f"{_scaled(count, 'B')}"


def show_rate(bytes_per_second: float) -> str:
    return f"{_scaled(bytes_per_second, 'B')}/s"


def show_count(count: int) -> str:
    """``8030261248`` -> ``8.03 G``; below 10,000 every digit."""
    return str(count) if abs(count) < 10_000 else _scaled(count, "").rstrip()


def show_seconds(seconds: float) -> str:
    """``under 1 ms``, ``3.21 s``, ``2 min 5 s``, ``1 h 4 min``."""
    if seconds < 0.001:
        return "under 1 ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _scaled(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return f"{value} {unit}"
    power = 0
    while abs(value) >= 999.5 and power < len(_PREFIXES) - 1:
        value /= 1000
        power += 1
    digits = f"{value:.0f}" if power == 0 else f"{value:.3g}"
    return f"{digits} {_PREFIXES[power]}{unit}"
