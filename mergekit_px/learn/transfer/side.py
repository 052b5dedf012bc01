"""One model that learns: its data, loss, optimiser, and the tensors of it that are kept as factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.errors import DivergedError, InputError, PlanError
from mergekit_px.learn.data import (
    COUNTED,
    LABELS,
    Batch,
    BatchStream,
    Examples,
    derived_seed,
    require_arguments,
    require_classes,
    seeded,
    shuffled,
    split_rows,
    to_device,
)
from mergekit_px.learn.data_files import load_data
from mergekit_px.learn.labels import Reading, find_reading
from mergekit_px.learn.models import LearningModel
from mergekit_px.learn.objective import Loss, Metric, loss_function, metric_function
from mergekit_px.learn.text_data import TextOptions
from mergekit_px.learn.training import take_step
from mergekit_px.learn.transfer.exchange import all_finite
from mergekit_px.learn.transfer.factors import Factors
from mergekit_px.learn.transfer.plan import Data, Model
from mergekit_px.user_code import user_function

PARTS = ("train", "validation", "test")
DIGITS = "digits"


@dataclass(frozen=True)
class SideData:
    """The data of one model in one repetition: endless training batches, and what is held out."""

    train: BatchStream
    held_out: Mapping[str, Callable[[], Iterator[Batch]]]
    where: str
    labels: Tensor | None = None
    """All labels, where the data came from a file."""


def side_data(
    data: Data,
    name: str,
    batch: int,
    seed: int,
    *,
    allow_code: bool,
    files: dict[tuple[str, str], Examples],
    model: Checkpoint | None = None,
) -> SideData:
    """The parts of a model's data, split and ordered by the seed.

    Args:
        files: examples already read, by the name of the model and the path; added to.
        model: whose tokenizer or image processor is used.

    Raises:
        InputError, UsageError: as `mergekit_px.learn.data` does.
    """
    if ":" in data.train and data.train.rpartition(":")[0].endswith(".py"):
        return _user_data(data.train, name, seed, allow_code=allow_code)

    def read(path: str) -> Examples:
        if (name, path) not in files:
            files[name, path] = _examples(path, data, model)
        return files[name, path]

    found = {"train": read(data.train)}
    shares: dict[str, float] = {}
    for part in PARTS[1:]:
        given = getattr(data, part)
        if isinstance(given, str):
            found[part] = read(given)
        else:
            shares[part] = given
    whole = found["train"]
    labels = torch.cat([one.arrays[LABELS].flatten() for one in found.values()])
    rows = split_rows(len(whole), shares, seed, data.train)
    if data.limit is not None:
        rows["train"] = rows["train"][: data.limit]
    found.update({part: whole.take(numbers) for part, numbers in rows.items()})
    held_out = {part: _held_out(found[part], batch) for part in PARTS[1:]}
    return SideData(shuffled(found["train"], batch, seed, name), held_out, data.train, labels)


def _held_out(examples: Examples, batch: int) -> Callable[[], Iterator[Batch]]:
    return lambda: examples.batches(4 * batch)


def _examples(path: str, data: Data, model: Checkpoint | None) -> Examples:
    if path == DIGITS:
        from mergekit_px.learn.transfer.digits import digits

        return digits()
    return load_data(path, model, TextOptions(tuple(data.columns.items()), data.max_length, data.tokenizer))


def _user_data(place: str, name: str, seed: int, *, allow_code: bool) -> SideData:
    function = user_function(place, allow_code=allow_code)
    data_seed = derived_seed(seed, "data", name)

    def part(which: str, epoch: int) -> Iterator[Batch]:
        for batch in function(which, data_seed, epoch):
            if not isinstance(batch, Mapping) or not all(isinstance(array, Tensor) for array in batch.values()):
                raise InputError("a batch is a mapping from names to tensors", where=place)
            if LABELS not in batch:
                raise InputError(f"a batch has no {LABELS!r}, it has {', '.join(sorted(batch))}", where=place)
            yield dict(batch)

    held_out = {which: _part_of(part, which) for which in PARTS[1:]}
    return SideData(BatchStream(lambda epoch: part("train", epoch), place), held_out, place)


def _part_of(part: Callable[[str, int], Iterator[Batch]], which: str) -> Callable[[], Iterator[Batch]]:
    return lambda: part(which, 0)


class Side:
    """A model in training.

    Args:
        name: of the model in the plan; its random numbers depend on it and not on its role.
        model: freshly loaded.
        settings: with no value left open.
        data: of this repetition.
        steps: of the whole run, for the schedule.
        seed: of the repetition.
    """

    def __init__(
        self,
        name: str,
        model: LearningModel,
        settings: Model,
        data: SideData,
        *,
        steps: int,
        seed: int,
        device: torch.device,
        allow_code: bool,
    ) -> None:
        self.name = name
        self.model = model
        self.module = model.module.to(device)
        self.factors: dict[str, Factors] = {}
        self._settings = settings
        self._data = data
        self._steps = steps
        self._seed = seed
        self._device = device
        self._allow_code = allow_code
        self._reading: Reading | None = None
        self.loss: Loss = loss_function(settings.loss, allow_code=allow_code)
        self.metric: Metric = metric_function(settings.metric, self.loss, allow_code=allow_code)
        self.optimizer: torch.optim.Optimizer | None = None
        self._parameters: list[nn.Parameter] = []
        self._dtype = next((one.dtype for one in self.module.parameters() if one.is_floating_point()), torch.float32)
        self.last_loss = math.nan

    def add_factors(self, tensor: str, rank: int | None, *, residual: bool, where: str) -> Factors:
        """The factors of one tensor, made on the first call for it.

        Raises:
            PlanError: it is no parameter that learns.
        """
        if tensor not in self.factors:
            weight = self.model.tensor(tensor)
            if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
                raise PlanError(f"'{tensor}' of '{self.name}' is no parameter that learns", where=where)
            for other, factors in self.factors.items():
                if factors.weight is weight:
                    raise PlanError(f"'{tensor}' and '{other}' of '{self.name}' are one tied tensor", where=where)
            label = f"{self.name}/{tensor}"
            self.factors[tensor] = Factors(weight, rank, residual=residual, label=label, seed=self._seed)
        return self.factors[tensor]

    def prepare(self) -> None:
        """Check model and data against each other, and make the optimiser. Call once, after `add_factors`.

        Raises:
            InputError: arrays or labels that do not fit the model.
        """
        reads_logits = ":" not in self._settings.loss or ":" not in self._settings.metric
        batch = next(iter(self._data.held_out["validation"]()), None)
        if batch is None:
            raise InputError("the validation data has no batches", where=self._data.where)
        if reads_logits:
            self._read_labels(batch)
        else:
            require_arguments(self.module, batch, self._data.where)
        kept = {id(factors.weight) for factors in self.factors.values()}
        parameters = [one for one in self.module.parameters() if one.requires_grad and id(one) not in kept]
        parameters += [one for factors in self.factors.values() for one in factors.parameters]
        self._parameters = parameters
        options = self._settings.optimizer
        lr, decay = options.lr or 0.0, options.weight_decay or 0.0
        if options.name == "sgd":
            self.optimizer = torch.optim.SGD(parameters, lr=lr, weight_decay=decay, momentum=options.momentum)
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)

    def learn(self, step: int) -> float:
        """One step on the next batch; returns the loss.

        Raises:
            DivergedError: the loss is not finite.
            PlanError: it gives a paired tensor no gradient.
        """
        assert self.optimizer is not None
        self.module.train()
        self.module.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)
        batch = self._moved(self._data.train.next())
        with self._own_random_numbers("step", step):
            loss = self.loss(self.module, batch)
            if not bool(torch.isfinite(loss)):
                raise DivergedError(f"the loss of '{self.name}' is not finite at step {step}")
            if loss.requires_grad:
                loss.backward()
        for tensor, factors in self.factors.items():
            if not factors.take_gradient():
                raise PlanError(
                    f"the loss of '{self.name}' gives '{tensor}' no gradient",
                    hint="pair a tensor that the loss depends on, or, for a source, write mode: frozen",
                )
        if self._settings.optimizer.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._settings.optimizer.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(step)
        take_step(self.optimizer, f"for '{self.name}' at step {step}")
        for factors in self.factors.values():
            factors.write()
        self.last_loss = float(loss.detach())
        return self.last_loss

    def score(self, part: str) -> float:
        """The metric on ``validation`` or ``test``. Raises ``DivergedError`` if that is no finite number."""
        self.module.eval()
        with torch.no_grad(), self._own_random_numbers("score", part):
            score = self.metric(self.module, (self._moved(batch) for batch in self._data.held_out[part]()))
        if not math.isfinite(score):
            raise DivergedError(f"the {self._settings.metric} of '{self.name}' on {part} data is {score}")
        return score

    def is_finite(self) -> bool:
        """Whether the model holds no NaN and no infinity."""
        return all_finite(self.module.state_dict().values())

    @property
    def place(self) -> tuple[int, int]:
        """Where in its data it is."""
        return self._data.train.place

    def seek(self, place: tuple[int, int]) -> None:
        """Go on at a place in its data."""
        self._data.train.seek(place)

    def _lr(self, step: int) -> float:
        lr = self._settings.optimizer.lr or 0.0
        if self._settings.optimizer.schedule == "cosine":
            return lr * 0.5 * (1 + math.cos(math.pi * step / self._steps))
        return lr

    def _read_labels(self, batch: Batch) -> None:
        """Settle what labels belong to, and with that the losses."""
        settings, data = self._settings, self._data
        reading = find_reading(self.module, batch, data.where, self._device, self._dtype)
        if reading.classes is not None and data.labels is not None:
            require_classes(data.labels, reading.classes, data.where)
        if data.labels is not None:
            self._require_targets(reading)
        self._reading = reading
        self.loss = loss_function(settings.loss, allow_code=self._allow_code, own_loss=reading.own_loss)
        self.metric = metric_function(settings.metric, self.loss, allow_code=self._allow_code)

    def _require_targets(self, reading: Reading) -> None:
        """Raise ``InputError`` where nothing of what is held out has a label that counts."""
        for part, batches in self._data.held_out.items():
            if not any(bool(reading.of(batch)[COUNTED].any()) for batch in batches()):
                what = f"no prediction of the {part} data has a label: all are padding, prompt or -100"
                raise InputError(what, where=self._data.where)

    def _moved(self, batch: Mapping[str, Tensor]) -> Batch:
        moved = to_device(batch, self._device, self._dtype)
        return moved if self._reading is None else self._reading.of(moved)

    def _own_random_numbers(self, *purpose: object) -> AbstractContextManager[None]:
        """Dropout and the like draw from (seed, model, purpose): the same with a transfer and without, and the same
        after a run was resumed."""
        return seeded(self._device, derived_seed(self._seed, self.name, *purpose))
