"""``pxmerge search``: coefficients of a recipe by a score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mergekit_px.cli._arguments import Several
from mergekit_px.cli._learning import DATA_HELP, AllowCode, Device, Factory, Overwrite, PassSize, TextColumns, resumable
from mergekit_px.cli._options import AllowPickle, Json, Quiet, RecipeFile, run_mode
from mergekit_px.cli._output import Column, Output, output_for
from mergekit_px.errors import UsageError

Over = Annotated[
    list[str],
    typer.Option(
        "--over",
        metavar="KEY=RANGE...",
        help="What is searched: KEY=LOW:HIGH, KEY=LOW:HIGH:STEP or KEY=A,B,C; KEY,KEY=... moves several as one.",
    ),
    Several("--over"),
]
Strategy = Annotated[
    Literal["grid", "golden", "coordinate", "cma"],
    typer.Option(
        "--how", help="All combinations, golden section on one value, on one after another, or CMA-ES on all."
    ),
]
Command = Annotated[
    str | None,
    typer.Option("--score", metavar="COMMAND", help="A program whose last printed word scores the folder {}."),
]
TestCommand = Annotated[
    str | None,
    typer.Option("--test-score", metavar="COMMAND", help="Scores the result and the recipe as written, nothing else."),
]
Data = Annotated[
    str | None, typer.Option("--data", metavar="FILE", help=f"{DATA_HELP}: accuracy on them is the score.")
]
Test = Annotated[
    str, typer.Option("--test", metavar="SHARE|FILE", help="With --data: what is kept for the result; 0 for nothing.")
]
Minimize = Annotated[bool, typer.Option("--minimize", help="Less is better.")]
Trials = Annotated[int, typer.Option("--trials", metavar="N", min=1, help="Score at most so many merges.")]
Points = Annotated[int, typer.Option("--points", metavar="N", min=2, help="Values of a range in a grid.")]
Tolerance = Annotated[
    float, typer.Option("--tolerance", metavar="X", min=1e-6, max=0.5, help="Golden section ends at this share.")
]
Folder = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where log, report and model go.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE...", help="Set keys of the recipe for all trials."),
    Several("--set", "assignments"),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Draws the test data, and CMA-ES's steps.")]
Memory = Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="Peak memory of a merge, as 4GB.")]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", min=1, help="Number of workers of a merge.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the search in the output folder.")]


def search(
    recipe: RecipeFile,
    over: Over,
    text: TextColumns,
    how: Strategy = "grid",
    score: Command = None,
    test_score: TestCommand = None,
    data: Data = None,
    test: Test = "0.5",
    minimize: Minimize = False,
    trials: Trials = 100,
    points: Points = 5,
    tolerance: Tolerance = 0.02,
    output: Folder = Path("searched"),
    assignments: Assignments = None,
    batch: PassSize = 256,
    seed: Seed = 0,
    factory: Factory = None,
    allow_code: AllowCode = False,
    device: Device = "auto",
    memory: Memory = None,
    threads: Threads = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Find coefficients of a recipe by a score: a command of yours that prints a number, or accuracy on data.

    Every trial is merged into a folder, scored, and logged; what the log holds is not tried again. The recipe as
    written is the first trial. The best is merged into DIR/model, and the test, which takes no part in the choice,
    is reported for it and for the recipe as written.

    \b
    Examples:
      pxmerge search recipe.yaml --over merge.params.t=0:1 --how golden --score "python score.py {}"
      pxmerge search recipe.yaml --over merge.sources.math=0:1:0.25 merge.sources.code=0:1:0.25 --data dev.npz
      pxmerge search recipe.yaml --over merge.sources.math=0:1 merge.sources.code=0:1 --how cma --data dev.npz --resume
    """
    from mergekit_px.checkpoint.layout import parse_size
    from mergekit_px.learn.search.run import SearchOptions, run_search
    from mergekit_px.learn.search.space import parse_variable
    from mergekit_px.learn.search.strategies import StrategyOptions
    from mergekit_px.learn.search.trials import Trial

    variables = tuple(map(parse_variable, over))
    options = SearchOptions(
        variables=variables,
        strategy=how,
        settings=StrategyOptions(points=points, tolerance=tolerance, seed=seed),
        trials=trials,
        score=score,
        minimize=minimize,
        test_score=test_score,
        data=data,
        text=text.options(),
        test=held_out_share(test, "--test"),
        batch=batch,
        seed=seed,
        factory=factory,
        allow_code=allow_code,
        allow_pickle=allow_pickle,
        assignments=tuple(assignments or ()),
        device=device,
        memory=None if memory is None else parse_size(memory, "--memory"),
        threads=threads,
        mode=run_mode(resume=resume, overwrite=overwrite),
    )
    sink = output_for(json=json, quiet=quiet)

    def tell(trial: Trial, known: bool) -> None:
        values = " ".join(
            f"{variable.name}={value:.6g}" for variable, value in zip(variables, trial.values, strict=False)
        )
        found = "not finite" if trial.score is None else f"{trial.score:.6g}"
        sink.note(f"{values or 'as written'}: {found}{' (from the log)' if known else ''}")

    with resumable():
        report = run_search(recipe, output, options, tell)
    _show(report, sink)
    sink.document({"output": str(output), **report})
    sink.text(str(output))
    return 0


def _show(report: dict[str, Any], sink: Output) -> None:
    parts = list(report["scores"]["best"])
    rows = [
        (what, *(None if found[part] is None else f"{found[part]:.6g}" for part in parts))
        for what, found in report["scores"].items()
    ]
    sink.table([Column("recipe"), *(Column(part, "right") for part in parts)], rows)
    best = report["best"]["set"]
    sink.note(f"best of {report['trials']} trials: " + (f"--set {' '.join(best)}" if best else "the recipe as written"))


def held_out_share(text: str, flag: str) -> float | str:
    """A share in [0, 1), or the name of a file."""
    try:
        share = float(text)
    except ValueError:
        return text
    if not 0 <= share < 1:
        raise UsageError(f"a share is at least 0 and below 1, not {text}", where=flag)
    return share
