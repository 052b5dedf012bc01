"""Options that several commands share: one spelling, one help text.

A command that merges takes one parameter ``options: RunOptions``; `flatten` turns the fields of such a parameter
into options of the command.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergekit_px.cli._arguments import Several
from mergekit_px.cli._output import write_error_line
from mergekit_px.errors import UsageError
from mergekit_px.stages import StageTime, measured

if TYPE_CHECKING:
    from mergekit_px.checkpoint.destination import Mode
    from mergekit_px.plan.options import PlanOptions


ARGUMENTS, OPTIONS, METHOD, MERGE, OUTPUT, RUN = "Arguments", "Options", "Method", "Merge", "Output", "Run"
LEARNING = "Learning"
"""Headings of help texts."""

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, or a mergekit config.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print only the result and errors.")]
Locked = Annotated[
    bool,
    typer.Option(
        "--locked",
        help="Merge what the recipe's lock file pins, or nothing; it is pxmerge.lock.json beside the recipe,"
        " or what its `lock` names.",
        rich_help_panel="Run",
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read .bin and .pt files too (weights only; no code in them is run)."),
]
Sources = Annotated[
    list[str],
    typer.Option(
        "--sources",
        metavar="MODEL...",
        help="The models to merge: folders, .safetensors files, org/name or org/name@revision.",
        rich_help_panel=MERGE,
    ),
    Several("--sources"),
]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        metavar="X...",
        help="One weight for each source, in their order; 0.2,0.8 is interpolated over depth.",
        rich_help_panel=MERGE,
    ),
    Several("--weights", "numbers"),
]

_run_option = functools.partial(typer.Option, rich_help_panel=RUN)
_output_option = functools.partial(typer.Option, rich_help_panel=OUTPUT)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a merge is done and where its result goes: the options of every command that merges."""

    output: Annotated[
        Path | None,
        _output_option(
            "-o",
            "--output",
            metavar="PATH",
            help="Where the result is written: a folder, or one .safetensors file.  [default: ./merged]",
        ),
    ] = None
    assignments: Annotated[
        list[str] | None,
        _run_option("--set", metavar="KEY=VALUE...", help="Set keys of the recipe, as in --set output.dtype=float32."),
        Several("--set", "assignments"),
    ] = None
    device: Annotated[str, _run_option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:1.")] = "auto"
    memory: Annotated[
        str | None, _run_option("--memory", metavar="SIZE", help="Peak memory of the process, as 4GB; never exceeded.")
    ] = None
    threads: Annotated[
        int | None,
        _run_option("--threads", metavar="N", min=1, help="Number of workers; the result does not depend on it."),
    ] = None
    dtype: Annotated[
        str | None, _output_option("--dtype", metavar="TYPE", help="Storage type of the result, as bfloat16.")
    ] = None
    quantize: Annotated[
        str | None,
        _output_option(
            "--quantize", metavar="keep", help="keep: store quantised what the base or first source stores so."
        ),
    ] = None
    shard_size: Annotated[
        str | None, _output_option("--shard-size", metavar="SIZE", help="Largest file of the result, as 5GB.")
    ] = None
    resume: Annotated[bool, _run_option("--resume", help="Go on with an interrupted run of the output.")] = False
    overwrite: Annotated[bool, _output_option("--overwrite", help="Replace an output of before.")] = False
    push: Annotated[
        str | None, _output_option("--push", metavar="REPO", help="Upload the result to org/name on the Hub.")
    ] = None
    private: Annotated[bool, _output_option("--private", help="With --push: make the repository private.")] = False
    allow_nonfinite: Annotated[
        bool, _run_option("--allow-nonfinite", help="Let NaN and infinity in the inputs through.")
    ] = False
    allow_pickle: AllowPickle = False
    allow_base_mismatch: Annotated[
        bool, _run_option("--allow-base-mismatch", help="Use task vectors on a base that they were not taken from.")
    ] = False
    strict: Annotated[
        bool, _run_option("--strict", help="Refuse sources whose configs disagree in meaning, and keys without effect.")
    ] = False
    no_hash_inputs: Annotated[
        bool, _run_option("--no-hash-inputs", help="Leave the hashes of local inputs out of the lock file.")
    ] = False
    report: Annotated[
        Path | None, _output_option("--report", metavar="FILE", help="Also write what the merge was as one HTML page.")
    ] = None
    dry_run: Annotated[bool, _run_option("--dry-run", help="Print the plan and stop.")] = False
    profile: Annotated[bool, _run_option("--profile", help="Print where the time went, by stage.")] = False
    json: Json = False
    quiet: Quiet = False

    @property
    def mode(self) -> Mode:
        """Raises ``UsageError`` where both --resume and --overwrite are given."""
        return run_mode(resume=self.resume, overwrite=self.overwrite)

    def overrides(self) -> list[str]:
        """What these options change in the recipe, so that the recipe kept with the result says it too.

        Raises ``UsageError`` for ``--private`` without ``--push``.
        """
        from mergekit_px.located.overrides import FlagOverride

        found = list(self.assignments or ())
        if self.dtype is not None:
            found.append(FlagOverride(f"output.dtype={self.dtype}", f"--dtype {self.dtype}"))
        if self.quantize is not None:
            found.append(FlagOverride(f"output.quantize={self.quantize}", f"--quantize {self.quantize}"))
        if self.shard_size is not None:
            found.append(FlagOverride(f"output.shard_size={self.shard_size}", f"--shard-size {self.shard_size}"))
        if self.push is not None:
            push = f"output.push={{repo: {self.push!r}, private: {str(self.private).lower()}}}"
            found.append(FlagOverride(push, f"--push {self.push}"))
        elif self.private:
            raise UsageError("--private goes with --push", hint="add --push org/name")
        return found

    def plan_options(self) -> PlanOptions:
        """Raises ``UsageError`` for options that contradict one another and for a size that is none."""
        from mergekit_px.checkpoint.layout import parse_size
        from mergekit_px.plan.options import PlanOptions

        return PlanOptions(
            output=self.output,
            device=self.device,
            memory=None if self.memory is None else parse_size(self.memory, "--memory"),
            threads=self.threads,
            mode=self.mode,
            allow_nonfinite=self.allow_nonfinite,
            allow_pickle=self.allow_pickle,
            allow_base_mismatch=self.allow_base_mismatch,
            strict=self.strict,
            hash_inputs=not self.no_hash_inputs,
        )


def run_mode(*, resume: bool, overwrite: bool) -> Mode:
    """What becomes of what is in the output. Raises ``UsageError`` where both flags are given."""
    if resume and overwrite:
        raise UsageError("--resume keeps what is there and --overwrite removes it", hint="give one of them")
    if resume:
        return "resume"
    return "overwrite" if overwrite else "new"


def flatten(command: Callable[..., Any]) -> Callable[..., Any]:
    """``command`` with the fields of its dataclass parameters as parameters of its own, all by keyword."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if dataclasses.is_dataclass(parameter.annotation)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name in groups:
            parameters.extend(_fields(groups[name]))
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def flat(**given: Any) -> Any:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        with profiled(any(getattr(given[name], "profile", False) for name in groups)):
            return command(**given)

    flat.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return flat


def _fields(group: Any) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(group)
    ]


def list_options(command: Callable[..., Any]) -> dict[str, Several]:
    """The list options of a command, by flag."""
    marks = (
        mark
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        for mark in getattr(parameter.annotation, "__metadata__", ())
    )
    return {mark.flag: mark for mark in marks if isinstance(mark, Several)}


def has_option(command: Callable[..., Any], name: str) -> bool:
    """Whether a command has a parameter of that name."""
    return name in inspect.signature(command).parameters


@contextmanager
def profiled(asked: bool) -> Iterator[None]:
    """Measure what is done inside and print a table of it, also where it fails."""
    if not asked:
        yield
        return
    with measured() as stages:
        try:
            yield
        finally:
            for line in _lines(stages.rows(), stages.seconds):
                write_error_line(line)


def _lines(rows: Sequence[StageTime], seconds: float) -> Iterator[str]:
    processor = sum(row.processor for row in rows)
    yield f"{'stage':<12}{'processor s':>12}{'share':>8}{'waiting s':>12}"
    for row in rows:
        share = row.processor / processor if processor else 0.0
        yield f"{row.stage:<12}{row.processor:>12.2f}{share:>8.0%}{row.waiting:>12.2f}"
    yield f"{'all':<12}{processor:>12.2f}{1:>8.0%}"
    used = os.times()
    yield (
        f"{processor:.2f} s of processor time ({used.user:.2f} user, {used.system:.2f} system), start included,"
        f" and {seconds:.2f} s of time after the start; waiting is summed over threads"
    )
