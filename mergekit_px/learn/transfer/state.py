"""What a run must keep to go on as if it had not been stopped: one safetensors file, replaced in one rename.

Random numbers need nothing here: each use draws from (seed, purpose, step).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.positional import sync
from mergekit_px.errors import InputError, OutputError, WriteError
from mergekit_px.learn.models import read_tensors
from mergekit_px.learn.transfer.exchange import Exchange
from mergekit_px.learn.transfer.side import Side

FORMAT = "pxmerge_transfer_state"

Tensors = dict[str, Tensor]


def save_state(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write a state over the one before it.

    Raises:
        WriteError: the disk refuses.
    """
    from safetensors.torch import save_file

    part = path.with_suffix(".part")
    kept = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(kept, part, metadata={FORMAT: json.dumps(info)})
        with part.open("rb+") as file:
            sync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise WriteError(f"the disk refused: {error.strerror or error}", where=str(path)) from error


def load_state(path: Path, plan_hash: str) -> tuple[Tensors, dict[str, Any]]:
    """A saved state, and what was noted with it.

    Raises:
        InputError: not a state, or damaged.
        OutputError: it belongs to another plan.
    """
    checkpoint = open_checkpoint(path)
    try:
        info = json.loads(checkpoint.metadata[FORMAT])
        found = info["plan_hash"]
    except (KeyError, TypeError, ValueError):
        raise InputError("not the state of a transfer", where=str(path), hint="start over with --overwrite") from None
    if found != plan_hash:
        raise other_plan(path)
    return read_tensors(checkpoint), info


def other_plan(path: Path) -> OutputError:
    """The error for what an earlier run of another plan left."""
    return OutputError(
        "the unfinished run there has another plan: the plan, the inputs or the options changed since",
        where=str(path),
        hint="go back to them, or start over with --overwrite",
    )


def module_state(module: nn.Module) -> Tensors:
    """Every parameter and buffer once, whatever it is tied to; buffers that are not saved with models too."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@torch.no_grad()
def restore_module(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy back what `module_state` gave."""
    for name, tensor in module_state(module).items():
        tensor.copy_(state[name])


def side_state(side: Side) -> Tensors:
    """Weights, factors and optimiser of a model in training."""
    found = {f"module.{name}": tensor for name, tensor in module_state(side.module).items()}
    for number, factors in enumerate(side.factors.values()):
        found.update({f"factors.{number}.{name}": tensor for name, tensor in factors.state().items()})
    assert side.optimizer is not None
    found.update({f"optimizer.{name}": tensor for name, tensor in _optimizer_state(side.optimizer).items()})
    return found


def restore_side(side: Side, state: Mapping[str, Tensor]) -> None:
    """Take up what `side_state` gave."""
    restore_module(side.module, under(state, "module."))
    for number, factors in enumerate(side.factors.values()):
        factors.restore(under(state, f"factors.{number}."))
    assert side.optimizer is not None
    _restore_optimizer(side.optimizer, under(state, "optimizer."))


def exchange_state(exchange: Exchange) -> Tensors:
    """Weights and optimiser of the adapters."""
    found = {f"parameter.{number}": one.detach() for number, one in enumerate(exchange.parameters)}
    found.update({f"optimizer.{name}": tensor for name, tensor in _optimizer_state(exchange.optimizer).items()})
    return found


@torch.no_grad()
def restore_exchange(exchange: Exchange, state: Mapping[str, Tensor]) -> None:
    """Take up what `exchange_state` gave."""
    for number, parameter in enumerate(exchange.parameters):
        parameter.copy_(state[f"parameter.{number}"])
    _restore_optimizer(exchange.optimizer, under(state, "optimizer."))


def under(state: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The entries whose names begin so, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _optimizer_state(optimizer: torch.optim.Optimizer) -> Tensors:
    return {
        f"{number}.{name}": value
        for number, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    entries: dict[int, Tensors] = {}
    for key, tensor in state.items():
        number, _, name = key.partition(".")
        entries.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
