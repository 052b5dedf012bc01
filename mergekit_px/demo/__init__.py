"""The demo: real data, real checkpoints, no network.

A tiny vision transformer learns scikit-learn's handwritten digits; three copies of it go on to learn one distortion
of the digits each; every merge method joins the three through the command line; and every result is loaded back with
`transformers` and scored on all four tasks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_px.errors import OutputError, RunError, UsageError

BASE = "base"
MERGED = "merged"
TABLE, DATA, PICTURE = "accuracy.md", "accuracy.json", "accuracy.png"


@dataclass(frozen=True, slots=True)
class Score:
    """One row of the table: test accuracy in percent for each task, and their mean."""

    name: str
    kind: str
    command: str | None
    accuracy: dict[str, float]

    @property
    def mean(self) -> float:
        return sum(self.accuracy.values()) / len(self.accuracy)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The scores of base, fine-tunes and merges, and the files that hold them."""

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
    from mergekit_px.demo.report import markdown_table, write_data, write_picture
    from mergekit_px.demo.tasks import FINE_TUNES, load_tasks
    from mergekit_px.demo.train import Trainer

    _claim(output, {BASE, MERGED, TABLE, DATA, PICTURE, *FINE_TUNES})
    tasks = load_tasks(seed)
    trainer = Trainer(seed)
    scores = []

    say(f"{BASE}: learning {len(tasks['plain'].train_labels)} plain digits")
    base = trainer.base(tasks["plain"])
    trainer.save(base, output / BASE)
    scores.append(Score(BASE, "base", None, trainer.score(output / BASE, tasks)))
    for name in FINE_TUNES:
        say(f"{name}: fine-tuning the base on {name} digits")
        trainer.save(trainer.fine_tune(base, tasks[name]), output / name)
        scores.append(Score(name, "fine-tune", None, trainer.score(output / name, tasks)))

    for name, arguments in merge_commands(output, FINE_TUNES).items():
        say(f"pxmerge {' '.join(arguments)}")
        code = merge(arguments)
        if code != 0:
            raise RunError(f"`pxmerge {' '.join(arguments)}` ended with exit code {code}", where=f"demo: {name}")
        scores.append(
            Score(name, "merge", "pxmerge " + " ".join(arguments), trainer.score(output / MERGED / name, tasks))
        )

    result = DemoResult(tuple(scores), output / TABLE, output / DATA, output / PICTURE)
    table = markdown_table(result.scores)
    result.table.write_text(table, encoding="utf-8")
    write_data(result.scores, seed, result.data)
    write_picture(result.scores, result.picture)
    say(table)
    say(f"table: {result.table}, {result.data}; picture: {result.picture}; checkpoints: {output}")
    return result


SETTINGS: dict[str, tuple[str, ...]] = {
    "task_arithmetic": ("--weights", "0.5", "0.5", "0.5"),
    "dare_linear": ("--weights", "0.5", "0.5", "0.5"),
}
"""Options that differ from a method's defaults. Halving the task vectors is the usual start for three of them;
the numbers are not tuned to the test digits."""


def merge_commands(output: Path, fine_tunes: Sequence[str]) -> dict[str, list[str]]:
    """The arguments of one ``pxmerge`` call for each declared method, by the method's name.

    A method that takes fewer sources than there are fine-tunes gets the first of them. A method of a single source
    merges nothing, and one with a parameter that has no default cannot be run blindly: both are left out.
    """
    from mergekit_px.methods import load_methods
    from mergekit_px.methods.declare import method_slug

    commands = {}
    for name, method in sorted(load_methods().items()):
        least, most = method.sources
        count = min(most or len(fine_tunes), len(fine_tunes))
        if count < max(least, 2) or any(field.is_required() for field in method.params.model_fields.values()):
            continue
        base = ["--base", str(output / BASE)] if method.space == "deltas" else []
        sources = [str(output / source) for source in fine_tunes[:count]]
        target = ["-o", str(output / MERGED / name), "--overwrite", "-q"]
        commands[name] = [method_slug(name), *base, "--sources", *sources, *SETTINGS.get(name, ()), *target]
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
