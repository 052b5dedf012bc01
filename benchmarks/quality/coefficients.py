"""Coefficients learned by the library, and the merge that their recipe makes."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.quality.lab import MODEL, Lab, State
from mergekit_px import run_learner
from mergekit_px.learn.ofasd.settings import CoefficientSettings


def learned(
    lab: Lab,
    base: str,
    sources: Sequence[str],
    data: str,
    settings: CoefficientSettings,
    counts: Sequence[float] = (),
    model: str = MODEL,
) -> State:
    """The model with the coefficients that ``settings`` lead to."""
    output = lab.folder / "coefficients"
    run_learner(
        "ofasd",
        base=base,
        sources=sources,
        data=data,
        output=output,
        counts=counts,
        controls="cheap",
        device="cpu",
        overwrite=True,
        allow_code=True,
        **settings.model_dump(exclude={"model"}),
        model=model,
    )
    return lab.merge("run", str(output / "recipe.yaml"))
