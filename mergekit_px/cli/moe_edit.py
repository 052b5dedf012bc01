"""``pxmerge moe edit``: other experts of a mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mergekit_px.cli._arguments import Several
from mergekit_px.cli._merge import merge_mapping
from mergekit_px.cli._options import RunOptions
from mergekit_px.errors import UsageError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The mixture: folder or org/name@revision.")]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="N...",
        help="The experts that stay, in their new order; 2+5 is the mean of two. With --stats or --scores: how many.",
    ),
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
Stats = Annotated[
    Path | None,
    typer.Option("--stats", metavar="FILE", help="What pxmerge stats --what experts measured."),
]
By = Annotated[
    Literal["reap", "frequency"] | None,
    typer.Option(
        "--by",
        help="With --stats: the mean norm of its weighted output, or its share of tokens.  [default: reap]",
    ),
]
Count = Annotated[
    int | None,
    typer.Option("--count", metavar="N", min=1, help="With --scores or --stats: as --keep N."),
]
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
    stats: Stats = None,
    by: By = None,
    count: Count = None,
    experts_per_token: PerToken = None,
) -> int:
    """Keep, drop, reorder or merge the experts of a mixture.

    Experts are recognised by their names, stored one by one or all in one tensor. Rows and biases of the router and
    the entries of the config follow; shared experts and everything else stay. Merged experts are means of their
    weights, as are their rows of the router. With --stats or --scores each layer keeps the experts that score best.

    \b
    Examples:
      pxmerge moe edit ./mixture --drop 3 6 -o ./smaller
      pxmerge moe edit ./mixture --keep 4 0 1+2 -o ./three
      pxmerge moe edit ./mixture --keep 4 --by reap --stats experts.safetensors -o ./four
      pxmerge moe edit ./mixture --keep 4 --scores scores.json -o ./four
    """
    from mergekit_px.recipe.naming import model_names

    scored = {"--scores": scores, "--stats": stats}
    by_score = any(scored.values())
    given = {"--keep": keep, "--drop": drop, "--merge": merge, **scored}
    flags = [flag for flag, value in given.items() if value and not (by_score and flag == "--keep")]
    if len(flags) != 1:
        what = f"either {' or '.join(flags)}" if flags else "which experts is not said"
        raise UsageError(what, hint="give one of --keep, --drop, --merge, --scores and --stats")
    if by is not None and stats is None:
        raise UsageError("--by goes with --stats", hint="measure: pxmerge stats MODEL --what experts --data FILE")
    if not by_score and count is not None:
        raise UsageError("--count goes with --scores or --stats", hint="add --scores FILE")
    if by_score:
        chosen = best_experts(_scores(scores, stats, by or "reap", model, options), _count(flags[0], keep, count))
    else:
        chosen = {
            key: [_group(text, f"--{key}") for text in texts or ()]
            for key, texts in (("keep", keep), ("drop", drop), ("merge", merge))
        }
    if experts_per_token is not None:
        chosen["experts_per_token"] = experts_per_token
    (name,) = model_names([model])
    step = {"method": "passthrough", "sources": [name], "experts": chosen}
    return merge_mapping({"pxmerge": 1, "models": {name: model}, "merge": step}, options)


def _group(text: str, flag: str) -> int | list[int]:
    """``3``, or ``2+5`` for the mean of two. Raises ``UsageError``."""
    numbers = text.split("+")
    if not all(number.isascii() and number.isdecimal() for number in numbers):
        raise UsageError(f"{flag} takes numbers of experts, not '{text[:80]}'", hint="write 3, or 2+5 for two as one")
    found = [int(number) for number in numbers]
    return found[0] if len(found) == 1 else found


def _count(flag: str, keep: list[str] | None, count: int | None) -> int:
    """How many experts stay. Raises ``UsageError`` where that is not said, or twice."""
    number = keep[0] if keep is not None and len(keep) == 1 else ""
    if (keep is None) == (count is None):
        raise UsageError(f"{flag} needs how many experts stay, once", hint="add --keep N")
    if keep is not None and not (number.isascii() and number.isdecimal() and int(number) > 0):
        raise UsageError(
            f"with {flag}, --keep is how many experts stay, not {' '.join(keep)[:80]}", hint="write --keep 4"
        )
    return int(number) if count is None else count


def _scores(
    scores: Path | None, stats: Path | None, by: str, model: str, options: RunOptions
) -> tuple[str, dict[str, Any]]:
    """Where scores are from, and lists of them by layer; one under no name for all layers.

    Raises:
        InputError: no such file, or statistics of another model.
    """
    if stats is not None:
        from mergekit_px.learn.stats.experts import measured_scores
        from mergekit_px.plan.inputs import fetch_checkpoint

        checkpoint = fetch_checkpoint(model, allow_pickle=options.allow_pickle)
        return str(stats), measured_scores(stats, "frequency" if by == "frequency" else "reap", checkpoint)
    from mergekit_px.checkpoint.json_text import parse_json
    from mergekit_px.small_files import read_small_file

    assert scores is not None
    found = parse_json(read_small_file(scores), str(scores))
    return str(scores), found if isinstance(found, dict) else {"": found}


def best_experts(scored: tuple[str, dict[str, Any]], count: int) -> dict[str, Any]:
    """The experts that score best, in their old order: of every layer, or of each where it has scores of its own.

    Raises:
        UsageError: these are no scores, or fewer than are to stay.
    """
    path, lists = scored
    if not lists:
        raise UsageError(f"{path}: it holds no scores")
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
    sizes = {len(scores) for scores in lists.values()}
    if len(sizes) > 1:
        raise UsageError(f"{path}: layers have scores of different numbers of experts: {sorted(sizes)}")
    chosen: dict[str, Any] = {"keep": best[""]} if "" in best else {"layers": best}
    return chosen | {"of": sizes.pop()}
