"""Features of the same examples under each merged adapter: measured elsewhere, or by a model at hand.

The merged adapter of the first n tasks has the number n; number 0 is the model without any adapter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mergekit_px.adapters.acmap_stored import StoredState
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import InputError, UsageError
from mergekit_px.learn.acmap.arrays import ArrayFile, MadeArrays
from mergekit_px.learn.acmap.backbone import Backbone, ModelOptions
from mergekit_px.learn.data import LABELS, Batch
from mergekit_px.learn.data_files import data_arrays, needs_model
from mergekit_px.learn.life import Run
from mergekit_px.learn.memory import COMPUTED, floating, numbers, plan_memory
from mergekit_px.learn.text_data import NO_TEXT
from mergekit_px.plan.inputs import fetch_checkpoint

if TYPE_CHECKING:
    from mergekit_px.learn.acmap.settings import FeatureSettings


FEATURES = "features"
_OF_A_HEAD = ("architectures", "id2label", "label2id", "num_labels")
_ROWS = 4096

Tell = Callable[[str, int, int], None]


class FeatureSource(Protocol):
    """Where features come from.

    Attributes:
        where: for messages.
        labels: the class of each example, (n,) int64; None where they are not known.
        rows: n.
        how: what the features depend on beside the data: part of the record of a mapping.
        is_slow: whether a pass over the examples is worth keeping.
    """

    where: str
    labels: Tensor | None
    rows: int
    how: dict[str, Any]
    is_slow: bool

    def require(self, numbers: Sequence[int]) -> None:
        """Raise ``InputError`` where there are no features under one of these merged adapters."""

    def batches(self, number: int) -> Iterator[Tensor]:
        """The features (b, d) of consecutive examples. Raises ``InputError``, ``NonFiniteError``."""


class StoredFeatures:
    """Features in a file: ``features`` under the current merged adapter, ``features_N`` under that of N tasks.

    Args:
        current: the number of the current merged adapter.
    """

    is_slow = False

    def __init__(self, file: ArrayFile, current: int) -> None:
        self._file = file
        self._current = current
        self.where = file.where
        self.labels = file.labels()
        self.how: dict[str, Any] = {"input": "features"}
        if FEATURES not in file.names:
            found = ", ".join(map(shown, sorted(file.names))) or "nothing"
            raise InputError(
                f"it has no array {FEATURES!r}, it has {found}",
                where=self.where,
                hint=f"{FEATURES!r} holds the features under the current merged adapter",
            )
        self.rows = 0
        self.rows = len(self._array(FEATURES))

    def require(self, numbers: Sequence[int]) -> None:
        wanted = [self._name(number) for number in numbers]
        known = {LABELS, FEATURES} | {f"{FEATURES}_{number}" for number in range(self._current)}
        missing = [name for name in wanted if name not in self._file.names]
        surplus = [name for name in self._file.names if name not in known]
        if missing or surplus:
            problem = f"it has no {', '.join(missing)}" if missing else f"{shown(surplus[0])} has no meaning"
            raise InputError(
                f"{problem}; expected are {', '.join([*wanted, LABELS])}, found {', '.join(sorted(self._file.names))}",
                where=self.where,
                hint=f"{FEATURES}_N holds the same examples' features under the merged adapter of N tasks, 0 for none",
            )

    def batches(self, number: int) -> Iterator[Tensor]:
        array = self._array(self._name(number))
        for start in range(0, len(array), _ROWS):
            yield array[start : start + _ROWS]

    def _name(self, number: int) -> str:
        return FEATURES if number == self._current else f"{FEATURES}_{number}"

    def _array(self, name: str) -> Tensor:
        array = self._file.read(name)
        if array.ndim != 2 or not array.is_floating_point() or not array.shape[1]:
            raise InputError(
                f"{shown(name)} is {str(array.dtype).removeprefix('torch.')} {list(array.shape)}; features are"
                " floating-point numbers (examples, d)",
                where=self.where,
            )
        wanted = len(self.labels) if self.labels is not None else self.rows
        if wanted and len(array) != wanted:
            other = LABELS if self.labels is not None else FEATURES
            raise InputError(f"{shown(name)} has {len(array)} rows and {other} has {wanted}", where=self.where)
        if not len(array):
            raise InputError("it holds no examples", where=self.where)
        if not bool(torch.isfinite(array).all()):
            raise InputError(f"{shown(name)} holds a NaN or an infinity", where=self.where)
        return array


class ModelFeatures:
    """Features that a model computes from data, with one merged adapter of a state in it at a time.

    Args:
        file: the keyword arguments of the forward pass, and ``labels``.
    """

    is_slow = True

    def __init__(self, file: ArrayFile, stored: StoredState, backbone: Backbone, options: ModelOptions) -> None:
        self._stored = stored
        self._backbone = backbone
        self._batch = options.batch
        self.where = file.where
        self.labels = file.labels()
        self._inputs = {name: file.read(name) for name in file.names if name != LABELS}
        if not self._inputs:
            raise InputError("it has no inputs", where=self.where, hint="name them as the forward pass does")
        self.rows = len(self.labels) if self.labels is not None else 0
        for name, array in self._inputs.items():
            self.rows = self.rows or (len(array) if array.ndim else 0)
            if array.ndim == 0 or len(array) != self.rows:
                raise InputError(
                    f"{shown(name)} is {list(array.shape)}, and arrays need a row for each of {self.rows} examples",
                    where=self.where,
                )
            if array.is_floating_point() and not bool(torch.isfinite(array).all()):
                raise InputError(f"{shown(name)} holds a NaN or an infinity", where=self.where)
        self.how: dict[str, Any] = {
            "input": "data",
            "feature": options.feature,
            "pool": options.pool,
            "base_fingerprint": backbone.fingerprint,
        }
        if options.text != NO_TEXT:
            self.how["text"] = dataclasses.asdict(options.text) | {"columns": dict(options.text.columns)}

    def require(self, numbers: Sequence[int]) -> None:
        pass

    def batches(self, number: int) -> Iterator[Tensor]:
        tensors = self._backbone.with_adapter(self._stored.adapter(number)) if number else {}
        return self._backbone.features(self._cut(), tensors, self.where)

    def _cut(self) -> Iterator[Batch]:
        for start in range(0, self.rows, self._batch):
            yield {name: array[start : start + self._batch] for name, array in self._inputs.items()}


class Sources:
    """Opens what features come from; a model is made once, when data are first opened.

    Args:
        stored: whose adapters are put into the model.
    """

    def __init__(self, stored: StoredState, model: ModelOptions) -> None:
        self._stored = stored
        self._options = model
        self._backbone: Backbone | None = None

    def open(self, current: int, *, features: str | None, data: str | None) -> FeatureSource:
        """One file of features, or of data. Raises as the sources and the model do.

        Args:
            current: the number of the current merged adapter.
        """
        if features is not None:
            return StoredFeatures(ArrayFile(features), current)
        assert data is not None
        file = self._arrays(data)
        if self._backbone is None:
            self._backbone = Backbone(self._options, self._stored.adapter(current), self._stored.state.config)
        return ModelFeatures(file, self._stored, self._backbone, self._options)

    def _arrays(self, data: str) -> ArrayFile:
        """Arrays as they are, or made of texts or images for the model."""
        options = self._options
        if not needs_model(data) and options.text == NO_TEXT:
            return ArrayFile(data)
        base = None if options.base is None else fetch_checkpoint(options.base, allow_pickle=options.allow_pickle)
        if base is not None and base.config is not None:
            # Classes are numbered over all tasks, and no head of the model knows them.
            base = replace(base, config={key: value for key, value in base.config.items() if key not in _OF_A_HEAD})
        return MadeArrays(data_arrays(data, base, options.text), data)


def plan_features(run: Run[Any]) -> None:
    """Where there is a budget, say what will be kept besides the data and activations, or refuse.

    Raises:
        MemoryBudgetError: more than ``--memory``.
        UsageError: a model that only its function knows.
    """
    settings: FeatureSettings = run.settings
    if settings.memory is None:
        return
    if settings.features is not None:
        plan_memory(run, [], {"features": Path(settings.features).stat().st_size}, {})
        return
    if settings.base is None:
        what = "the size of the model is known only when its function has made it"
        raise UsageError(what, where="--memory", hint="give its checkpoint by --base, or leave out --memory")
    tensors = floating(fetch_checkpoint(settings.base, allow_pickle=settings.allow_pickle))
    is_peft = StoredState(Path(settings.state)).state.config is not None  # else adapters are tensors of the model
    adapted = numbers(one for one in tensors if len(one.shape) > 1) if is_peft else 0
    plan_memory(run, tensors, {"weights": COMPUTED * numbers(tensors), "adapted matrices": COMPUTED * adapted}, {})


def require_comparable(
    record: Mapping[str, Any], how: Mapping[str, Any], where: str, *, allow_base_mismatch: bool
) -> None:
    """Raise ``InputError`` where a model gives other features than those that prototypes are means of.

    Args:
        record: of a task that has been mapped.
        how: of the source of other features.
    """
    if record.get("input") != "data" or how.get("input") != "data":
        return
    for name in ("feature", "pool"):
        if record.get(name) != how.get(name):
            known = record.get(name)
            raise InputError(
                f"the prototypes were made with {f'the {name} {known}' if known else f'the default {name}'}",
                where=where,
                hint=f"give --{name} {known}" if known else f"leave out --{name}",
            )
    if record.get("base_fingerprint") != how.get("base_fingerprint") and not allow_base_mismatch:
        raise InputError(
            "the prototypes were made with another model, so features cannot be compared",
            where=where,
            hint="a function must make the same model every time; --allow-base-mismatch uses it all the same",
        )


def labels_of(source: FeatureSource) -> Tensor:
    """The class of each example. Raises ``InputError`` where they are not known."""
    if source.labels is None:
        raise InputError(f"it has no array {LABELS!r}, and prototypes are means by class", where=source.where)
    return source.labels


def class_means(source: FeatureSource, number: int, tell: Tell) -> ClassMeans:
    """The mean features of each class under one merged adapter. Raises ``InputError``, ``NonFiniteError``."""
    found, done = ClassMeans(labels_of(source)), 0
    what = f"features under the merged adapter of {number} tasks" if number else "features without an adapter"
    for batch in source.batches(number):
        found.add(batch, source.where)
        done += len(batch)
        tell(f"{what}, examples", done, source.rows)
    return found


class ClassMeans:
    """Means over the examples of each class.

    Args:
        labels: of all examples, (n,) int64.
    """

    def __init__(self, labels: Tensor) -> None:
        self.classes, self._places, self.counts = labels.unique(return_inverse=True, return_counts=True)
        self._sums: Tensor | None = None
        self._done = 0

    def add(self, features: Tensor, where: str) -> None:
        """Take in the features (b, d) of the next examples.

        Raises:
            InputError: features of another width than those before.
        """
        wide = features.double().cpu()
        if self._sums is None:
            self._sums = torch.zeros(len(self.classes), wide.shape[1], dtype=torch.float64)
        if wide.shape[1] != self._sums.shape[1]:
            raise InputError(f"features of {wide.shape[1]} numbers after some of {self._sums.shape[1]}", where=where)
        self._sums.index_add_(0, self._places[self._done : self._done + len(wide)], wide)
        self._done += len(wide)

    def means(self) -> Tensor:
        """(classes, d) float64, in ascending order of the classes, once all examples are in."""
        assert self._sums is not None and self._done == len(self._places)
        means: Tensor = self._sums / self.counts.unsqueeze(1)
        return means
