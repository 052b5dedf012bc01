"""One training run of a transfer: with it, without it, or with a sham source, under one seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.whole import read_tensors
from mergekit_px.errors import DivergedError, PlanError
from mergekit_px.learn.data import Examples, derived_seed, seeded
from mergekit_px.learn.models import LearningModel, load_model
from mergekit_px.learn.state import Tensors, load_state, save_state, under
from mergekit_px.learn.transfer.adapter import AdapterStack
from mergekit_px.learn.transfer.digits import BUILT_IN_MODELS
from mergekit_px.learn.transfer.exchange import Exchange, Link, all_finite, planned_transfers, sham_matrix
from mergekit_px.learn.transfer.factors import Factors
from mergekit_px.learn.transfer.plan import Control, Model, Pair, Transfer
from mergekit_px.learn.transfer.ranks import chosen_rank, matrix_shape, pair_ranks
from mergekit_px.learn.transfer.side import Side, side_data
from mergekit_px.learn.transfer.state import (
    exchange_state,
    module_state,
    restore_exchange,
    restore_module,
    restore_side,
    side_state,
)
from mergekit_px.located.nearest import hint_for

Kind = Literal["transfer"] | Control

TRACE_POINTS = 50
DEFAULT_LOOKS = 10
SAVE_SECONDS = 2.0
"""Where the plan does not say when to save, states are saved so far apart at least."""


@dataclass(frozen=True)
class Entrant:
    """A model of the plan in its role, with no setting left open, and the checkpoint that it begins from."""

    name: str
    settings: Model
    checkpoint: Checkpoint | None


@dataclass(frozen=True)
class Trial:
    """One transfer of the plan, ready to be run under any seed."""

    name: str
    transfer: Transfer
    target: Entrant
    source: Entrant
    """The target again in mode ``self``."""
    plan_hash: str
    device: torch.device
    allow_code: bool
    where: Callable[..., str]
    """The place of a key path of the plan."""
    files: dict[tuple[str, str], Examples]
    """Examples already read, by path."""


@dataclass(frozen=True)
class ArmResult:
    """What came of a run.

    Attributes:
        scores: role -> part of the data -> metric.
        transfers: how many there were.
        selected: the step after which the kept weights were.
        trace: (step, loss of the target), at most fifty of them.
    """

    scores: dict[str, dict[str, float]]
    transfers: int
    selected: int
    trace: list[tuple[int, float]]

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass
class _Progress:
    """What a run knows besides its tensors."""

    step: int = 0
    trace: list[tuple[int, float]] = field(default_factory=list)
    best: float | None = None
    best_step: int = 0


class Arm:
    """A run that can be stopped and taken up.

    Raises:
        PlanError: pairs that name no tensor, ranks that no matrix has.
        InputError, UsageError: models or data that cannot be had or do not fit.
    """

    def __init__(self, trial: Trial, kind: Kind, seed: int) -> None:
        self.trial = trial
        self.kind = kind
        self._seed = seed
        self._stop = math.ceil(Fraction(str(trial.transfer.stop_at)) * trial.transfer.steps)
        self.target = self._side(trial.target)
        mode = trial.transfer.mode
        needs_source = mode == "mutual" or (mode == "joint" and kind == "transfer")
        self.source = self._side(trial.source) if needs_source else None
        self.exchange = self._exchange()
        self.sides = {"target": self.target}
        if self.source is not None:
            self.sides["source"] = self.source
        for side in self.sides.values():
            side.prepare()
        self._best: dict[str, Tensors] = {}
        self._progress = _Progress()

    def run(self, state: Path, tell: Callable[[int, float], None] = lambda step, loss: None) -> ArmResult:
        """Train to the end, from the saved state if there is one.

        Args:
            tell: gets the number of steps done, and the loss, whenever the state is saved.

        Raises:
            DivergedError: something is not finite any more; the last state that was saved is good.
        """
        transfer = self.trial.transfer
        every = transfer.save_every or max(1, transfer.steps // DEFAULT_LOOKS)
        saved = time.monotonic()
        if state.exists():
            self.restore(state)
        for step in range(self._progress.step, transfer.steps):
            self._step(step)
            self._progress.step = step + 1
            if (step + 1) % every == 0 or step + 1 == transfer.steps:
                self._look()
                if step + 1 < transfer.steps and (transfer.save_every or time.monotonic() - saved >= SAVE_SECONDS):
                    self._save(state)
                    saved = time.monotonic()
                    tell(step + 1, self.target.last_loss)
        if transfer.select == "best":
            for role, side in self.sides.items():
                restore_module(side.module, self._best[role])
        scores = {
            role: {part: side.score(part) for part in ("validation", "test")} for role, side in self.sides.items()
        }
        selected = self._progress.best_step if transfer.select == "best" else transfer.steps
        done = self.exchange.done if self.exchange is not None else 0
        return ArmResult(scores, done, selected, self._progress.trace)

    def restore(self, path: Path) -> None:
        """Take up a saved state.

        Raises:
            InputError: it cannot be read.
            OutputError: it is of another plan.
        """
        tensors, info = load_state(path, self.trial.plan_hash)
        for role, side in self.sides.items():
            restore_side(side, under(tensors, f"{role}."))
            side.seek(tuple(info["places"][role]))
            if best := under(tensors, f"best.{role}."):
                self._best[role] = best
        if self.exchange is not None:
            restore_exchange(self.exchange, under(tensors, "adapter."))
            self.exchange.done = info["transfers"]
        progress = dict(info["progress"])
        progress["trace"] = [(step, loss) for step, loss in progress["trace"]]
        self._progress = _Progress(**progress)

    @property
    def step(self) -> int:
        """Steps done."""
        return self._progress.step

    def _step(self, step: int) -> None:
        transfer = self.trial.transfer
        due = self.exchange is not None and step % (transfer.cycle or 1) == 0 and step < self._stop
        with self._located():
            if self.source is not None and transfer.mode == "joint":
                self.source.learn(step)
            if due and self.exchange is not None:
                self.exchange.transfer()
                if not all_finite(link.receiver.address for link in self.exchange.links):
                    raise DivergedError(f"a transferred factor is not finite at step {step}")
            if self.source is not None and transfer.mode == "mutual":
                self.source.learn(step)
            loss = self.target.learn(step)
            if due and self.exchange is not None:
                self.exchange.learn()
        if step % math.ceil(transfer.steps / TRACE_POINTS) == 0:
            self._progress.trace.append((step, loss))

    @contextmanager
    def _located(self) -> Iterator[None]:
        """Errors of the plan get their place in it."""
        try:
            yield
        except PlanError as error:
            if error.where is None:
                where = self.trial.where("transfers", self.trial.name, "pairs")
                raise PlanError(error.what, where=where, hint=error.hint) from None
            raise

    def _look(self) -> None:
        """Refuse what is not finite; with ``select: best``, keep the weights if they are the best so far."""
        for side in self.sides.values():
            if not side.is_finite():
                raise DivergedError(f"a weight of '{side.name}' is not finite at step {self._progress.step}")
        if self.trial.transfer.select != "best":
            return
        score = self.target.score("validation")
        better = max if self.trial.target.settings.goal == "max" else min
        if self._progress.best is None or (
            score != self._progress.best and better(score, self._progress.best) == score
        ):
            self._progress.best, self._progress.best_step = score, self._progress.step
            self._best = {
                role: {name: one.detach().clone() for name, one in module_state(side.module).items()}
                for role, side in self.sides.items()
            }

    def _save(self, path: Path) -> None:
        tensors: Tensors = {}
        for role, side in self.sides.items():
            tensors.update({f"{role}.{name}": one for name, one in side_state(side).items()})
        for role, best in self._best.items():
            tensors.update({f"best.{role}.{name}": one for name, one in best.items()})
        if self.exchange is not None:
            tensors.update({f"adapter.{name}": one for name, one in exchange_state(self.exchange).items()})
        info = {
            "plan_hash": self.trial.plan_hash,
            "places": {role: side.place for role, side in self.sides.items()},
            "transfers": self.exchange.done if self.exchange is not None else 0,
            "progress": asdict(self._progress),
        }
        save_state(path, tensors, info)

    def _side(self, entrant: Entrant) -> Side:
        settings = entrant.settings
        assert settings.data is not None and settings.batch is not None
        data = side_data(
            settings.data,
            entrant.name,
            settings.batch,
            self._seed,
            allow_code=self.trial.allow_code,
            files=self.trial.files,
            model=entrant.checkpoint,
        )
        return Side(
            entrant.name,
            fresh_model(entrant, self._seed, allow_code=self.trial.allow_code),
            settings,
            data,
            steps=self.trial.transfer.steps,
            seed=self._seed,
            device=self.trial.device,
            allow_code=self.trial.allow_code,
        )

    def _exchange(self) -> Exchange | None:
        """The adapters; the factors are made even where nothing is transferred, so that arms differ in that alone."""
        transfer = self.trial.transfer
        if self.kind == "dense":
            return None
        links = [link for number in range(len(transfer.pairs)) for link in self._links(number)]
        if self.kind == "none":
            return None
        return Exchange(
            links,
            mutual=transfer.mode == "mutual" and self.kind == "transfer",
            settings=transfer.adapter,
            transfers=planned_transfers(transfer.steps, transfer.cycle or 1, self._stop),
            exact=transfer.phi_grad == "exact",
            seed=self._seed,
        )

    def _links(self, number: int) -> list[Link]:
        """The directions of one pair."""
        trial, transfer = self.trial, self.trial.transfer
        pair = transfer.pairs[number]
        where = trial.where("transfers", trial.name, "pairs", number)
        receiver = self._factors(self.target, pair, "target", where)
        forth = f"{trial.target.name}/{pair.target} <- {trial.source.name}/{pair.source}"
        giver: Factors
        if transfer.mode == "self":
            giver = self._factors(self.target, pair, "source", where)
        elif self.source is not None:
            giver = self._factors(self.source, pair, "source", where)
        elif self.kind == "none":
            return []
        else:
            giver = self._untrained(pair, where)
        if self.kind == "sham":
            links = [Link(receiver, sham_matrix(giver.address.detach(), self._seed, forth), forth)]
        elif transfer.mode == "frozen":
            links = [Link(receiver, giver.address.detach(), forth)]
        else:
            links = [Link(receiver, giver, forth)]
        if transfer.mode == "mutual":
            back = f"{trial.source.name}/{pair.source} <- {trial.target.name}/{pair.target}"
            is_sham = self.kind == "sham"
            other = sham_matrix(receiver.address.detach(), self._seed, back) if is_sham else receiver
            links.append(Link(giver, other, back))
        # Sums of gradients are rounded in the order of the computation, which must not depend on the roles.
        return sorted(links, key=lambda link: link.label)

    def _factors(self, side: Side, pair: Pair, role: Literal["target", "source"], where: str) -> Factors:
        name = pair.target if role == "target" else pair.source
        tensor = named_tensor(side.model, name, side.name, where)
        asked = pair_ranks(pair, where)[0 if role == "target" else 1]
        rank = chosen_rank(asked, tuple(tensor.shape), where)
        return side.add_factors(name, rank, residual=self.trial.transfer.residual, where=where)

    def _untrained(self, pair: Pair, where: str) -> Factors:
        """The factors of a source tensor as it is at the start; the source itself is not kept."""
        source = self.trial.source
        if source.checkpoint is not None and pair.source in source.checkpoint.tensors:
            tensor = read_tensors(source.checkpoint, [pair.source])[pair.source]
        else:
            model = fresh_model(source, self._seed, allow_code=self.trial.allow_code)
            tensor = named_tensor(model, pair.source, source.name, where).detach()
        if not tensor.is_floating_point():
            raise PlanError(f"'{pair.source}' of '{source.name}' holds no real numbers", where=where)
        rank = chosen_rank(pair_ranks(pair, where)[1], tuple(tensor.shape), where)
        label = f"{source.name}/{pair.source}"
        return Factors(tensor.to(self.trial.device), rank, residual=True, label=label, seed=self._seed)


def stack_sizes(trial: Trial) -> Iterator[int]:
    """Parameters of each adapter, by the headers of both models; pairs that do not fit are refused elsewhere."""
    transfer = trial.transfer
    for number, pair in enumerate(transfer.pairs):
        where = trial.where("transfers", trial.name, "pairs", number)
        shapes = []
        for entrant, name, rank in zip(
            (trial.target, trial.source), (pair.target, pair.source), pair_ranks(pair, where), strict=True
        ):
            if entrant.checkpoint is None or name not in entrant.checkpoint.tensors:
                break
            shape = entrant.checkpoint.tensors[name].shape
            rows, columns = matrix_shape(shape)
            shapes.append((chosen_rank(rank, shape, where) or rows, columns))
        else:
            for receiver, giver in [shapes, shapes[::-1]][: 2 if transfer.mode == "mutual" else 1]:
                with torch.device("meta"):
                    stack = AdapterStack(receiver, giver, transfer.adapter, seed=0, label="")
                yield sum(one.numel() for one in stack.parameters())


def fresh_model(entrant: Entrant, seed: int, *, allow_code: bool) -> LearningModel:
    """The model as it is at the start: its checkpoint, or what its function makes under the seed."""
    factory = entrant.settings.model
    with seeded(torch.device("cpu"), derived_seed(seed, "init", entrant.name)):
        return load_model(entrant.checkpoint, BUILT_IN_MODELS.get(factory or "", factory), allow_code=allow_code)


def named_tensor(model: LearningModel, name: str, model_name: str, where: str) -> Tensor:
    """The parameter of that name.

    Raises:
        PlanError: there is none.
    """
    tensor = model.tensor(name)
    if tensor is None:
        if model.checkpoint is not None and name in model.checkpoint.tensors:
            what = f"the class of '{model_name}' keeps '{name}' in another form, so it cannot be paired"
            raise PlanError(what, where=where)
        raise PlanError(f"'{model_name}' has no tensor '{name}'", where=where, hint=hint_for(name, model.names))
    return tensor
