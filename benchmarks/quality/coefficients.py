"""Coefficients learned by the library, and the merge that their recipe makes."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.quality.lab import MODEL, Lab, State
from mergekit_px.learn.ofasd import OfasdOptions, Settings, learn_coefficients


def learned(
    lab: Lab, base: str, sources: Sequence[str], data: str, settings: Settings, counts: Sequence[float] | None = None
) -> State:
    """The model with the coefficients that ``settings`` lead to."""
    output = lab.folder / "coefficients"
    learn_coefficients(
        OfasdOptions(
            base=base,
            sources=sources,
            data=data,
            output=output,
            counts=counts,
            model=MODEL,
            settings=settings,
            compare=False,
            device="cpu",
            mode="overwrite",
            allow_code=True,
        )
    )
    return lab.merge("run", str(output / "recipe.yaml"))
