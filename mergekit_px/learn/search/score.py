"""How good a merged model is: a number that a command prints, or accuracy on data."""

from __future__ import annotations

import math
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.errors import InputNotFoundError, RunError, UsageError
from mergekit_px.execute.lane import pick_device
from mergekit_px.learn.data import Examples, split_rows
from mergekit_px.learn.data_files import data_sha256, load_data, needs_model
from mergekit_px.learn.labels import read_labels
from mergekit_px.learn.models import find_checkpoint, load_model
from mergekit_px.learn.text_data import TextOptions
from mergekit_px.learn.tune.training import evaluate

Score = Callable[[Path], float]
"""From the folder of a model to a number; NaN where the model is good for nothing."""

PLACE = "{}"


def command_score(command: str) -> Score:
    """The number that a program prints: the last word of its last line.

    Args:
        command: its words; ``{}`` stands for the folder, which else comes last. No shell reads it.

    Raises:
        UsageError: no words, or quotes that do not close.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"it cannot be read: {error}", where=f"--score {command}") from None
    if not words:
        raise UsageError("it names no program", where="--score")
    if not any(PLACE in word for word in words):
        words.append(PLACE)

    def score(folder: Path) -> float:
        line = [word.replace(PLACE, str(folder)) for word in words]
        try:
            done = subprocess.run(line, capture_output=True, text=True, errors="replace", check=False)
        except FileNotFoundError:
            raise InputNotFoundError("no such program", where=words[0]) from None
        except OSError as error:
            raise UsageError(f"it cannot be run: {error.strerror or error}", where=words[0]) from error
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise RunError(f"it ended with code {done.returncode}: {last}", where=shlex.join(line))
        printed = done.stdout.split()
        try:
            return float(printed[-1].rstrip("%"))
        except (IndexError, ValueError):
            said = f"'{printed[-1]}'" if printed else "nothing"
            what = f"the last word that it prints is {said}, not a number"
            hint = "let it print the score last; {} stands for the folder"
            raise RunError(what, where=shlex.join(line), hint=hint) from None

    return score


class DataScore:
    """Scores on examples; those for the choice and those for the test are kept apart.

    Texts are read when the first model is there, by the tokenizer that came along with it.

    Args:
        data: a file or folder.
        test: a share of it, or another file; 0 for none.
    """

    def __init__(
        self,
        data: str,
        test: float | str,
        *,
        text: TextOptions,
        factory: str | None,
        allow_code: bool,
        device: str,
        batch: int,
        seed: int,
    ) -> None:
        self._data, self._test, self._text, self._seed = data, test, text, seed
        self._factory, self._allow_code = factory, allow_code
        self._place, self._batch = pick_device(device), batch
        self._parts: dict[str, Examples] = {}
        paths = [data, *([test] if isinstance(test, str) else [])]
        self.inputs = {path: data_sha256(path) for path in paths if Path(path).expanduser().exists()}
        if any(not needs_model(path) for path in paths):
            self._read(None)

    @property
    def has_test(self) -> bool:
        return self._test != 0

    def score(self, part: Literal["validation", "test"]) -> Score:
        """Percent of right labels where an example has one; else the negative loss: of tokens, or of values."""

        def score(folder: Path) -> float:
            checkpoint = find_checkpoint(str(folder))
            if not self._parts:
                self._read(checkpoint)
            model = load_model(checkpoint, self._factory, allow_code=self._allow_code)
            model.module.to(self._place).eval().requires_grad_(False)
            read, reading = read_labels(model.module, self._parts[part], self._place)
            found = evaluate(model.module, read, self._batch, self._place, own_loss=reading.own_loss)
            if not math.isfinite(found["loss"]):
                return math.nan
            return found["accuracy"] if reading.kind == "examples" else -found["loss"]

        return score

    def _read(self, model: Checkpoint | None) -> None:
        whole = load_data(self._data, model, self._text)
        if isinstance(self._test, str):
            self._parts = {"validation": whole, "test": load_data(self._test, model, self._text)}
        elif self._test > 0:
            rows = split_rows(len(whole), {"test": self._test}, self._seed, self._data)
            self._parts = {"validation": whole.take(rows["train"]), "test": whole.take(rows["test"])}
        else:
            self._parts = {"validation": whole}
