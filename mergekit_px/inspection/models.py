"""``inspect``, ``compare``, ``advise`` and ``verify`` by one call each, for programs and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_px.errors import UsageError
from mergekit_px.escaping import html_table
from mergekit_px.plan.inputs import fetch_input, open_input
from mergekit_px.python_values import given_path, given_paths

if TYPE_CHECKING:
    from mergekit_px.inspection.advice import Advice
    from mergekit_px.inspection.verify import Verification


class Comparison(dict[str, Any]):
    """What ``pxmerge compare --json`` prints, as dicts and lists; notebooks show its totals."""

    def __repr__(self) -> str:
        return f"<Comparison of {', '.join(self['models'])} with {self['reference']}: {len(self['tensors'])} tensors>"

    def _repr_html_(self) -> str:
        total = self["total"]
        rows = [
            (
                model,
                f"relative change {row['relative']:.3g}, cosine {row['cosine']:.4f}, "
                f"{row['tensors_equal']} of {row['tensors']} tensors equal",
            )
            for model, row in zip(self["models"], total["models"], strict=True)
        ]
        cosines = total.get("delta_cosines")
        if cosines and len(cosines) > 1:
            pairs = combinations(range(len(cosines)), 2)
            rows.append(("cosines of changes", ", ".join(f"{cosines[one][other]:.3f}" for one, other in pairs)))
        if total.get("sign_conflicts") is not None:
            rows.append(("changes of both signs", f"{total['sign_conflicts']:.1%}"))
        return html_table([("compared with", self["reference"]), *rows, *(("note", note) for note in self["notes"])])


def inspect(model: str | PathLike[str], *, allow_pickle: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, from its headers: what ``pxmerge inspect --json`` prints.

    Raises:
        InputError: missing, unreachable or malformed.
    """
    from mergekit_px.inspection.describe import describe

    return describe(open_input(given_path(model), allow_pickle=allow_pickle))


def compare(
    *models: str | PathLike[str],
    base: str | PathLike[str] | None = None,
    tensors: str = "*",
    spectral: bool = False,
    allow_pickle: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """How models differ from the first of them, or from ``base``: what ``pxmerge compare --json`` prints.

    Args:
        tensors: a glob of names.
        spectral: also decompose the differences: effective ranks, and how far subspaces agree.
        progress: called with bytes done and bytes in all.

    Raises:
        UsageError: one model alone.
        InputError: missing, unreachable or malformed.
    """
    from mergekit_px.inspection.compare import compare as measure

    if len(models) == 1 and isinstance(models[0], (list, tuple)):
        raise UsageError("models are given one by one, not as a list", hint="write compare(*models)")
    references = given_paths([*([] if base is None else [base]), *models])
    if len(references) < 2:
        raise UsageError("one model alone cannot be compared", hint="give another, or base=")
    opened = [fetch_input(open_input(reference, allow_pickle=allow_pickle)) for reference in references]
    checkpoints = [source.checkpoint for source in opened]
    return Comparison(measure(checkpoints[0], checkpoints[1:], pattern=tensors, spectral=spectral, progress=progress))


def advise(
    models: Sequence[str | PathLike[str]],
    *,
    base: str | PathLike[str] | None = None,
    allow_pickle: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Advice:
    """What models are to one another, what to try first with them, and a recipe: what ``pxmerge advise --json`` prints.

    Args:
        base: the model that they were fine-tuned from.
        progress: called with a phase, bytes done and bytes in all.

    Raises:
        UsageError: one model alone.
        InputError: missing, unreachable or malformed, or all the same.
        PlanError: models that cannot be merged.
    """
    from mergekit_px.inspection.advice import advise as ask
    from mergekit_px.plan.options import PlanOptions
    from mergekit_px.recipe.naming import model_names

    references = given_paths(models)
    return ask(
        dict(zip(model_names(references), references, strict=True)),
        None if base is None else given_path(base),
        options=PlanOptions(allow_pickle=allow_pickle),
        progress=progress or (lambda phase, done, total: None),
    )


def verify(folder: str | PathLike[str]) -> Verification:
    """Whether a merged folder still holds the bytes that its lock file names.

    Raises:
        InputError: no lock file, or files that cannot be read.
    """
    from mergekit_px.inspection.verify import verify as check

    return check(Path(given_path(folder, "a merge")))
