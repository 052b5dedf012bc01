"""The demo: real data, real checkpoints, no network.

A tiny vision transformer learns scikit-learn's handwritten digits; three copies of it go on to learn one distortion
of the digits each; every merge method joins the three through the command line; and every result is loaded back with
`transformers` and scored on all four tasks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.demo.report import Score, markdown_table, write_data, write_picture
from mergekit_px.errors import InputError, OutputError, RunError, UsageError

BASE = "base"
MERGED = "merged"
TABLE, DATA, PICTURE = "accuracy.md", "accuracy.json", "accuracy.png"


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The scores of base, fine-tunes and merges (the best on average first), and the files that hold them."""

    scores: tuple[Score, ...]
    table: Path
    data: Path
    picture: Path


def run_demo(output: Path, seed: int, merge: Callable[[Sequence[str]], int], say: Callable[[str], None]) -> DemoResult:
    """Train, merge with every method, score, and write table and picture.

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
    from mergekit_px.demo.tasks import FINE_TUNES, load_tasks
    from mergekit_px.demo.train import Trainer

    _claim(output, {BASE, MERGED, TABLE, DATA, PICTURE, *FINE_TUNES})
    tasks = load_tasks(seed)
    trainer = Trainer(seed)
    scores = []
    merges = []

    say(f"{BASE}: learning {len(tasks['plain'].train_labels)} plain digits")
    base = trainer.base(tasks["plain"])
    trainer.save(base, output / BASE)
    scores.append(Score(BASE, "base", None, trainer.score(output / BASE, tasks)))
    for name in FINE_TUNES:
        say(f"{name}: fine-tuning the base on {name} digits")
        trainer.save(trainer.fine_tune(base, tasks[name]), output / name)
        scores.append(Score(f"fine-tune {name}", "fine-tune", None, trainer.score(output / name, tasks)))

    commands = merge_commands(output, FINE_TUNES)
    for number, command in enumerate(commands, 1):
        line = " ".join(["pxmerge", *command.arguments])
        say(f"[{number}/{len(commands)}] {line}")
        with contextlib.redirect_stdout(io.StringIO()):
            code = merge(command.arguments)
        if code != 0:
            raise RunError(f"`{line}` ended with exit code {code}", where="demo")
        merges.append(Score(command.label, "merge", line, trainer.score(command.output, tasks)))

    scores += sorted(merges, key=lambda score: -score.mean)
    result = DemoResult(tuple(scores), output / TABLE, output / DATA, output / PICTURE)
    table = markdown_table(result.scores)
    result.table.write_text(table, encoding="utf-8")
    write_data(result.scores, seed, result.data)
    write_picture(result.scores, result.picture)
    say(table)
    say(f"table: {result.table}, {result.data}; picture: {result.picture}; checkpoints: {output}")
    return result


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

    seed, scores = read_data(demo / DATA)
    open_checkpoint(model)
    try:
        accuracy = Trainer(seed).score(model, load_tasks(seed))
    except (OSError, ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise InputError(f"transformers cannot load it as a model of the demo: {line}", where=str(model)) from error
    score = Score(str(model), "merge", None, accuracy)
    say(markdown_table([*(known for known in scores if known.kind != "merge"), score]))
    return score


LEFT_OUT = frozenset({"anisotropic", "anisotropic_groups", "combine", "svc"})
"""Methods for a purpose that three fine-tunes alone do not give: the anisotropic ones need learned coefficients,
``combine`` weights that make a model of whole checkpoints, and ``svc`` corrects another merge."""

SETTINGS: dict[str, tuple[str, ...]] = {
    "task_arithmetic": ("--weights", "0.5", "0.5", "0.5"),
    "dare_linear": ("--weights", "0.5", "0.5", "0.5"),
    "della_linear": ("--weights", "0.5", "0.5", "0.5"),
}
"""Options that differ from a method's defaults: what adds whole task vectors up adds half of each, the usual start
for three of them. The numbers are not tuned to the test digits."""


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
        run = ["--output", str(target), "--overwrite", "--quiet"]
        label = name if taken == fine_tunes else f"{name} ({', '.join(taken)})"
        arguments = [method_slug(name), *base, *sources, *SETTINGS.get(name, ()), *run]
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
