"""``pxmerge tokens transplant``: a model with another one's tokenizer."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergekit_px.cli._merge import load_mapping, merge_mapping
from mergekit_px.cli._options import RunOptions
from mergekit_px.cli._output import output_for
from mergekit_px.cli._progress import progress_on
from mergekit_px.errors import PlanError
from mergekit_px.recipe.naming import model_names

if TYPE_CHECKING:
    from mergekit_px.execute.transplant import Fit


class Absent(StrEnum):
    """What makes up the rows of tokens that the model lacks."""

    subword = "subword"
    mean = "mean"
    omp = "omp"
    nearest = "nearest"


Target = Annotated[
    str, typer.Argument(metavar="TARGET", help="The model that gets the tokenizer: folder or org/name@revision.")
]
Donor = Annotated[
    str, typer.Option("--tokenizer-of", metavar="DONOR", help="The model whose tokenizer it gets, of any width.")
]
Method = Annotated[Absent, typer.Option("--method", help="How rows of tokens that TARGET lacks are made.")]
PadTo = Annotated[
    int | None,
    typer.Option("--pad-to", metavar="N", min=1, help="Rows in multiples of N.  [default: as many as DONOR has]"),
]
Neighbours = Annotated[
    int, typer.Option("--neighbours", metavar="N", min=1, help="With omp and nearest: rows that one is made of.")
]


def transplant(
    target: Target,
    tokenizer_of: Donor,
    options: RunOptions,
    method: Method = Absent.subword,
    pad_to: PadTo = None,
    neighbours: Neighbours = 8,
) -> int:
    """Give a model another one's tokenizer: rows of embedding and head follow its tokens.

    Tokens that both have keep TARGET's rows exactly; they are matched by the text that they stand for, so that
    vocabularies of different kinds have tokens in common, and those of the beginning, the end and padding by what the
    configs say. A token that TARGET lacks gets the mean of the rows of the pieces that TARGET's own tokens make of its
    text (subword), the mean of all rows (mean), or a mixture of rows of tokens that both have: the one that makes up
    DONOR's row best by orthogonal matching pursuit (omp), or of the nearest to it by cosine (nearest). Such mixtures
    are written first, to OUTPUT.rows.safetensors. Everything else of the model stays as it is; the result is meant
    for a little training, for merging with models that have that tokenizer, or as a draft model for one.

    \b
    Examples:
      pxmerge tokens transplant ./small --tokenizer-of ./large -o ./draft
      pxmerge tokens transplant ./math --tokenizer-of org/chat --method mean --pad-to 64
    """
    name, donor = model_names([target, tokenizer_of])
    fitted = method in (Absent.omp, Absent.nearest)
    tokenizer: dict[str, Any] = {"from": donor, "absent": "mean" if fitted else method.value}
    if pad_to is not None:
        tokenizer["pad_to"] = pad_to
    recipe = {
        "pxmerge": 1,
        "models": {name: target, donor: tokenizer_of},
        "merge": {"method": "passthrough", "sources": [name]},
        "tokenizer": tokenizer,
    }
    try:
        if fitted and not options.dry_run:
            tokenizer["rows"] = str(_fitted(recipe, donor, method, neighbours, options))
        return merge_mapping(recipe, options)
    except PlanError as error:
        if "tokenizer.from" in (error.hint or ""):  # the way out of a recipe, which is not what was typed
            error.hint = "give another model by --tokenizer-of"
        raise


def _fitted(recipe: dict[str, Any], donor: str, method: Absent, count: int, options: RunOptions) -> Path:
    """The file of mixtures, written."""
    from mergekit_px.execute.run import fetch_inputs
    from mergekit_px.execute.transplant import fit_absent_rows
    from mergekit_px.plan.build import build_plan

    output = output_for(json=options.json, quiet=options.quiet)
    plan = fetch_inputs(build_plan(load_mapping(recipe, options), options.plan_options()))
    assert plan.output is not None
    path = plan.output.with_name(f"{plan.output.name}.rows.safetensors")
    fit: Fit = "omp" if method is Absent.omp else "nearest"
    with progress_on(output) as advance:
        rows = fit_absent_rows(plan, donor, fit, count, path, partial(advance, "fitting rows"))
    output.note(f"note: {rows} rows for tokens that the model lacks are mixtures of {count}, written to {path}")
    return path
