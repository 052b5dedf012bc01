"""The state of a transfer's models, adapters and optimisers, as tensors by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mergekit_px.learn.state import Tensors, under
from mergekit_px.learn.transfer.exchange import Exchange
from mergekit_px.learn.transfer.side import Side


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
