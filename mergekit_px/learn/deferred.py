"""Weights that are made whenever a layer takes them, from what is stored, and made again in the backward pass.

So a model that is stored in bfloat16, or stands for a sum, is computed in float32 without ever being there in float32:
of all weights only those of the layer that runs are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Make = Callable[[], Tensor]
"""A weight, differentiable in whatever is free."""


class Deferred:
    """Weights of a module in the place of its parameters, which stay what is stored.

    Args:
        makers: the name of a parameter or buffer -> what makes it; parameters of less than 32 bits are widened without.
    """

    def __init__(self, module: nn.Module, makers: Mapping[str, Make]) -> None:
        self._live: dict[int, tuple[weakref.ref[Tensor], Make]] = {}
        self._context: Any = None
        self._plain: list[tuple[nn.Module, type[nn.Module]]] = []
        state = module.state_dict(keep_vars=True)
        by_tensor = {id(state[name]): make for name, make in makers.items()}
        for owner in list(module.modules()):
            named: dict[str, property] = {}
            for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
                narrow = isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and tensor.element_size() < 4
                make = by_tensor.get(id(tensor), tensor.detach().float if tensor is not None and narrow else None)
                if make is not None:
                    named[name] = self._property(make)
            if named:
                if isinstance(owner, nn.RNNBase):  # it keeps a list of its weights
                    named["_flat_weights"] = property(
                        lambda self: [getattr(self, one) for one in self._flat_weights_names]
                    )
                self._plain.append((owner, type(owner)))
                owner.__class__ = _with_properties(type(owner), named)
        self._hooks = (
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave, always_call=True),
        )

    def remove(self) -> None:
        """Give the module its parameters back."""
        for owner, plain in self._plain:
            owner.__class__ = plain
        for hook in self._hooks:
            hook.remove()

    def _property(self, make: Make) -> property:
        def made(_: nn.Module) -> Tensor:
            if torch.is_grad_enabled():
                weight: Tensor = checkpoint(make, use_reentrant=False, preserve_rng_state=False)
            else:
                weight = make()
            self._live[weight.untyped_storage().data_ptr()] = weakref.ref(weight), make
            return weight

        return property(made)

    def _enter(self, *given: Any) -> None:
        self._context = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._context.__enter__()

    def _leave(self, *given: Any) -> None:
        self._context.__exit__(None, None, None)
        self._live.clear()

    def _pack(self, saved: Tensor) -> Any:
        found = self._live.get(saved.untyped_storage().data_ptr())
        weight = None if found is None else found[0]()
        if found is None or weight is None:
            return saved
        return found[1], saved.shape, saved.stride(), saved.storage_offset()


class Widened(torch.autograd.Function):
    """What is stored, in float32; its gradient is that of a handle, a leaf of its shape that holds no memory."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, stored: Tensor) -> Tensor:
        return stored.to(handle.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0], None


@torch.no_grad()
def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    make, shape, stride, offset = kept
    return torch.as_strided(make(), shape, stride, offset)


def _flat_weights(owner: Any) -> list[Tensor]:
    return [getattr(owner, name) for name in owner._flat_weights_names]


def _with_properties(plain: type[nn.Module], properties: Mapping[str, property]) -> type[nn.Module]:
    return type(plain.__name__, (plain,), {"__module__": plain.__module__, **properties})
