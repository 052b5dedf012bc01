"""``pxmerge average``: the checkpoints of one training run, by the method ``linear`` in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mergekit_px.checkpoint.selection import ADAPTER_FILE, select_weights
from mergekit_px.checkpoint.side_files import TRAINING, side_files
from mergekit_px.checkpoint.training_run import RunCheckpoint, TrainingRun, check_spacing, training_run
from mergekit_px.cli._arguments import Several
from mergekit_px.cli._merge import merge_mapping, merge_together
from mergekit_px.cli._options import RunOptions
from mergekit_px.cli._output import output_for
from mergekit_px.errors import InputError, UsageError
from mergekit_px.recipe.decay import run_weights
from mergekit_px.recipe.naming import model_names

Run = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="The folder of a run's checkpoints, a pattern, or several checkpoints."),
]
Last = Annotated[int | None, typer.Option("--last", metavar="N", min=1, help="Only the last N checkpoints.")]
Every = Annotated[
    int | None, typer.Option("--every", metavar="N", min=1, help="Only each N-th checkpoint, the last one among them.")
]
From = Annotated[int | None, typer.Option("--from", metavar="STEP", min=0, help="None before this step.")]
To = Annotated[int | None, typer.Option("--to", metavar="STEP", min=0, help="None after this step.")]
RunWeights = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        metavar="WORD|X...",
        help="uniform, linear, cosine, 1-sqrt, ema:DECAY; or a number for each checkpoint, oldest first.",
    ),
    Several("--weights", "numbers"),
]

Window = Annotated[
    int | None,
    typer.Option("--window", metavar="N", min=1, help="Several means in one pass, each of N checkpoints in a row."),
]
Stride = Annotated[
    int | None,
    typer.Option("--stride", metavar="N", min=1, help="Checkpoints from one window to the next.  [default: --window]"),
]

Into = Annotated[
    Path | None,
    typer.Option("--into", metavar="STATE", help="Keep a running mean in this folder, and take what it has not yet."),
]
Follow = Annotated[
    bool, typer.Option("--follow", help="With --into: go on as checkpoints appear, until that of --to is taken.")
]


def average(
    run: Run,
    options: RunOptions,
    last: Last = None,
    every: Every = None,
    from_step: From = None,
    to_step: To = None,
    weights: RunWeights = None,
    window: Window = None,
    stride: Stride = None,
    into: Into = None,
    follow: Follow = False,
) -> int:
    """Average the checkpoints of one training run, in order of step.

    The step of a checkpoint is what its trainer_state.json says, else the number in its name. What is still being
    written (tmp-*, *.tmp) is skipped. Optimiser and other training files stay out.

    A mean of checkpoints can stand for a decay of the learning rate (WSM, arXiv:2507.17634, section 3): n checkpoints
    of a constant rate, weighted by c_j = f(j/n) - f((j+1)/n), oldest first, act as if the rate had decayed by f over
    them.

    \b
      uniform    c_j = 1/n
      linear     f(t) = 1 - t, which is the uniform mean
      cosine     f(t) = (1 + cos(pi t)) / 2
      1-sqrt     f(t) = 1 - sqrt(t)
      ema:d      x = d x + (1 - d) x_j from the oldest on

    Numbers are divided by their sum. Sums are float64 and rounded once.

    With --window each mean is a folder in the output folder, named by its first and last step, as steps-600-1000; a
    checkpoint that several windows share is read once.

    With --into a sum in float64 is kept in the folder STATE, and each call adds the checkpoints that came since
    (uniform or ema); -o says where the mean is written.

    \b
    Examples:
      pxmerge average ./run --last 5
      pxmerge average ./run --window 5 --stride 5 -o ./windows
      pxmerge average ./run --into ./mean -o ./averaged
      pxmerge average './run/checkpoint-*' --from 1000 --to 5000 --weights 1-sqrt
      pxmerge average ./run/checkpoint-400 ./run/checkpoint-500 --weights 0.3 0.7 -o ./averaged
    """
    if into is not None:
        return _kept(run, into, options, weights or ["uniform"], from_step, to_step, follow, window or last or every)
    if follow:
        raise UsageError("--follow goes with --into", hint="add --into STATE")
    found = training_run(run)
    chosen = _chosen(found, run, last, every, from_step, to_step)
    if stride is not None and window is None:
        raise UsageError("--stride goes with --window", hint="add --window N")
    adapter = next((each.reference for each in chosen if _is_adapter(each)), None)
    if adapter is not None:
        raise UsageError(
            "this is an adapter, and the mean of adapters is not that of their factors",
            where=adapter,
            hint="pxmerge adapter merge takes adapters",
        )
    names = dict(zip(chosen, model_names([each.reference for each in chosen]), strict=True))
    numbers = run_weights(weights or ["uniform"], window or len(chosen))
    windows = [chosen] if window is None else _windows(chosen, window, stride or window)
    recipes = {_folder(each): average_recipe({one: names[one] for one in each}, numbers) for each in windows}
    output = output_for(json=options.json, quiet=options.quiet)
    several = "" if window is None else f"{len(windows)} windows of {window} of "
    for note in (*found.notes, f"{several}{_span(chosen)}{_left_out(chosen[-1])}"):
        output.note(f"note: {note}")
    if left := len(chosen) - chosen.index(windows[-1][-1]) - 1:
        output.note(f"note: the last {left} of them fill no window")
    return merge_mapping(recipes[_folder(chosen)], options) if window is None else merge_together(recipes, options)


def _kept(
    run: Sequence[str],
    state: Path,
    options: RunOptions,
    words: Sequence[str],
    from_step: int | None,
    to_step: int | None,
    follow: bool,
    choice: int | None,
) -> int:
    from mergekit_px.cli.running_mean import keep_running_mean

    if choice is not None:
        raise UsageError("a running mean takes every checkpoint; --last, --every and --window do not go with --into")
    if len(words) != 1 or (words[0] not in ("uniform", "linear") and not words[0].startswith("ema:")):
        raise UsageError(
            f"--weights {' '.join(words)} needs all checkpoints at once",
            hint="a running mean is uniform or ema:DECAY",
        )
    if options.push is not None or options.dry_run or options.report is not None:
        raise UsageError("--push, --dry-run and --report do not go with --into")
    word = "uniform" if words[0] == "linear" else words[0]
    output = output_for(json=options.json, quiet=options.quiet)
    return keep_running_mean(run, state, word, (from_step or 0, to_step), options, output, follow=follow)


def average_recipe(names: dict[RunCheckpoint, str], weights: Sequence[float]) -> dict[str, Any]:
    """The recipe of a weighted mean, oldest first. The newest gives config, tokenizer and storage types."""
    newest = names[next(reversed(names))]
    return {
        "pxmerge": 1,
        "models": {name: checkpoint.reference for checkpoint, name in names.items()},
        "merge": {
            "method": "linear",
            "sources": dict(zip(names.values(), weights, strict=True)),
            "params": {"precision": "float64"},
        },
        "output": {"config_from": newest},
    }


def _windows(chosen: Sequence[RunCheckpoint], window: int, stride: int) -> list[Sequence[RunCheckpoint]]:
    if window > len(chosen):
        raise InputError(f"--window {window} of {len(chosen)} checkpoints", hint="ask for a smaller one")
    return [chosen[first : first + window] for first in range(0, len(chosen) - window + 1, stride)]


def _folder(window: Sequence[RunCheckpoint]) -> str:
    first, last = window[0], window[-1]
    if first.step is None:
        return f"{model_names([first.reference])[0]}-{model_names([last.reference])[0]}"
    return f"steps-{first.step}-{last.step}"


def _chosen(
    found: TrainingRun,
    run: Sequence[str],
    last: int | None,
    every: int | None,
    from_step: int | None,
    to_step: int | None,
) -> tuple[RunCheckpoint, ...]:
    """The checkpoints that the options leave, in order of step. Raises ``InputError``, ``UsageError``."""
    chosen = found.checkpoints
    where = run[0] if len(run) == 1 else f"{run[0]}, ..."
    if from_step is not None or to_step is not None:
        if not found.steps:
            raise UsageError("--from and --to need steps, and no checkpoint tells its own", where=where)
        if from_step is not None and to_step is not None and from_step > to_step:
            raise UsageError(f"--from {from_step} is after --to {to_step}")
        first, final = found.steps[0], found.steps[-1]
        least, most = from_step or 0, to_step if to_step is not None else final
        chosen = tuple(each for each in chosen if each.step is not None and least <= each.step <= most)
        if not chosen:
            raise InputError(
                f"no checkpoint is of a step from {least}{'' if to_step is None else f' to {to_step}'};"
                f" they go from {first} to {final}",
                where=where,
            )
    if last is not None:
        if last > len(chosen):
            raise InputError(f"--last {last} of {len(chosen)} checkpoints", where=where, hint="ask for fewer")
        chosen = chosen[-last:] if every is None else chosen
    if every is not None:
        if every > len(chosen):
            raise InputError(f"--every {every} counts checkpoints, and there are {len(chosen)}", where=where)
        chosen = chosen[::-1][::every][::-1]
        if last is not None:
            if last > len(chosen):
                raise InputError(f"--every {every} leaves {len(chosen)} checkpoints, and --last {last} asks for more")
            chosen = chosen[-last:]
    if len(run) == 1 and every is None:
        check_spacing([each.step for each in chosen if each.step is not None], where)
    return chosen


def _is_adapter(checkpoint: RunCheckpoint) -> bool:
    folder = Path(checkpoint.reference).expanduser()
    if not (folder / "adapter_config.json").is_file():
        return False
    weights = select_weights(entry.name for entry in folder.iterdir())
    return weights is not None and weights.names[:1] == (ADAPTER_FILE,)


def _span(chosen: Sequence[RunCheckpoint]) -> str:
    count = f"{len(chosen)} checkpoint{'' if len(chosen) == 1 else 's'}"
    if chosen[0].step is None:
        return count
    if len(chosen) == 1:
        return f"{count}, of step {chosen[0].step}"
    return f"{count}, from step {chosen[0].step} to step {chosen[-1].step}"


def _left_out(checkpoint: RunCheckpoint) -> str:
    folder = Path(checkpoint.reference).expanduser()
    names = [name for name, why in side_files(folder).left_behind.items() if why == TRAINING] if folder.is_dir() else []
    return f"; optimiser and other training files stay out ({', '.join(names)})" if names else ""
