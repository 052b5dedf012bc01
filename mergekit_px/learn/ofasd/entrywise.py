"""AdamW whose entries may take their step one after another, each as soon as its own gradient is known."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw


class EntrywiseAdamW(torch.optim.AdamW):
    """AdamW on one array.

    Entries that advanced are taken back and step with the others where their gradient changed after that, as it does
    where it is clipped; so the result is that of a step of all entries together.
    """

    def __init__(self, values: nn.Parameter, rate: float, decay: float) -> None:
        super().__init__([values], lr=rate, weight_decay=decay)
        self._values = values
        self.state[values] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(values.detach()),
            "exp_avg_sq": torch.zeros_like(values.detach()),
        }
        self._before = [one.clone() for one in self._arrays]
        self._followed = torch.full_like(values.detach(), math.nan)

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for before, one in zip(self._before, self._arrays, strict=True):
            before.copy_(one)
        self._followed.fill_(math.nan)

    @torch.no_grad()
    def advance(self, entries: tuple[int, slice]) -> None:
        """Step some entries by the gradient that they have."""
        assert self._values.grad is not None
        self._followed[entries] = self._values.grad[entries]
        self._stepped([one[entries] for one in self._arrays], self._followed[entries])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step all entries that did not advance by the gradient that they have now."""
        if self._values.grad is None:
            return None
        left = self._values.grad != self._followed
        parts = [before[left] for before in self._before]
        self._stepped(parts, self._values.grad[left])
        for one, part in zip(self._arrays, parts, strict=True):
            one[left] = part
        self.state[self._values]["step"] += 1
        return None

    @property
    def _arrays(self) -> list[Tensor]:
        state = self.state[self._values]
        return [self._values.detach(), state["exp_avg"], state["exp_avg_sq"]]

    def _stepped(self, arrays: list[Tensor], gradient: Tensor) -> None:
        """Change values and moments in place."""
        values, mean, square = arrays
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        count = self.state[self._values]["step"].clone()
        adamw(
            [values], [gradient], [mean], [square], [], [count], foreach=False, amsgrad=False, beta1=beta1, beta2=beta2,
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
