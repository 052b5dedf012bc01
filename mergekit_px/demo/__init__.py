"""The demo: real data, real checkpoints, no network.

A tiny vision transformer learns a few of scikit-learn's handwritten digits in four distorted forms; the last
checkpoints of that training run are averaged. Four copies go on to learn one form each, with the classifier as it is.
Every merge method joins the four through the command line, and every result is loaded back with `transformers` and
scored on all four tasks, in percent of what each task's own fine-tune reaches: the setting in which merging is
usually measured.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.demo.report import (
    Average,
    Kind,
    Results,
    Score,
    markdown_table,
    write_averages,
    write_data,
    write_picture,
)
from mergekit_px.errors import InputError, OutputError, RunError, UsageError

RUN, BASE, AVERAGES, MERGED = "run", "base", "averages", "merged"
TABLE, DATA, PICTURE, AVERAGES_PICTURE = "accuracy.md", "accuracy.json", "accuracy.png", "averages.png"
LAST = 6
"""How many of the run's last checkpoints the base is the mean of."""


def run_demo(output: Path, seed: int, merge: Callable[[Sequence[str]], int], say: Callable[[str], None]) -> Results:
    """Train, merge with every method, score, and write a table and two pictures.

    Args:
        output: folder for the checkpoints and the results; a former demo in it is replaced.
        seed: seed of the data split and of the training; equal seeds give equal numbers on one machine.
        merge: runs the command line on the arguments given and returns its exit code.
        say: receives each line of progress and the final table.

    Raises:
        UsageError: the packages of the ``demo`` extra are missing.
        OutputError: ``output`` holds something that is not a demo.
        RunError: a merge did not end with exit code 0.
    """
    _require_packages()
    from mergekit_px.demo.tasks import TASKS, load_tasks
    from mergekit_px.demo.train import Trainer

    _claim(output, {RUN, BASE, AVERAGES, MERGED, TABLE, DATA, PICTURE, AVERAGES_PICTURE, *TASKS})
    tasks = load_tasks(seed)
    trainer = Trainer(seed)

    def call(arguments: Sequence[str], number: str = "") -> str:
        line = " ".join(["pxmerge", *arguments])
        say(f"{number}{line}")
        with contextlib.redirect_stdout(io.StringIO()):
            code = merge([*arguments, "--overwrite", "--quiet"])
        if code != 0:
            raise RunError(f"`{line}` ended with exit code {code}", where="demo")
        return line

    say(f"{RUN}: learning a few digits of every task")
    shutil.rmtree(output / RUN, ignore_errors=True)
    trainer.run(tasks, output / RUN)
    call(["average", str(output / RUN), "--last", str(LAST), "--output", str(output / BASE)])
    for name in TASKS:
        say(f"{name}: fine-tuning the base on {name} digits")
        trainer.fine_tune(output / BASE, tasks[name], output / name)
    answers = {name: trainer.answers(output / name, tasks) for name in TASKS}
    own = {name: round(100.0 * float(answers[name][name].mean()), 1) for name in TASKS}

    def score(folder: Path, label: str, kind: Kind, line: str | None = None) -> Score:
        return Score.of(trainer.answers(folder, tasks), own, label, kind, line)

    scores = [score(output / BASE, BASE, "base")]
    scores += [Score.of(answers[name], own, f"fine-tune {name}", "fine-tune") for name in TASKS]
    commands = merge_commands(output, TASKS)
    merges = []
    for number, command in enumerate(commands, 1):
        line = call(command.arguments, f"[{number}/{len(commands)}] ")
        merges.append(score(command.output, command.label, "merge", line))
    scores += sorted(merges, key=lambda score: -score.normalised)

    shutil.rmtree(output / AVERAGES, ignore_errors=True)
    windows = ["--window", str(LAST), "--stride", "1"]
    call(["average", str(output / RUN), *windows, "--output", str(output / AVERAGES)])
    averages = [
        Average(
            step, score(folder, folder.name, "base").mean, None if mean is None else score(mean, mean.name, "base").mean
        )
        for step, folder, mean in _windows(output)
    ]
    results = Results(seed, tuple(scores), own, tuple(averages))
    table = markdown_table(results.scores)
    (output / TABLE).write_text(table, encoding="utf-8")
    write_data(results, output / DATA)
    write_picture(results.scores, output / PICTURE)
    write_averages(results.averages, output / AVERAGES_PICTURE)
    say(table)
    say(f"table: {output / TABLE}, {output / DATA}; pictures: {output / PICTURE}, {output / AVERAGES_PICTURE}")
    say(f"checkpoints: {output}")
    return results


def _windows(output: Path) -> Iterator[tuple[int, Path, Path | None]]:
    """Each checkpoint of the run with its step and the mean that ends at it, in the order of steps."""
    means = {int(folder.name.rpartition("-")[2]): folder for folder in (output / AVERAGES).iterdir()}
    steps = {int(folder.name.rpartition("-")[2]): folder for folder in (output / RUN).iterdir()}
    for step in sorted(steps):
        yield step, steps[step], means.get(step)


def score_merge(model: Path, demo: Path, say: Callable[[str], None]) -> Score:
    """Score a merge of a demo's models on the demo's tasks, beside its base and fine-tunes.

    Args:
        model: a folder that transformers can load.
        demo: the folder of the demo.
        say: receives the table.

    Raises:
        UsageError: the packages of the ``demo`` extra are missing.
        InputError: there is no demo, or no model of its kind.
    """
    _require_packages()
    from mergekit_px.demo.report import read_data
    from mergekit_px.demo.tasks import load_tasks
    from mergekit_px.demo.train import Trainer

    results = read_data(demo / DATA)
    open_checkpoint(model)
    try:
        answers = Trainer(results.seed).answers(model, load_tasks(results.seed))
    except (OSError, ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise InputError(f"transformers cannot load it as a model of the demo: {line}", where=str(model)) from error
    score = Score.of(answers, results.own, str(model), "merge")
    say(markdown_table([*(known for known in results.scores if known.kind != "merge"), score]))
    return score


LEFT_OUT = frozenset({"anisotropic", "anisotropic_groups", "combine", "svc"})
"""Methods for a purpose that three fine-tunes alone do not give: the anisotropic ones need learned coefficients,
``combine`` weights that make a model of whole checkpoints, and ``svc`` corrects another merge."""

SETTINGS: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("task_arithmetic", "dare_linear", "della_linear"), ("--weights", "0.4", "0.4", "0.4", "0.4")
)
"""Options that differ from a method's defaults: what adds whole task vectors up adds 0.4 of each, which the authors of
TIES (arXiv:2306.01708) use for task arithmetic where there is no validation data. Not tuned to the digits."""


@dataclass(frozen=True, slots=True)
class MergeCommand:
    """The arguments of one ``pxmerge`` call, where its result goes, and its row's label in the table."""

    label: str
    arguments: list[str]
    output: Path


def merge_commands(output: Path, fine_tunes: Sequence[str]) -> list[MergeCommand]:
    """One ``pxmerge`` call for each declared method.

    A method that takes fewer sources than there are fine-tunes gets the first of them. Left out are methods of a
    single source, which merge nothing, and those that need more: statistics, or a parameter without a default.
    """
    from mergekit_px.methods import load_methods
    from mergekit_px.methods.declare import method_slug

    commands = []
    for name, method in load_methods().items():
        least, most = method.sources
        taken = fine_tunes[:most]
        needs_more = any(field.is_required() for field in method.params.model_fields.values())
        if name in LEFT_OUT or needs_more or method.companions is not None or len(taken) < max(least, 2):
            continue
        base = ["--base", str(output / BASE)] if method.space == "deltas" else []
        sources = ["--sources", *(str(output / source) for source in taken)]
        target = output / MERGED / name
        label = name if taken == fine_tunes else f"{name} ({', '.join(taken)})"
        arguments = [method_slug(name), *base, *sources, *SETTINGS.get(name, ()), "--output", str(target)]
        commands.append(MergeCommand(label, arguments, target))
    return commands


def _require_packages() -> None:
    packages = {"transformers": "transformers", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"the demo needs {', '.join(missing)}", hint='run: pip install "pxmerge[demo]"')


def _claim(output: Path, own: set[str]) -> None:
    if output.exists():
        if not output.is_dir():
            raise OutputError("is not a folder", where=str(output), hint="name another with --output")
        foreign = sorted({entry.name for entry in output.iterdir()} - own)
        if foreign:
            raise OutputError(
                f"holds {foreign[0]!r}, which is not of a demo", where=str(output), hint="name another with --output"
            )
    output.mkdir(parents=True, exist_ok=True)
