"""A step of an optimiser, and what a learning rate far too large makes of it."""

from __future__ import annotations

import torch

from mergekit_px.errors import DivergedError

_OVERFLOW = "without overflow"
"""What torch says of a factor that the dtype of a parameter cannot hold; the error has no class of its own."""


def take_step(optimizer: torch.optim.Optimizer, place: str) -> None:
    """Change the parameters once.

    Args:
        place: for the error, as ``at step 3``.

    Raises:
        DivergedError: the step is larger than any number of the parameters' dtype.
    """
    try:
        optimizer.step()
    except RuntimeError as error:
        if _OVERFLOW not in str(error):
            raise
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        raise DivergedError(f"a step by the learning rate {rate:g} overflows {place}") from error
