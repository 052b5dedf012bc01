"""Scores by lm-eval, the harness of EleutherAI: tasks of its own, or of a folder."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mergekit_px.errors import RunError, UsageError
from mergekit_px.learn.search.objectives import SCORE, Metrics, Objective
from mergekit_px.learn.search.settings import HARNESS, SearchSettings
from mergekit_px.located.nearest import hint_for


class HarnessScore:
    """What tasks of lm-eval give: ``TASK.METRIC``, and ``METRIC`` alone where one task has it; the first of the first
    task is the main one.

    Raises:
        UsageError: lm-eval is not installed, or there is no such task.
    """

    def __init__(self, what: str, settings: SearchSettings, device: torch.device) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            what = f"{HARNESS} needs the library lm-eval"
            raise UsageError(what, where="--evaluate", hint='run: pip install "pxmerge[evaluate]"')
        self._tasks = what.removeprefix(f"{HARNESS}:").split(",")
        self._settings, self._device = settings, device
        self._objectives = settings.objectives
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        folder = settings.tasks_folder
        self._manager = _tasks(None if folder is None else str(Path(folder).expanduser()), self._tasks)
        known = self._manager.all_tasks
        unknown = next((task for task in self._tasks if task not in set(known)), None)
        if unknown is not None:
            hint = hint_for(unknown, known) if folder is not None else "name the folder of its YAML with --tasks-folder"
            raise UsageError(f"lm-eval has no task '{unknown}'", where="--evaluate", hint=hint)

    def __call__(self, folder: Path) -> Metrics:
        try:
            with _quiet():
                harness = importlib.import_module("lm_eval")
                found = harness.simple_evaluate(
                    model="hf",
                    model_args={"pretrained": str(folder), "trust_remote_code": False},
                    tasks=self._tasks,
                    task_manager=self._manager,
                    batch_size=self._settings.batch,
                    device=str(self._device),
                    limit=self._settings.examples,
                    bootstrap_iters=0,
                    log_samples=False,
                )
        except Exception as error:  # whatever a task's own code, a data set or a model raises
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RunError(f"lm-eval stopped: {said[:300]}", where=",".join(self._tasks)) from error
        return self._numbers(found["results"], found.get("higher_is_better", {}))

    def _numbers(self, results: Mapping[str, Mapping[str, Any]], better: Mapping[str, Mapping[str, Any]]) -> Metrics:
        pairs = [
            (task, key.removesuffix(",none"), value)
            for task, numbers in results.items()
            for key, value in numbers.items()
            if isinstance(value, (int, float)) and "_stderr" not in key and "," in key
        ]
        if not pairs:
            raise RunError("lm-eval gives no number", where=",".join(self._tasks))
        metrics = {f"{task}.{metric}": float(value) for task, metric, value in pairs}
        names = [metric for _, metric, _ in pairs]
        metrics |= {metric: float(value) for _, metric, value in pairs if names.count(metric) == 1}
        task, metric, value = pairs[0]
        metrics[SCORE] = float(value)
        lower = {f"{task}.{key}" for task, keys in better.items() for key, high in keys.items() if high is False}
        _require_direction(self._objectives, lower, {SCORE: f"{task}.{metric}"})
        return metrics


def _tasks(folder: str | None, names: Sequence[str]) -> Any:
    """lm-eval's index of tasks: of the folder alone where it has all of them, for its own are thousands of files."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _quiet():
        index = importlib.import_module("lm_eval.tasks").TaskManager
        if folder is not None:
            own = index(include_path=folder, include_defaults=False)
            if set(names) <= set(own.all_tasks):
                return own
        return index(include_path=folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, what libraries and programs that they run print goes nowhere: bars and banners, at every trial."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _require_direction(objectives: Sequence[Objective], lower: set[str], main: Mapping[str, str]) -> None:
    """Raise ``UsageError`` for an objective that is better low, and was not said to be."""
    for objective in objectives:
        name = main.get(objective.name, objective.name)
        low = next((one for one in lower if name.partition(",")[0] in (one, one.partition(".")[2])), None)
        if objective.minimize is None and low is not None:
            hint = f"write --objective {name}:min, or :max if more is meant"
            raise UsageError(f"of {low} less is better, to lm-eval", where="--objective", hint=hint)
