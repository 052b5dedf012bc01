"""How good a merged model is: numbers that a command prints, accuracy on data, or what lm-eval says."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.errors import InputNotFoundError, RunError, UsageError
from mergekit_px.learn.data import Examples, split_rows
from mergekit_px.learn.data_files import load_data, needs_model
from mergekit_px.learn.labels import read_labels
from mergekit_px.learn.models import load_model
from mergekit_px.learn.objective import evaluate
from mergekit_px.learn.search.objectives import SCORE, Metrics
from mergekit_px.learn.search.settings import SearchSettings

Score = Callable[[Path], Metrics]
"""From the folder of a model to numbers; NaN where the model is good for nothing."""

PLACE = "{}"
MERGED = "the merged model"
"""How messages call what lies in a folder that is gone when they are read."""

_programs: set[subprocess.Popen[str]] = set()
"""Those that score now, of all commands."""


class CommandScore:
    """What a program prints: numbers by name as a JSON object in its last line, or one number as its last word.

    Args:
        command: its words; ``{}`` stands for the folder, which else comes last. No shell reads it.

    Raises:
        UsageError: no words, or quotes that do not close.
        InputNotFoundError: a program that is not there, or may not be run.
    """

    def __init__(self, command: str) -> None:
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"it cannot be read: {error}", where=f"--score {command}") from None
        if not self._words:
            raise UsageError("it names no program", where="--score")
        if shutil.which(self._words[0]) is None:
            exists = Path(self._words[0]).exists()
            what = "it is no program that may be run" if exists else "no such program"
            hint = f"chmod +x {self._words[0]}, or name what reads it" if exists else None
            if re.match(r"lm[-_]eval\b", self._words[0]):
                hint = "tasks of lm-eval are given by --evaluate lm_eval:TASK,TASK"
            raise InputNotFoundError(what, where=self._words[0], hint=hint)
        if not any(PLACE in word for word in self._words):
            self._words.append(PLACE)
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False
        self._lock = threading.Lock()

    def __call__(self, folder: Path) -> Metrics:
        line = [word.replace(PLACE, str(folder)) for word in self._words]
        try:
            # In a session of its own, so that what it begins itself can be ended with it.
            process = subprocess.Popen(
                line,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except FileNotFoundError:
            raise InputNotFoundError("no such program", where=self._words[0]) from None
        except OSError as error:
            raise UsageError(f"it cannot be run: {error.strerror or error}", where=self._words[0]) from error
        _programs.add(process)
        with process:
            try:
                with self._lock:
                    self._running.add(process)
                    if self._stopped:
                        _kill(process)
                stdout, stderr = process.communicate()
            except BaseException:
                _kill(process)
                raise
            finally:
                _programs.discard(process)
                with self._lock:
                    self._running.discard(process)
        if process.returncode != 0:
            last = (stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise RunError(f"it ended with code {process.returncode}: {last}", where=shlex.join(line))
        return printed_numbers(stdout, shlex.join(line))

    def stop(self) -> None:
        """End what is running, and what begins from now on."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                _kill(process)


def stop_programs() -> None:
    """End every program that scores, for a process that ends at once; takes no lock."""
    for process in tuple(_programs):
        _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """End a program and what it began."""
    if process.returncode is None:  # else the number may be another's
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def printed_numbers(text: str, where: str) -> Metrics:
    """The numbers in what a program printed. Raises ``RunError`` where there is none."""
    last = (text.strip().splitlines() or [""])[-1]
    if last.lstrip().startswith("{"):
        try:
            document = json.loads(last)
        except (ValueError, RecursionError):
            document = {}
        found = {str(name): float(value) for name, value in document.items() if type(value) in (int, float)}
        if found:
            return found if len(found) > 1 else {SCORE: next(iter(found.values())), **found}
    printed = last.split()
    try:
        return {SCORE: float(printed[-1].rstrip("%"))}
    except (IndexError, ValueError):
        said = f"'{printed[-1][:80]}'" if printed else "nothing"
        what = f"the last word that it prints is {said}, not a number"
        hint = 'let it print the score last, or a line {"accuracy": 0.5, ...}; {} stands for the folder'
        raise RunError(what, where=where, hint=hint) from None


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
        """Loss, and the percent of right labels where labels are classes. The main number is that percent where an
        example has one label; else the negative loss: of tokens, or of values."""

        def score(folder: Path) -> Metrics:
            checkpoint = open_checkpoint(folder, label=MERGED)
            if not self._parts:
                self._read(checkpoint)
            settings = self._settings
            model = load_model(checkpoint, settings.model, allow_code=settings.allow_code)
            model.module.to(self._device).eval().requires_grad_(False)
            read, reading = read_labels(model.module, self._parts[part], self._device)
            found = evaluate(model.module, read, settings.batch, self._device, own_loss=reading.own_loss)
            main = found["accuracy"] if reading.kind == "examples" else -found["loss"]
            return {SCORE: main if math.isfinite(found["loss"]) else math.nan, **found}

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
