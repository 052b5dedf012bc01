"""Classes by the nearest prototype: ``argmax_c cos(f(x; A_t), p~_c)``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_px.adapters.acmap_stored import StoredState
from mergekit_px.checkpoint.replacement import replacement
from mergekit_px.errors import InputError, UsageError
from mergekit_px.learn.acmap.backbone import ModelOptions
from mergekit_px.learn.acmap.prototypes import Prototypes
from mergekit_px.learn.acmap.sources import FeatureSource, Sources, Tell, require_comparable


@dataclass(frozen=True, slots=True)
class ClassifyOptions:
    """What is classified, and by which table.

    Attributes:
        features: a file of features; or ``data``: a file of inputs for ``model``.
        concatenate: append the features without an adapter, on both sides.
        mapped: use the mapped prototypes; else as they were stored.
    """

    state: Path
    features: str | None = None
    data: str | None = None
    concatenate: bool = False
    mapped: bool = True
    model: ModelOptions = field(default_factory=ModelOptions)


@dataclass(frozen=True)
class Predictions:
    """For each example: the class, its task, and the cosine; and the label, where there is one.

    Attributes:
        classes, tasks: (n,) int64.
        cosines: (n,) float64.
        labels: (n,) int64 or None.
        report: t, and with labels the accuracy in percent over all classes so far: by task, and overall.
    """

    classes: Tensor
    tasks: Tensor
    cosines: Tensor
    labels: Tensor | None
    report: dict[str, Any]

    def lines(self) -> Iterator[dict[str, Any]]:
        """A document for each example."""
        for row in range(len(self.classes)):
            found = {
                "index": row,
                "class": int(self.classes[row]),
                "task": int(self.tasks[row]),
                "cosine": round(float(self.cosines[row]), 6),
            }
            yield found if self.labels is None else found | {"label": int(self.labels[row])}


def nearest(features: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Row of the table with the largest cosine, and the cosine: (n,) int64, (n,) float64.

    Of rows that tie the first one is taken; a vector of zeros has the cosine 0 with all.

    Args:
        features: (n, d).
        table: (classes, d).
    """
    unit = torch.nn.functional.normalize(features.double().cpu(), dim=1)
    cosines, places = (unit @ torch.nn.functional.normalize(table.double(), dim=1).T).max(dim=1)
    return places, cosines


def classify(options: ClassifyOptions, tell: Tell = lambda what, done, total: None) -> Predictions:
    """Classify every example of a file.

    Raises:
        UsageError, InputError: options or files that do not fit, a state without prototypes, labels of classes that
            no mapped task has.
        TensorMismatchError, AdapterError: adapters that do not fit the model.
        NonFiniteError: features that are NaN or infinite.
    """
    if bool(options.features) == bool(options.data):
        raise UsageError("examples come as features or as data", hint="give either --features or --data")
    stored = StoredState(options.state)
    table = Prototypes.of(stored)
    rows = table.table(mapped=options.mapped, plain=options.concatenate, where=stored.where)
    newest = len(table.records)
    current = stored.number(newest)
    source = Sources(stored, options.model).open(current, features=options.features, data=options.data)
    for record in table.records:
        require_comparable(record, source.how, source.where, allow_base_mismatch=options.model.allow_base_mismatch)
    labels = source.labels
    if labels is not None and not bool((table.task_of(labels) > 0).all()):
        unknown = int(labels[table.task_of(labels) == 0][0])
        raise InputError(
            f"label {unknown} is a class of no task that has been mapped",
            where=source.where,
            hint=f"the classes are {_shortened(table.classes.tolist())}",
        )
    source.require([current, *([0] if options.concatenate else [])])
    parts = list(_classified(source, current, rows, options.concatenate, tell))
    places, cosines = (torch.cat(part) for part in zip(*parts, strict=True))
    classes, tasks = table.classes[places], table.tasks[places]
    report: dict[str, Any] = {
        "state": str(options.state),
        "t": newest,
        "L": stored.last,
        "adapter": current,
        "examples": len(classes),
        "classes": len(table.classes),
        "mapped": options.mapped,
        "concatenate": options.concatenate,
    }
    if stored.state.count > current:
        report["not_mapped"] = list(range(newest + 1, stored.state.count + 1))
    if labels is not None:
        right, owners = classes == labels, table.task_of(labels)
        report["accuracy"] = {
            "overall": _percent(right),
            "tasks": {str(int(task)): _percent(right[owners == task]) for task in owners.unique()},
        }
    return Predictions(classes, tasks, cosines, labels, report)


def write_predictions(found: Predictions, output: Path) -> None:
    """``class``, ``task`` (n,) int64, ``cosine`` (n,) float32 and, where known, ``labels``, as .npz.

    Raises WriteError.
    """
    import numpy

    arrays: dict[str, Tensor] = {"class": found.classes, "task": found.tasks, "cosine": found.cosines.float()}
    if found.labels is not None:
        arrays["labels"] = found.labels
    with replacement(output) as file:
        numpy.savez(file, allow_pickle=False, **{name: tensor.numpy() for name, tensor in arrays.items()})


def _classified(
    source: FeatureSource, current: int, table: Tensor, concatenate: bool, tell: Tell
) -> Iterator[tuple[Tensor, Tensor]]:
    plain = [batch.double().cpu() for batch in source.batches(0)] if concatenate else None
    done = 0
    for number, batch in enumerate(source.batches(current)):
        features = batch if plain is None else torch.cat([batch.double().cpu(), plain[number]], 1)
        if features.shape[1] != table.shape[1]:
            raise InputError(
                f"features of {features.shape[1]} numbers, the prototypes have {table.shape[1]}", where=source.where
            )
        yield nearest(features, table)
        done += len(batch)
        tell("examples", done, source.rows)


def _percent(right: Tensor) -> float:
    return 100.0 * float(right.double().mean())


def _shortened(classes: list[int]) -> str:
    return ", ".join(map(str, classes[:10])) + (f" and {len(classes) - 10} more" if len(classes) > 10 else "")
