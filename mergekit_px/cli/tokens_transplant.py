"""``pxmerge tokens transplant``: a model with another one's tokenizer."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from mergekit_px.cli._merge import merge_mapping
from mergekit_px.cli._options import RunOptions
from mergekit_px.recipe.naming import model_names


class Absent(StrEnum):
    """What makes up the rows of tokens that the model lacks."""

    subword = "subword"
    mean = "mean"


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


def transplant(
    target: Target, tokenizer_of: Donor, options: RunOptions, method: Method = Absent.subword, pad_to: PadTo = None
) -> int:
    """Give a model another one's tokenizer: rows of embedding and head follow its tokens.

    Tokens that both have keep TARGET's rows exactly; they are matched by the text that they stand for, so that
    vocabularies of different kinds have tokens in common, and those of the beginning, the end and padding by what the
    configs say. A token that TARGET lacks gets the mean of the rows of the pieces that TARGET's own tokens make of its
    text (subword), or the mean of all rows (mean). Everything else of the model stays as it is; the result is meant
    for a little training, for merging with models that have that tokenizer, or as a draft model for one.

    \b
    Examples:
      pxmerge tokens transplant ./small --tokenizer-of ./large -o ./draft
      pxmerge tokens transplant ./math --tokenizer-of org/chat --method mean --pad-to 64
    """
    name, donor = model_names([target, tokenizer_of])
    tokenizer: dict[str, Any] = {"from": donor, "absent": method.value}
    if pad_to is not None:
        tokenizer["pad_to"] = pad_to
    recipe = {
        "pxmerge": 1,
        "models": {name: target, donor: tokenizer_of},
        "merge": {"method": "passthrough", "sources": [name]},
        "tokenizer": tokenizer,
    }
    return merge_mapping(recipe, options)
