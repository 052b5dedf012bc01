"""``pxmerge moe edit``: other experts of a mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergekit_px.cli._arguments import Several
from mergekit_px.cli._merge import merge_mapping
from mergekit_px.cli._options import RunOptions
from mergekit_px.errors import UsageError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The mixture: folder or org/name@revision.")]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="N...", help="The experts that stay, in their new order; 2+5 is the mean of two."),
    Several("--keep"),
]
Drop = Annotated[
    list[str] | None,
    typer.Option("--drop", metavar="N...", help="The experts that go; the others stay in order."),
    Several("--drop"),
]
Merge = Annotated[
    list[str] | None,
    typer.Option("--merge", metavar="A+B...", help="Experts that become one, in the place of the first of each group."),
    Several("--merge"),
]
Scores = Annotated[
    Path | None,
    typer.Option("--scores", metavar="FILE", help="JSON with a score of each expert, as a list, or one by layer."),
]
Count = Annotated[int | None, typer.Option("--count", metavar="N", min=1, help="With --scores: how many stay.")]
PerToken = Annotated[
    int | None,
    typer.Option("--experts-per-token", metavar="N", min=1, help="How many a token goes to.  [default: as before]"),
]


def edit(
    model: Model,
    options: RunOptions,
    keep: Keep = None,
    drop: Drop = None,
    merge: Merge = None,
    scores: Scores = None,
    count: Count = None,
    experts_per_token: PerToken = None,
) -> int:
    """Keep, drop, reorder or merge the experts of a mixture.

    Experts are recognised by their names, stored one by one or all in one tensor. Rows and biases of the router and
    the entries of the config follow; shared experts and everything else stay. Merged experts are means of their
    weights, as are their rows of the router. With --scores each layer keeps the experts that score best in it.

    \b
    Examples:
      pxmerge moe edit ./mixture --drop 3 6 -o ./smaller
      pxmerge moe edit ./mixture --keep 4 0 1+2 -o ./three
      pxmerge moe edit ./mixture --scores frequencies.json --count 4 -o ./four
    """
    from mergekit_px.recipe.naming import model_names

    given = {"--keep": keep, "--drop": drop, "--merge": merge, "--scores": scores}
    flags = [flag for flag, value in given.items() if value]
    if len(flags) != 1:
        what = f"either {' or '.join(flags)}" if flags else "which experts is not said"
        raise UsageError(what, hint="give one of --keep, --drop, --merge and --scores")
    if (scores is None) != (count is None):
        raise UsageError("--scores and --count go together", hint="add --scores FILE --count N")
    if scores is not None and count is not None:
        choice = best_experts(scores, count)
    else:
        choice = {
            key: [_group(text, f"--{key}") for text in texts or ()]
            for key, texts in (("keep", keep), ("drop", drop), ("merge", merge))
        }
    if experts_per_token is not None:
        choice["experts_per_token"] = experts_per_token
    (name,) = model_names([model])
    step = {"method": "passthrough", "sources": [name], "experts": choice}
    return merge_mapping({"pxmerge": 1, "models": {name: model}, "merge": step}, options)


def _group(text: str, flag: str) -> int | list[int]:
    """``3``, or ``2+5`` for the mean of two. Raises ``UsageError``."""
    numbers = text.split("+")
    if not all(number.isascii() and number.isdecimal() for number in numbers):
        raise UsageError(f"{flag} takes numbers of experts, not '{text[:80]}'", hint="write 3, or 2+5 for two as one")
    found = [int(number) for number in numbers]
    return found[0] if len(found) == 1 else found


def best_experts(path: Path, count: int) -> dict[str, Any]:
    """The experts that score best, in their old order: of every layer, or of each where it has scores of its own.

    Raises:
        UsageError: the file holds no such scores, or fewer than are to stay.
    """
    from mergekit_px.checkpoint.json_text import parse_json
    from mergekit_px.small_files import read_small_file

    found = parse_json(read_small_file(path), str(path))
    lists = found if isinstance(found, dict) else {"": found}
    best: dict[str, list[int]] = {}
    for layer, scores in lists.items():
        numbers = isinstance(scores, list) and all(type(score) in (int, float) for score in scores)
        if not numbers or (layer and not layer.isdecimal()):
            what = f"{path}: scores are a list of numbers, or a mapping from layers to such lists"
            raise UsageError(what, hint='as {"0": [0.1, 0.4, 0.5], "1": [0.2, 0.2, 0.6]}')
        if len(scores) < count:
            where = f"layer {layer}" if layer else "the file"
            raise UsageError(f"{path}: {count} experts are to stay, and {where} has {len(scores)} scores")
        order = sorted((-score, number) for number, score in enumerate(scores))
        best[layer] = sorted(number for _, number in order[:count])
    return {"keep": best[""]} if "" in best else {"layers": best}
