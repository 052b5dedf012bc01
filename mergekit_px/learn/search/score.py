"""How good a merged model is: a number that a command prints, or accuracy on data."""

from __future__ import annotations

import math
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.errors import InputNotFoundError, RunError, UsageError
from mergekit_px.learn.data import Examples, split_rows
from mergekit_px.learn.data_files import load_data, needs_model
from mergekit_px.learn.labels import read_labels
from mergekit_px.learn.models import find_checkpoint, load_model
from mergekit_px.learn.search.settings import SearchSettings
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
    """

    def __init__(self, settings: SearchSettings, device: torch.device) -> None:
        self._settings, self._device = settings, device
        self._parts: dict[str, Examples] = {}
        paths = [path for path in (settings.data, settings.test) if isinstance(path, str)]
        if any(not needs_model(path) for path in paths):
            self._read(None)

    def score(self, part: Literal["validation", "test"]) -> Score:
        """Percent of right labels where an example has one; else the negative loss: of tokens, or of values."""

        def score(folder: Path) -> float:
            checkpoint = find_checkpoint(str(folder))
            if not self._parts:
                self._read(checkpoint)
            settings = self._settings
            model = load_model(checkpoint, settings.model, allow_code=settings.allow_code)
            model.module.to(self._device).eval().requires_grad_(False)
            read, reading = read_labels(model.module, self._parts[part], self._device)
            found = evaluate(model.module, read, settings.batch, self._device, own_loss=reading.own_loss)
            if not math.isfinite(found["loss"]):
                return math.nan
            return found["accuracy"] if reading.kind == "examples" else -found["loss"]

        return score

    def _read(self, model: Checkpoint | None) -> None:
        settings, data = self._settings, str(self._settings.data)
        whole = load_data(data, model, settings.text)
        self._parts = {"validation": whole}
        if isinstance(settings.test, str):
            self._parts["test"] = load_data(settings.test, model, settings.text)
        elif settings.test > 0:
            rows = split_rows(len(whole), {"test": settings.test}, settings.seed, data)
            self._parts = {"validation": whole.take(rows["train"]), "test": whole.take(rows["test"])}
