"""The adapters of a run: what gives to what, the transfers, and how the adapters learn from them.

The update is that of MergeNet (arXiv 2404.13322), eq. 5, which is that of pFedHN (arXiv 2103.04628): with A~ what the
adapter gave and A' what the target's step made of it, phi learns by AdamW on (dA~/dphi)' (A~ - A'). If the target's
step is plain gradient descent, A~ - A' = lr dL/dA~, so this is the gradient of the loss through the new factor, times
lr. ``exact`` uses dL/dA~ itself, whatever the optimiser. The opposite sign would be ascent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_px.learn.data import derived_seed
from mergekit_px.learn.training import take_step
from mergekit_px.learn.transfer.adapter import AdapterStack, Shape, both_ways
from mergekit_px.learn.transfer.factors import Factors
from mergekit_px.learn.transfer.plan import Adapter


@dataclass(frozen=True)
class Link:
    """One direction of a pair: ``giver`` is a factor that lives (its model may learn) or a fixed matrix."""

    receiver: Factors
    giver: Factors | Tensor
    label: str

    @property
    def given(self) -> Tensor:
        """The giver's matrix as it is now, (r_l, M), cut from any graph."""
        return self.giver.address.detach() if isinstance(self.giver, Factors) else self.giver


@dataclass(frozen=True)
class _Made:
    """A new factor in its graph, and the one who got it."""

    receiver: Factors
    address: Tensor


class Exchange:
    """All adapters of one run, their optimiser, and the transfers.

    Args:
        links: the directions.
        mutual: whether links come in pairs, forth and back, that are computed together.
        settings: of the adapter, with no value left open.
        transfers: how many are planned, for the schedule.
        exact: learn from the gradient of the new factor instead of its change.
        seed: of the adapters' parameters.
    """

    def __init__(
        self, links: Sequence[Link], *, mutual: bool, settings: Adapter, transfers: int, exact: bool, seed: int
    ) -> None:
        self.links = tuple(links)
        self._mutual = mutual
        self._settings = settings
        self._planned = transfers
        self._exact = exact
        self.done = 0
        """Number of transfers so far."""
        self.stacks = [_stack(link, settings, seed) for link in self.links]
        self._made: list[_Made] = []
        # In the order of the labels, so that which model is called the target makes no difference to any sum.
        ordered = sorted(zip(self.links, self.stacks, strict=True), key=lambda pair: pair[0].label)
        self.parameters = [
            parameter for _, stack in ordered for parameter in stack.parameters() if parameter.requires_grad
        ]
        groups: list[dict[str, Any]] = [
            {"params": [one for one in self.parameters if one.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [one for one in self.parameters if one.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr or 0.0, foreach=True)

    def transfer(self) -> None:
        """Make all new factors from the present ones, then write them: no side sees another's new value."""
        self._made = [_Made(link.receiver, made) for link, made in zip(self.links, self._compute(), strict=True)]
        with torch.no_grad():
            for made in self._made:
                made.receiver.address.copy_(made.address)
                made.receiver.write()
        self.done += 1

    def _compute(self) -> list[Tensor]:
        inputs = [(link.receiver.address.detach(), link.given) for link in self.links]
        if not self._mutual:
            return [stack(*pair) for stack, pair in zip(self.stacks, inputs, strict=True)]
        outputs: list[Tensor] = []
        for forth, back, (target, source) in zip(self.stacks[::2], self.stacks[1::2], inputs[::2], strict=True):
            outputs.extend(both_ways(forth, back, target, source))
        return outputs

    def cotangents(self) -> list[Tensor]:
        """What the last transfer's new factors have turned out to need: A~ - A', or dL/dA~, one for each link."""
        if self._exact:
            return [_gradient(made.receiver) for made in self._made]
        return [(made.address - made.receiver.address).detach() for made in self._made]

    def gradients(self) -> list[Tensor]:
        """(dA~/dphi)' times the cotangents, for each of ``parameters``; zero where nothing depends on one."""
        found = torch.autograd.grad(
            [made.address for made in self._made],
            self.parameters,
            grad_outputs=self.cotangents(),
            allow_unused=True,
            materialize_grads=True,
        )
        return list(found)

    def learn(self) -> None:
        """One step of the adapters from what the models' steps made of the last transfer."""
        for parameter, gradient in zip(self.parameters, self.gradients(), strict=True):
            parameter.grad = gradient
        self._made = []
        nn.utils.clip_grad_norm_(self.parameters, self._settings.clip)
        lr = self._settings.lr or 0.0
        if self._settings.schedule == "cosine":
            lr *= 0.5 * (1 + math.cos(math.pi * (self.done - 1) / max(1, self._planned)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        take_step(self.optimizer, f"for the adapters at transfer {self.done}")
        self.optimizer.zero_grad()


def _stack(link: Link, settings: Adapter, seed: int) -> AdapterStack:
    receiver, giver = link.receiver.address, link.given
    stack = AdapterStack(_shape(receiver), _shape(giver), settings, seed=seed, label=link.label)
    return stack.to(receiver.device, receiver.dtype)


def _shape(matrix: Tensor) -> Shape:
    return matrix.shape[0], matrix.shape[1]


def _gradient(factors: Factors) -> Tensor:
    gradient = factors.address.grad
    return torch.zeros_like(factors.address) if gradient is None else gradient.detach()


def sham_matrix(like: Tensor, seed: int, label: str) -> Tensor:
    """A fixed random matrix of the shape and root mean square of ``like``: a source that knows nothing."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "sham", label))
    drawn = torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
    return drawn * (like.square().mean().sqrt() / drawn.square().mean().sqrt())


def planned_transfers(steps: int, cycle: int, stop: int) -> int:
    """How many steps t below ``stop`` (and ``steps``) are multiples of ``cycle``."""
    return -(-min(steps, stop) // cycle)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether there is no NaN and no infinity in any."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())
