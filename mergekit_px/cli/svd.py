"""``pxmerge svd``: the method's command, with other forms of the result and a report."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mergekit_px.checkpoint.replacement import require_writable
from mergekit_px.cli._documents import PoolDocument
from mergekit_px.cli._merge import load_mapping, merge_mapping
from mergekit_px.cli._options import RunOptions
from mergekit_px.cli._output import Output, output_for
from mergekit_px.cli._parameters import parameter_options
from mergekit_px.cli._progress import progress_on
from mergekit_px.cli._text_columns import TextColumns
from mergekit_px.cli.method import method_command, method_recipe
from mergekit_px.errors import UsageError
from mergekit_px.methods import find_method

if TYPE_CHECKING:
    from mergekit_px.plan.model import Plan

Form = Literal["checkpoint", "components", "lora"]

As = Annotated[
    Form | None,
    typer.Option(
        "--as",
        help="What is written: a model, the pooled components themselves (U, S and V of each matrix, to be tuned;"
        " not orthogonalised unless asked for), or a LoRA of rank K.  [default: checkpoint]",
    ),
]
Into = Annotated[
    Path | None,
    typer.Option(
        "--into",
        metavar="DIR",
        help="Add the sources to these components, with their base and settings; in place unless -o is given.",
    ),
]
Tune = Annotated[
    str | None,
    typer.Option(
        "--tune",
        metavar="FILE",
        help="Pool, then train the kept singular values on these labelled data, and write the model that they make:"
        " both stages of AXIS. What --data of tune takes.",
    ),
]
TuneTop = Annotated[
    int | None,
    typer.Option("--tune-top", metavar="N", min=1, help="With --tune: train the N largest of each.  [default: all]"),
]
TuneSteps = Annotated[
    int | None,
    typer.Option("--tune-steps", metavar="N", min=1, help="With --tune: steps.  [default: ten passes over them]"),
]
TuneRate = Annotated[
    float | None, typer.Option("--tune-rate", metavar="X", min=0.0, help="With --tune: first rate.  [default: 0.1]")
]
_OPTIONS: Mapping[str, Any] = {
    "form": As,
    "into": Into,
    "tune": Tune,
    "tune_top": TuneTop,
    "tune_steps": TuneSteps,
    "tune_rate": TuneRate,
}

_FIRST_EXAMPLE = "Examples:\n  pxmerge svd --sources ./a ./b ./c --top-k 64\n"
_MORE_EXAMPLES = """
  pxmerge svd --base ./base --sources ./math ./code --top-k 64 --as components -o ./pool
  pxmerge svd --into ./pool --sources ./law
  pxmerge svd --base ./base --sources ./math ./code --top-k 64 --tune few.jsonl -o ./tuned

\b
--report FILE.json writes spectra, energy kept and each source's share, and a
picture beside it; --report FILE.html writes the page of any merge."""


def _command() -> Callable[..., int]:
    """The command of the method, with more options."""
    method = find_method("svd")
    plain = method_command(method)
    options = parameter_options(method)

    def command(**given: Any) -> int:
        own = {name: given.pop(name) for name in _OPTIONS}
        run: RunOptions = given.pop("options")
        form, into, report = own["form"], own["into"], run.report
        if report is not None and report.suffix == ".html" and form in (None, "checkpoint") and into is None:
            report = None  # The page of any merge.
        else:
            run = dataclasses.replace(run, report=None)
        text: TextColumns = given.pop("text")
        _check(form, into, report, run)
        for path in (report, report.with_suffix(".png")) if report is not None else ():
            require_writable(path, [*(given["sources"] or ()), *([given["base"]] if given["base"] else [])])
        _check_tuning(own, text, run, report)
        if into is not None:
            _complete(given, into)
            run = run if run.output is not None else dataclasses.replace(run, output=into, overwrite=True)
        recipe = method_recipe(method, options, given)
        params = recipe["merge"].get("params", {})
        if into is not None:
            params = {**_settings(into), **params}
        if into is not None or own["tune"] is not None:
            form = "components"
        # Said even where it is the default, so that the card and the recipe kept with the result tell it.
        params.setdefault("orthogonalise", form != "components" or own["tune"] is not None)
        recipe["merge"]["params"] = params
        if form in (None, "checkpoint"):
            if report is not None:
                _report(_plan(recipe, run), given["sources"], report, output_for(json=run.json, quiet=run.quiet))
            return merge_mapping(recipe, run)
        if own["tune"] is not None:
            return _tuned(recipe, given["sources"], run, own, text)
        if run.output is None:
            run = dataclasses.replace(run, output=Path(form))
        return _write(form, recipe, given["sources"], into, report, run)

    command.__doc__ = f"{plain.__doc__}{_MORE_EXAMPLES}".replace("Example:\n", _FIRST_EXAMPLE)
    signature = inspect.signature(plain)
    parameters = list(signature.parameters.values())
    place = next(number for number, parameter in enumerate(parameters) if parameter.name == "missing")
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _OPTIONS.items()
    ]
    own.append(inspect.Parameter("text", inspect.Parameter.KEYWORD_ONLY, annotation=TextColumns))
    merged = [*parameters[:place], *own, *parameters[place:]]
    command.__signature__ = signature.replace(parameters=merged)  # type: ignore[attr-defined]
    return command


def _check(form: Form | None, into: Path | None, report: Path | None, run: RunOptions) -> None:
    if into is not None and form not in (None, "components"):
        raise UsageError(f"--into adds to components, --as {form} writes something else", hint="leave one out")
    if into is not None and report is not None:
        raise UsageError("--report looks at all sources, and --into has the new ones only", hint="leave one out")
    if report is not None and report.suffix == ".html":
        raise UsageError("--report FILE.html is about a checkpoint", hint="--report report.json for the spectra")
    if report is not None and report.suffix == ".png":
        raise UsageError("--report names the JSON file; the picture goes beside it", hint="--report report.json")
    if form in ("components", "lora") or into is not None:
        for flag, given in {
            "--push": run.push,
            "--dtype": run.dtype,
            "--quantize": run.quantize,
            "--dry-run": run.dry_run,
        }.items():
            if given:
                raise UsageError(f"{flag} goes with --as checkpoint only", hint="leave it out")
    elif report is not None and run.dry_run:
        raise UsageError("--dry-run reads no weights, and --report needs them", hint="leave one out")


def _check_tuning(own: Mapping[str, Any], text: TextColumns, run: RunOptions, report: Path | None) -> None:
    if own["tune"] is None:
        for name in ("tune_top", "tune_steps", "tune_rate"):
            if own[name] is not None:
                raise UsageError(f"--{name.replace('_', '-')} goes with --tune", hint="give the data: --tune FILE")
        if text != TextColumns():
            raise UsageError(
                "--columns, --max-length and --tokenizer go with --tune", hint="give the data: --tune FILE"
            )
        return
    for flag, given in {
        "--as": own["form"],
        "--into": own["into"],
        "--report": report,
        "--push": run.push,
        "--dtype": run.dtype,
        "--quantize": run.quantize,
        "--dry-run": run.dry_run,
    }.items():
        if given:
            raise UsageError(f"--tune writes a tuned model, {flag} something else", hint="leave one out")


def _tuned(
    recipe: Mapping[str, Any], sources: list[str], run: RunOptions, own: Mapping[str, Any], text: TextColumns
) -> int:
    """Pool beside the output, tune into it, and forget the pool: its tuned form is in the output."""
    from mergekit_px.cli.learner import run_settings
    from mergekit_px.learn import find_learner
    from mergekit_px.learn.declare import make_settings
    from mergekit_px.pools.record import read_record
    from mergekit_px.pools.write import write_components

    sink = output_for(json=run.json, quiet=run.quiet)
    output = run.output or Path("tuned")
    pool = output.with_name(f".{output.name}.pool")
    plan = _plan(recipe, dataclasses.replace(run, output=pool, overwrite=True, resume=False))
    try:
        with progress_on(sink) as advance:
            notes = write_components(plan, sources, advance=partial(advance, "decomposing"))
        for note in notes:
            sink.note(f"note: {note}")
        base = read_record(pool).base
        if base is None:
            raise UsageError("--tune needs the model that the sources were fine-tuned from", hint="give it by --base")
        tuner = find_learner("tune")
        given = {"top": own["tune_top"], "steps": own["tune_steps"], "learning_rate": own["tune_rate"]}
        given |= {"columns": text.columns, "max_length": text.max_length, "tokenizer": text.tokenizer}
        settings = {name: value for name, value in given.items() if value is not None}
        settings |= {"components": pool, "base": base, "data": own["tune"], "output": output, "device": run.device}
        settings |= {"resume": run.resume, "overwrite": run.overwrite, "allow_pickle": run.allow_pickle}
        run_settings(tuner, make_settings(tuner, settings, lambda name: f"--tune-{name.replace('_', '-')}"), sink)
    finally:
        shutil.rmtree(pool, ignore_errors=True)
    return 0


def _complete(given: dict[str, Any], into: Path) -> None:
    """The base of the pool, where the command line gives none."""
    from mergekit_px.pools.record import read_record

    if given["base"] is None:
        given["base"] = read_record(into).base


def _settings(into: Path) -> dict[str, Any]:
    from mergekit_px.pools.record import read_record

    return read_record(into).settings


def _plan(recipe: Mapping[str, Any], run: RunOptions) -> Plan:
    """The plan, with its inputs on this machine."""
    from mergekit_px.execute.run import fetch_inputs
    from mergekit_px.plan.build import build_plan

    return fetch_inputs(build_plan(load_mapping(recipe, run), run.plan_options()))


def _write(
    form: Form, recipe: Mapping[str, Any], sources: list[str], into: Path | None, report: Path | None, run: RunOptions
) -> int:
    from mergekit_px.pools.lora import write_lora
    from mergekit_px.pools.write import write_components

    output = output_for(json=run.json, quiet=run.quiet)
    plan = _plan(recipe, run)
    for note in plan.notes:
        if note not in plan.config_notes:
            output.note(f"note: {note}")
    if report is not None:
        _report(plan, sources, report, output)
    with progress_on(output) as advance:
        if form == "lora":
            notes = write_lora(plan, partial(advance, "merging"))
        else:
            notes = write_components(plan, sources, into=into, advance=partial(advance, "decomposing"))
    for note in notes:
        output.note(f"note: {note}")
    output.document({"output": str(plan.output), "as": form, "notes": notes}, PoolDocument)
    output.text(str(plan.output))
    return 0


def _report(plan: Plan, sources: list[str], path: Path, output: Output) -> None:
    from mergekit_px.pools.report import spectral_report, write_report

    with progress_on(output) as advance:
        picture = write_report(path, spectral_report(plan, sources, partial(advance, "measuring")))
    output.note(f"report: {path}" + (f", {picture}" if picture is not None else " (no picture: matplotlib is missing)"))


svd = _command()
