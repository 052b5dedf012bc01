"""``pxmerge add | subtract | negate | scale | analogy``: arithmetic on task vectors.

All of them are the method ``combine``, a sum with coefficients: full checkpoints whose coefficients add to 1 give a
model, to 0 a task vector; task vectors may be added to either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from mergekit_px.cli._arguments import Several
from mergekit_px.cli._merge import merge_mapping
from mergekit_px.cli._options import RunOptions
from mergekit_px.cli._output import output_for
from mergekit_px.cli._parameters import parse_numbers
from mergekit_px.errors import UsageError
from mergekit_px.recipe.naming import model_names

_METAVAR = "folder, file or org/name@revision"

Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"A model: {_METAVAR}.")]
Subtracted = Annotated[str, typer.Argument(metavar="BASE", help="What is taken away: a base, or a task vector.")]
AddedTo = Annotated[str, typer.Argument(metavar="BASE", help=f"The model that is added to: {_METAVAR}.")]
TaskVectors = Annotated[list[str], typer.Argument(metavar="TAU...", help="Task vectors.")]
Operand = Annotated[str, typer.Argument(metavar="TAU", help="A task vector; or a fine-tuned model, with --base.")]
BaseOf = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="The base; the result is then a full model.")
]
Factor = Annotated[float, typer.Option("--factor", metavar="X", help="What the task vector is multiplied by.")]
Factors = Annotated[
    list[str] | None,
    typer.Option("--weights", metavar="X...", help="One weight for each task vector.  [default: 1 for all]"),
    Several("--weights", "numbers"),
]
First = Annotated[str, typer.Argument(metavar="A", help="A model.")]
Second = Annotated[str, typer.Argument(metavar="B", help="A model of the same shape.")]
Third = Annotated[str, typer.Argument(metavar="C", help="The model that is changed as A was to get B.")]


def add(base: AddedTo, task_vectors: TaskVectors, options: RunOptions, weights: Factors = None) -> int:
    """Add task vectors to a model: BASE + w1 * TAU1 + w2 * TAU2 + ...

    A task vector is the difference of a fine-tune and its base, as `pxmerge subtract` writes it. On another model
    than that base it is refused, unless --allow-base-mismatch says that this is meant.

    \b
    Examples:
      pxmerge add ./base ./tau-math
      pxmerge add ./base ./tau-math ./tau-code --weights 0.6 0.4 -o ./merged
    """
    factors: list[Any] = [1.0] * len(task_vectors)
    if weights is not None:
        if len(weights) != len(task_vectors):
            raise UsageError(f"--weights has {len(weights)} values for {len(task_vectors)} task vectors")
        factors = [parse_numbers(word, "--weights") for word in weights]
    for reference in task_vectors:
        if not _is_task_vector(reference, options):
            raise UsageError(
                "this is a full model, not a task vector", where=reference, hint="`pxmerge subtract` makes one of it"
            )
    return _combine([base, *task_vectors], [1.0, *factors], options)


def subtract(model: Model, base: Subtracted, options: RunOptions) -> int:
    """Subtract: MODEL - BASE.

    Of two models the result is a task vector, a file of its own that is bound to BASE by a fingerprint. If BASE is
    itself a task vector, it is removed from MODEL, and the result is a model; --allow-base-mismatch says that MODEL
    need not be the one that it was taken from. The fine-tune comes first here; `pxmerge adapter extract` takes the
    base first.

    \b
    Examples:
      pxmerge subtract ./math ./base -o ./tau-math
      pxmerge subtract ./chat ./tau-toxic --allow-base-mismatch -o ./detoxified
    """
    from mergekit_px.hub.reference import parse_reference
    from mergekit_px.plan.bases import swapped_note
    from mergekit_px.plan.inputs import open_input

    if parse_reference(model) is None and parse_reference(base) is None:
        inputs = [open_input(reference, allow_pickle=options.allow_pickle) for reference in (base, model)]
        if (note := swapped_note(*inputs)) is not None:
            output_for(json=options.json, quiet=options.quiet).warning(note)
    return _combine([model, base], [1.0, -1.0], options)


def negate(task_vector: Operand, options: RunOptions, base: BaseOf = None) -> int:
    """Negate a task vector: -TAU; with --base the model BASE - TAU.

    For a fine-tuned model instead of a task vector, --base is needed: BASE - (MODEL - BASE).

    \b
    Examples:
      pxmerge negate ./tau-toxic -o ./minus-toxic
      pxmerge negate ./toxic --base ./base -o ./detoxified
    """
    return _scaled(task_vector, -1.0, base, options)


def scale(task_vector: Operand, factor: Factor, options: RunOptions, base: BaseOf = None) -> int:
    """Scale a task vector: f * TAU; with --base the model BASE + f * TAU.

    For a fine-tuned model instead of a task vector, --base is needed: BASE + f * (MODEL - BASE).

    \b
    Examples:
      pxmerge scale ./tau-math --factor 0.5 -o ./half-math
      pxmerge scale ./math --factor 1.2 --base ./base
    """
    return _scaled(task_vector, factor, base, options)


def analogy(first: First, second: Second, third: Third, options: RunOptions) -> int:
    """A is to B as C is to the result: C + (B - A).

    \b
    Example:
      pxmerge analogy ./base ./instruct ./math -o ./math-instruct
    """
    return _combine([third, second, first], [1.0, 1.0, -1.0], options)


def _scaled(reference: str, factor: float, base: str | None, options: RunOptions) -> int:
    is_delta = _is_task_vector(reference, options)
    if base is None:
        if not is_delta:
            raise UsageError("this is a full model, not a task vector", where=reference, hint="give its --base")
        return _combine([reference], [factor], options)
    return _combine([base, reference], [1.0 if is_delta else 1.0 - factor, factor], options)


def _is_task_vector(reference: str, options: RunOptions) -> bool:
    """Raises ``InputError`` where there is no checkpoint."""
    from mergekit_px.checkpoint.task_vector import is_task_vector
    from mergekit_px.plan.inputs import open_input

    return is_task_vector(open_input(reference, allow_pickle=options.allow_pickle).checkpoint)


def _combine(references: Sequence[str], weights: Sequence[Any], options: RunOptions) -> int:
    names = model_names(references)
    sources: Mapping[str, Any] = dict(zip(names, weights, strict=True))
    recipe = {
        "pxmerge": 1,
        "models": dict(zip(names, references, strict=True)),
        "merge": {"method": "combine", "sources": sources},
    }
    return merge_mapping(recipe, options)
