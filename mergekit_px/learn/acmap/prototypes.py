"""The table of class prototypes: what is stored once, and the translations that bring it up to date."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mergekit_px.adapters.acmap_stored import StoredState
from mergekit_px.errors import InputError, MalformedCheckpointError

_ARRAYS = {"vectors": torch.float64, "class": torch.int64, "task": torch.int64, "count": torch.int64}
_SHIFTS = "shifts"
_PLAIN = "plain"


def _none(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


@dataclass
class Prototypes:
    """One row to a class, in ascending order of the classes; T mapped tasks, numbered from 1.

    Attributes:
        vectors: p_c^(i) (classes, d) float64: the mean feature of class c under the merged adapter of its task i.
            Stored once, never changed.
        classes, tasks, counts: (classes,) int64: the class, its task, and its examples.
        shifts: Delta_{i,t} (T, d) float64, of task i in row i - 1; zero for the newest task.
        plain: mean features without any adapter (classes, d), where they were asked for.
        records: for each task, what it was made from.
    """

    vectors: Tensor = field(default_factory=lambda: _none(0, 0))
    classes: Tensor = field(default_factory=lambda: _none(0, dtype=torch.int64))
    tasks: Tensor = field(default_factory=lambda: _none(0, dtype=torch.int64))
    counts: Tensor = field(default_factory=lambda: _none(0, dtype=torch.int64))
    shifts: Tensor = field(default_factory=lambda: _none(0, 0))
    plain: Tensor | None = None
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def dimension(self) -> int:
        """d."""
        return self.vectors.shape[1]

    def mapped(self) -> Tensor:
        """p~_c = p_c^(i) + Delta_{i,t}, (classes, d) float64 (section 3 of the paper; always from the original)."""
        return self.vectors + self.shifts[self.tasks - 1]

    def table(self, *, mapped: bool = True, plain: bool = False, where: str = "") -> Tensor:
        """The vectors that features are compared with; with ``plain`` (classes, 2 d), both halves as they are.

        Raises:
            InputError: no task has been mapped, or features without an adapter were not kept.
        """
        if not self.records:
            raise InputError("the state has no prototypes yet", where=where, hint="`pxmerge acmap map` adds a task's")
        vectors = self.mapped() if mapped else self.vectors
        if not plain:
            return vectors
        if self.plain is None:
            raise InputError(
                "the prototypes have no part without an adapter", where=where, hint="map the tasks with --concatenate"
            )
        return torch.cat([vectors, self.plain], 1)

    def task_of(self, classes: Tensor) -> Tensor:
        """The task of each class, 0 for classes that are not in the table."""
        places = torch.searchsorted(self.classes, classes).clamp(max=max(len(self.classes) - 1, 0))
        return torch.where(self.classes[places] == classes, self.tasks[places], 0)

    def require_new(self, classes: Tensor, where: str) -> None:
        """Raise ``InputError`` for classes that belong to an earlier task."""
        if not len(self.classes):
            return
        owners = self.task_of(classes)
        if bool((owners > 0).any()):
            place = int((owners > 0).nonzero()[0])
            raise InputError(
                f"class {int(classes[place])} belongs to task {int(owners[place])} already",
                where=where,
                hint="a class belongs to one task; number the classes of all tasks apart",
            )

    def add(
        self,
        classes: Tensor,
        counts: Tensor,
        means: Tensor,
        earlier: Mapping[int, Tensor] | None,
        plain: Tensor | None,
        record: dict[str, Any],
    ) -> None:
        """Add the next task t, and compute the translations of all before it anew.

        ``Delta_{i,t} = mu(A_t) - mu(A_i)``, with mu the mean of the class means of task t.

        Args:
            classes, counts: (c,) int64.
            means: class means (c, d) under the merged adapter of task t.
            earlier: class means (c, d) under the merged adapter of each task i < t. None after the stop, where the
                merged adapter is that of before: the translations stay.
            plain: class means without any adapter.
        """
        task, width = len(self.records) + 1, means.shape[1]
        shifts = _none(task, width)
        if earlier is None:
            shifts[: task - 1] = self.shifts
        else:
            centre = means.mean(0)
            for number, others in earlier.items():
                shifts[number - 1] = centre - others.mean(0)
        joined = torch.cat([self.classes, classes])
        order = joined.argsort()
        self.plain = None if plain is None else torch.cat([_rows(self.plain, plain.shape[1]), plain])[order]
        self.vectors = torch.cat([_rows(self.vectors, width), means])[order]
        self.classes = joined[order]
        self.tasks = torch.cat([self.tasks, torch.full_like(classes, task)])[order]
        self.counts = torch.cat([self.counts, counts])[order]
        self.shifts = shifts
        self.records = [*self.records, record]

    # --- in a state ----------------------------------------------------------------------------------

    @classmethod
    def of(cls, stored: StoredState) -> Prototypes:
        """The table of a state, empty before the first mapping. Raises MalformedCheckpointError."""
        records = stored.state.mapping.get("tasks", []) if isinstance(stored.state.mapping, dict) else None
        tensors = stored.prototypes()
        if not records and not tensors:
            return cls()
        problem = _problem(records, tensors)
        if problem is not None:
            raise MalformedCheckpointError(f"the prototypes {problem}", where=stored.where)
        vectors, classes, tasks, counts = (tensors[name] for name in _ARRAYS)
        return cls(vectors, classes, tasks, counts, tensors[_SHIFTS], tensors.get(_PLAIN), list(records or []))

    def save(self, stored: StoredState) -> StoredState:
        """Write the table into a state. Raises WriteError."""
        arrays = (self.vectors, self.classes, self.tasks, self.counts)
        tensors = dict(zip(_ARRAYS, arrays, strict=True)) | {_SHIFTS: self.shifts}
        if self.plain is not None:
            tensors[_PLAIN] = self.plain
        return stored.with_prototypes(tensors, {"tasks": self.records})


def _rows(tensor: Tensor | None, width: int) -> Tensor:
    return _none(0, width) if tensor is None or not len(tensor) else tensor


def _problem(records: Any, tensors: Mapping[str, Tensor]) -> str | None:
    """What contradicts what in a table that was read."""
    wanted = _ARRAYS | {_SHIFTS: torch.float64}
    if missing := sorted(set(wanted) - set(tensors)):
        return f"lack {', '.join(missing)}"
    if any(tensors[name].dtype != dtype for name, dtype in wanted.items()):
        return "are of other types"
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        return "have no record of their tasks"
    vectors, classes, tasks = tensors["vectors"], tensors["class"], tensors["task"]
    rows = classes.shape
    if vectors.ndim != 2 or any(len(tensors[name]) != len(vectors) for name in _ARRAYS) or len(rows) != 1:
        return "are of different lengths"
    if tensors[_SHIFTS].shape != (len(records), vectors.shape[1]):
        return f"are of {len(records)} tasks, the translations are {list(tensors[_SHIFTS].shape)}"
    if _PLAIN in tensors and len(tensors[_PLAIN]) != len(vectors):
        return "are of different lengths"
    if not len(vectors) or bool((classes[1:] <= classes[:-1]).any()):
        return "have a class twice, or none"
    if not bool(((tasks >= 1) & (tasks <= len(records))).all()):
        return "have a class of a task that was never mapped"
    return None
