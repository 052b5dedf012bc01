"""``pxmerge average --into STATE``: a running mean that takes the checkpoints of a run as they appear.

<state>/running-mean.json    what the mean was made of; written last
<state>/sum-<step>/          a checkpoint in float64: the sum so far, or of an EMA the mean itself

Sums of float32 and shorter numbers are as good as exact in float64, so the mean is rounded once, however many there
are. The older sum is removed when the newer one is recorded, so a run that is killed leaves one of the two.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_px.checkpoint.json_text import read_object
from mergekit_px.checkpoint.training_run import RunCheckpoint, check_spacing, training_run
from mergekit_px.cli._documents import MeanDocument
from mergekit_px.cli._errors import Interrupted
from mergekit_px.cli._merge import plan_together, run_together
from mergekit_px.cli._options import RunOptions
from mergekit_px.cli._output import Output
from mergekit_px.errors import InputError, MalformedCheckpointError, UsageError, WriteError
from mergekit_px.recipe.decay import ema_decay
from mergekit_px.recipe.naming import model_names

if TYPE_CHECKING:
    from mergekit_px.execute.events import RunResult

_RECORD = "running-mean.json"
_FOLDER = "sum-"
_LOCK = ".lock"
_POLL_SECONDS = 2.0
_SETTLED_SECONDS = 10.0
"""Files that nobody has written to for so long are taken for whole, if they read as whole."""


@dataclass(frozen=True)
class RunningMean:
    """What a mean was made of: ``weights`` is ``uniform`` or ``ema:0.9``, ``folder`` holds the sum of ``steps``."""

    weights: str
    folder: str
    steps: tuple[int, ...]

    @property
    def divisor(self) -> int:
        """What the sum is divided by."""
        return len(self.steps) if self.weights == "uniform" else 1

    @property
    def last(self) -> int:
        return self.steps[-1]


def read_running_mean(state: Path) -> RunningMean | None:
    """The running mean in a folder; None where none was begun.

    Raises:
        InputError: the folder is something else, or its record is damaged.
    """
    if not (state / _RECORD).exists():
        strange = [entry.name for entry in state.iterdir() if not _is_own(entry.name)] if state.is_dir() else []
        if strange or (state.exists() and not state.is_dir()):
            raise InputError("it holds no running mean but other files", where=str(state), hint="choose another --into")
        return None
    record = read_object(state / _RECORD, folder=state)
    weights, folder, steps = record.get("weights"), record.get("folder"), record.get("steps")
    if not (isinstance(weights, str) and isinstance(folder, str) and _is_own(folder) and isinstance(steps, list)):
        raise MalformedCheckpointError("the record of the running mean is damaged", where=str(state / _RECORD))
    if not steps or not all(isinstance(step, int) for step in steps) or not (state / folder).is_dir():
        raise MalformedCheckpointError("the record of the running mean is damaged", where=str(state / _RECORD))
    return RunningMean(weights, folder, tuple(steps))


def keep_running_mean(
    run: Sequence[str],
    state: Path,
    word: str,
    bounds: tuple[int, int | None],
    options: RunOptions,
    output: Output,
    *,
    follow: bool,
) -> int:
    """Take what a run has and the mean has not; with ``follow`` go on until the last step of ``bounds``."""
    if word != "uniform":
        ema_decay(word)
    try:
        return _keep(run, state, word, bounds, options, output, follow=follow)
    except KeyboardInterrupt:
        raise Interrupted(_command(run, state, word, bounds, options, follow=follow)) from None


def _command(
    run: Sequence[str], state: Path, word: str, bounds: tuple[int, int | None], options: RunOptions, *, follow: bool
) -> list[str]:
    """The words that go on after an interruption: the mean has what it has taken."""
    first, last = bounds
    words = ["average", *run, "--into", str(state)]
    words += ["--weights", word] if word != "uniform" else []
    words += ["--from", str(first)] if first else []
    words += ["--to", str(last)] if last is not None else []
    words += ["-o", str(options.output), "--overwrite"] if options.output is not None else []
    return [*words, "--follow"] if follow else words


def _keep(
    run: Sequence[str],
    state: Path,
    word: str,
    bounds: tuple[int, int | None],
    options: RunOptions,
    output: Output,
    *,
    follow: bool,
) -> int:
    first, last = bounds
    with _locked(state):
        known = read_running_mean(state)
        if known is not None and known.weights != word:
            raise UsageError(
                f"the running mean was begun with --weights {known.weights}, and cannot go on with {word}",
                where=str(state),
            )
        results: list[RunResult] = []
        told: set[str] = set()
        watch = _Watch()
        while True:
            found = training_run(run) if not follow or _has_any(run) else None
            for note in () if found is None else found.notes:
                if note not in told:
                    told.add(note)
                    output.note(f"note: {note}")
            new = [] if found is None else _new(found.checkpoints, known, first, last, run)
            if follow:
                new = watch.whole(new)
            if new:
                results, known = _taken(new, known, state, word, options, output)
                options = replace(options, overwrite=True, resume=False)
                span = f"{len(known.steps)} checkpoints, up to step {known.last}"
                output.note(f"{state} is at {span}")
            done = last is not None and known is not None and known.last >= last
            if not follow or done:
                break
            time.sleep(_POLL_SECONDS)
        if known is None:
            raise InputError("no checkpoint is there to begin a mean with", where=run[0])
        if not results:
            output.note(f"nothing is new: {len(known.steps)} checkpoints, up to step {known.last}, are in it already")
            if options.output is not None:
                results = _written(training_run(run).checkpoints, known, state, options, output)
    _report(known, results[-1].output if options.output is not None else None, state, output)
    return 0


def _new(
    checkpoints: Sequence[RunCheckpoint], known: RunningMean | None, first: int, last: int | None, run: Sequence[str]
) -> list[RunCheckpoint]:
    if any(checkpoint.step is None for checkpoint in checkpoints):
        raise InputError("a running mean goes by steps, and its checkpoints do not tell them", where=run[0])
    start = first if known is None else known.last + 1
    new = [each for each in checkpoints if each.step is not None and each.step >= start]
    if last is not None:
        new = [each for each in new if each.step is not None and each.step <= last]
    before = [] if known is None else list(known.steps)
    check_spacing([*before, *(each.step for each in new if each.step is not None)], run[0])
    return new


def _taken(
    new: Sequence[RunCheckpoint],
    known: RunningMean | None,
    state: Path,
    word: str,
    options: RunOptions,
    output: Output,
) -> tuple[list[RunResult], RunningMean]:
    """Add checkpoints to the mean, and write it in the checkpoints' own types too where an output is asked for."""
    steps = [*(known.steps if known is not None else ()), *(each.step for each in new if each.step is not None)]
    folder = f"{_FOLDER}{steps[-1]}"
    weights = _weights(word, known is not None, len(new))
    mean = RunningMean(word, folder, tuple(steps))
    inner = replace(options, dtype="float64", shard_size=None, overwrite=True, resume=False)
    wanted = [(_recipe(new, known, state, weights), inner, state / folder)]
    if options.output is not None:
        scaled = [weight / mean.divisor for weight in weights]
        wanted.append((_recipe(new, known, state, scaled), options, options.output))
    results = run_together(plan_together(wanted), output)
    _write_record(state, mean)
    for old in state.glob(f"{_FOLDER}*"):
        if old.name != folder:
            shutil.rmtree(old, ignore_errors=True)
    return results, mean


def _recipe(
    new: Sequence[RunCheckpoint], known: RunningMean | None, state: Path, weights: Sequence[float]
) -> dict[str, Any]:
    """A sum with these weights, of the sum so far (first) and of checkpoints."""
    names = model_names([each.reference for each in new], taken=["sum"])
    models = dict(zip(names, (each.reference for each in new), strict=True))
    if known is not None:
        models = {"sum": str(state / known.folder), **models}
    given = dict(zip(models, weights, strict=True))
    return {
        "pxmerge": 1,
        "models": models,
        "merge": {
            "method": "linear",
            # The newest comes first: it gives config, tokenizer and, in the output, the storage types.
            "sources": {name: given[name] for name in reversed(given)},
            "params": {"precision": "float64", "normalize": False},
        },
        "output": {"config_from": next(reversed(models))},
    }


def _weights(word: str, begun: bool, count: int) -> list[float]:
    """Weights of the sum so far, where there is one, and of the checkpoints that are new, oldest first."""
    if word == "uniform":
        return [1.0] * (begun + count)
    kept = ema_decay(word)
    oldest = [kept**count] if begun else [kept ** (count - 1)]
    others = count if begun else count - 1
    return [*oldest, *((1.0 - kept) * kept ** (others - 1 - place) for place in range(others))]


def _write_record(state: Path, mean: RunningMean) -> None:
    from mergekit_px.checkpoint.replacement import replacement

    with replacement(state / _RECORD) as file:
        file.write((json.dumps(asdict(mean), indent=2) + "\n").encode())


def _written(
    checkpoints: Sequence[RunCheckpoint], known: RunningMean, state: Path, options: RunOptions, output: Output
) -> list[RunResult]:
    """The mean so far; the newest checkpoint that went in takes part with weight 0, for its storage types."""
    newest = next((each for each in checkpoints if each.step == known.last), None)
    if newest is None and options.dtype is None:
        raise InputError(
            f"the checkpoint of step {known.last}, whose storage types the mean is to have, is gone",
            where=str(state),
            hint="give --dtype",
        )
    assert options.output is not None
    models = [] if newest is None else [newest]
    recipe = _recipe(models, known, state, [1 / known.divisor, *(0.0 for _ in models)])
    return run_together(plan_together([(recipe, options, options.output)]), output)


def _report(mean: RunningMean, written: Path | None, state: Path, output: Output) -> None:
    output.text(str(state if written is None else written))
    output.document(
        {
            "state": str(state),
            "weights": mean.weights,
            "steps": list(mean.steps),
            "output": None if written is None else str(written),
        },
        MeanDocument,
    )


@contextmanager
def _locked(state: Path) -> Iterator[None]:
    from mergekit_px.checkpoint.lock import DirectoryLock

    made = not state.exists()
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = DirectoryLock.take(state / _LOCK, str(state))
    except OSError as error:
        raise WriteError(f"cannot be used: {error.strerror or error}", where=str(state)) from error
    try:
        yield
    finally:
        lock.release(remove=True)
        if made and not any(state.iterdir()):
            state.rmdir()


def _is_own(name: str) -> bool:
    return name in (_RECORD, _LOCK, f"{_RECORD}.part") or (name.startswith(_FOLDER) and "/" not in name)


def _has_any(run: Sequence[str]) -> bool:
    """Whether there is a checkpoint to look at; the run that is followed may just have begun."""
    try:
        return bool(training_run(run).checkpoints)
    except InputError:
        return False


class _Watch:
    """Tells which checkpoints are whole: they read as whole, and nobody writes to them any more."""

    def __init__(self) -> None:
        self._seen: dict[str, Any] = {}

    def whole(self, checkpoints: Sequence[RunCheckpoint]) -> list[RunCheckpoint]:
        """Those before the first that is not whole yet."""
        from mergekit_px.checkpoint.open import open_checkpoint

        ready = []
        for checkpoint in checkpoints:
            try:
                opened = open_checkpoint(checkpoint.reference)
            except InputError:
                break
            state = [file.identity for file in opened.files.values() if file.identity is not None]
            youngest = max((each.mtime_ns for each in state), default=0) / 1e9
            if self._seen.get(checkpoint.reference) != state and time.time() - youngest < _SETTLED_SECONDS:
                self._seen[checkpoint.reference] = state
                break
            ready.append(checkpoint)
        return ready
