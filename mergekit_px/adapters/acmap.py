"""ACMap's adapter merging (CVPR 2025, arXiv 2412.18219): the running mean of the adapters of a sequence of tasks.

``A_t = (1 - 1/t) A_{t-1} + (1/t) w_t``, for any adapter checkpoint whose tensors have the same names and shapes for
every task: bottleneck adapters of a vision transformer as in the paper, or others. (Of a LoRA it is the mean of the
factors, which is not the mean of the updates.) After L adapters the merged one is frozen.

Modes:

=================  ==========================================================================================
``average``        the mean
``trim``           entry by entry the mean over the adapters in which the entry is among the largest of its tensor
``trim_published`` the recursion of the authors' code: a dropped entry keeps ``A_{t-1}``, a kept one becomes
                   ``((t - 1) A_{t-1} + w_t) / t``; the first adapter is trimmed over all its tensors together
``aper``           the first adapter
``none``           the newest adapter
=================  ==========================================================================================

Sums are kept as pairs of float64 numbers whose sum is exact for float32 adapters of ordinary range, so ``average``
and ``trim`` do not depend on the order of the adapters, nor on whether the work was interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mergekit_px.adapters import acmap_file
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.whole import read_tensors
from mergekit_px.errors import MalformedCheckpointError, TensorMismatchError, UsageError

if TYPE_CHECKING:
    import torch

Mode = Literal["average", "trim", "trim_published", "aper", "none"]

DEFAULT_LIMIT = 10
"""L of the paper."""


@dataclass(frozen=True)
class Task:
    """One adapter that was given: its label, and whether it was merged or came after the stop."""

    label: str
    merged: bool


@dataclass
class AcmapState:
    """The merged adapter so far, and all that is needed to go on with the next task.

    Attributes:
        limit: L; later adapters change nothing. 0 for no stop.
        trim_rate: share of the entries, the smallest in magnitude, that the trim modes drop.
        keep_past: remember every merged adapter up to the stop, as the mapping of prototypes needs.
        tasks: the adapters given so far.
        past: the merged adapter after each task that changed it, by task number from 1.
        config: the configuration of the first adapter, if it is a PEFT adapter.
        prototypes, mapping: the table of class prototypes, and how it was made; empty before the first mapping.
    """

    mode: Mode = "average"
    limit: int = DEFAULT_LIMIT
    trim_rate: float = 0.0
    keep_past: bool = True
    tasks: list[Task] = field(default_factory=list)
    past: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    prototypes: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    mapping: dict[str, Any] = field(default_factory=dict)
    _high: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    _low: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    _kept: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    _first: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    _fixed: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise UsageError(f"unknown mode '{self.mode}'", hint=f"known are {', '.join(get_args(Mode))}")
        if self.limit < 0:
            raise UsageError(f"the stop must not be negative, got {self.limit}")
        if not 0 <= self.trim_rate < 1:
            raise UsageError(f"the trim rate must be at least 0 and below 1, got {self.trim_rate}")

    @property
    def count(self) -> int:
        """Adapters merged so far."""
        return sum(task.merged for task in self.tasks)

    @property
    def first(self) -> Mapping[str, torch.Tensor]:
        """The first task's adapter, from which every later task starts its training."""
        return self._first | self._fixed

    def add(self, adapter: Mapping[str, torch.Tensor], label: str) -> bool:
        """Merge the adapter of the next task; False where it comes after the stop.

        Raises TensorMismatchError where names, shapes or the values of integer tensors differ from the first one's.
        """
        if self.limit and self.count >= self.limit:
            self._check(adapter, label)
            self.tasks.append(Task(label, False))
            return False
        if not self._first:
            self._begin(adapter)
        self._check(adapter, label)
        for name, tensor in adapter.items():
            if name not in self._fixed:
                self._merge(name, tensor)
        self.tasks.append(Task(label, True))
        if self.keep_past:
            self.past[self.count] = self.merged()
        return True

    def merged(self) -> dict[str, torch.Tensor]:
        """The merged adapter in the dtypes of the first one, rounded once. Raises UsageError before the first."""
        if not self._first:
            raise UsageError("no adapter has been merged yet")
        result = dict(self._fixed)
        for name, first in self._first.items():
            total = self._high[name] + self._low[name]
            result[name] = self.quotient(total, self._kept.get(name)).to(first.dtype)
        return {name: result[name] for name in sorted(result)}

    def quotient(self, total: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """The merged tensor of the sum of what was merged. ``kept``: how many adapters kept each entry (``trim``)."""
        if self.mode == "average":
            return total / self.count
        return total if kept is None else total / kept.clamp(min=1)

    def _begin(self, adapter: Mapping[str, torch.Tensor]) -> None:
        import torch

        for name, tensor in adapter.items():
            if not tensor.is_floating_point():
                self._fixed[name] = tensor.clone()
                continue
            self._first[name] = tensor.clone()
            self._high[name] = torch.zeros(tensor.shape, dtype=torch.float64)
            self._low[name] = torch.zeros(tensor.shape, dtype=torch.float64)
            if self.mode == "trim":
                self._kept[name] = torch.zeros(tensor.shape, dtype=torch.int32)
        if not self._first:
            raise TensorMismatchError("the adapter holds no floating-point tensor")

    def _merge(self, name: str, tensor: torch.Tensor) -> None:
        import torch

        high, low, value, task = self._high[name], self._low[name], tensor.double(), self.count + 1
        if self.mode == "average":
            self._high[name], self._low[name] = _exact_sum(high, low, value)
        elif self.mode == "trim":
            kept = value.abs() >= _cut([tensor], self.trim_rate)
            self._high[name], self._low[name] = _exact_sum(high, low, value * kept)
            self._kept[name] += kept
        elif self.mode == "trim_published":
            seen = list(self._first.values()) if task == 1 else [tensor]
            kept = value.abs() >= _cut(seen, self.trim_rate)
            grown = (high * (task - 1) + value) / task
            self._high[name] = torch.where(kept, grown, high)
        elif self.mode == "none" or task == 1:
            self._high[name] = value

    def _check(self, adapter: Mapping[str, torch.Tensor], label: str) -> None:
        known = self.first
        for name in sorted(set(known) ^ set(adapter)):
            where = "is missing" if name in known else "is not in the first adapter"
            raise TensorMismatchError(f"{shown(name)} {where}", where=label)
        for name, tensor in adapter.items():
            if known[name].shape != tensor.shape:
                raise TensorMismatchError(
                    f"{shown(name)} is {list(tensor.shape)}, in the first adapter {list(known[name].shape)}",
                    where=label,
                )
            if name in self._fixed and not bool((known[name] == tensor).all()):
                raise TensorMismatchError(f"{shown(name)} holds integers other than the first adapter's", where=label)

    # --- the state file ----------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the state; the file appears complete or not at all. Raises WriteError."""
        groups = {"high": self._high, "low": self._low, "kept": self._kept, "first": self._first, "fixed": self._fixed}
        groups |= {acmap_file.past_group(number): tensors for number, tensors in self.past.items()}
        groups[acmap_file.PROTOTYPES] = self.prototypes
        tensors = {acmap_file.key(group, name): one for group, named in groups.items() for name, one in named.items()}
        acmap_file.write_state(path, tensors, self.settings())

    def settings(self) -> dict[str, Any]:
        """All that is no tensor, for JSON."""
        return {
            "mode": self.mode,
            "limit": self.limit,
            "trim_rate": self.trim_rate,
            "keep_past": self.keep_past,
            "tasks": [[task.label, task.merged] for task in self.tasks],
            "config": self.config,
            "mapping": self.mapping,
        }

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any], where: str) -> AcmapState:
        """A state without its tensors. Raises MalformedCheckpointError."""
        try:
            given = dict(settings)
            tasks = [Task(str(label), bool(merged)) for label, merged in given.pop("tasks")]
            return cls(**given, tasks=tasks)
        except (TypeError, ValueError, KeyError, UsageError) as error:
            raise MalformedCheckpointError(f"the settings cannot be read: {error}", where=where) from None

    @classmethod
    def load(cls, path: Path) -> AcmapState:
        """Read a state file. Raises InputNotFoundError, MalformedCheckpointError."""
        checkpoint = open_checkpoint(path)
        where = str(path)
        state = cls.of_settings(acmap_file.read_settings(checkpoint, where), where)
        groups = {"high": state._high, "low": state._low, "kept": state._kept}
        groups |= {"first": state._first, "fixed": state._fixed, acmap_file.PROTOTYPES: state.prototypes}
        for key, tensor in read_tensors(checkpoint).items():
            group, _, name = key.partition(":")
            number = acmap_file.past_number(group)
            if group not in groups and number is None:
                raise MalformedCheckpointError(f"{shown(key)} has no place in a state", where=where)
            target = groups[group] if number is None else state.past.setdefault(number, {})
            target[name] = tensor
        shapes = {name: tensor.shape for name, tensor in state._first.items()}
        needed = [state._high, state._low, *([state._kept] if state.mode == "trim" else []), *state.past.values()]
        for named in needed:
            if shapes != {name: tensor.shape for name, tensor in named.items() if name not in state._fixed}:
                raise MalformedCheckpointError("the sums do not fit the first adapter", where=where)
        return state


def _cut(tensors: Sequence[torch.Tensor], rate: float) -> float:
    """The magnitude from which on entries are kept: that of place ``rate * n`` in ascending order."""
    import torch

    magnitudes = torch.cat([tensor.double().abs().flatten() for tensor in tensors])
    place = min(int(rate * len(magnitudes)), len(magnitudes) - 1)
    return float(magnitudes.kthvalue(place + 1).values) if len(magnitudes) else 0.0


def _exact_sum(high: torch.Tensor, low: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Add to an unevaluated sum of two float64 numbers (Knuth's two-sum, renormalised)."""
    total = high + value
    shadow = total - high
    error = (high - (total - shadow)) + (value - shadow)
    low = low + error
    renormalised = total + low
    return renormalised, low - (renormalised - total)
