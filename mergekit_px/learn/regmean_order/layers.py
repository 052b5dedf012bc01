"""The layers of a model in the order in which they run, and what is in each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from mergekit_px.errors import InputError
from mergekit_px.learn.activations import layers_of
from mergekit_px.learn.data import Batch
from mergekit_px.learn.ofasd.blend import Site
from mergekit_px.learn.outputs import forward
from mergekit_px.learn.stats.gram import is_transposed


@dataclass(frozen=True)
class Layer:
    """A member of a list of layers, or a linear layer that is in none.

    Attributes:
        module: it.
        sites: the arrays that are in it and nowhere else.
        linear: the linear modules whose weights are among them.
        calls: how often it runs in a forward pass.
    """

    name: str
    module: nn.Module
    sites: Sequence[Site]
    linear: Sequence[nn.Module]
    calls: int

    def is_transposed(self, site: Site) -> bool:
        """Whether an array is a linear module's weight that is stored (in, out)."""
        return any(is_transposed(part) and part._parameters["weight"] is site.target for part in self.linear)


class _DoneError(Exception):
    """A layer has run; what comes after it is not asked for."""


def running_layers(module: nn.Module, sites: Sequence[Site], batch: Batch) -> list[Layer]:
    """The layers with linear layers in them, in the order in which they run.

    Raises:
        InputError: there is none.
    """
    members = list(layers_of(module))
    inside = {id(part) for member in members for part in member.modules()}
    members += [part for part in module.modules() if _is_linear(part) and id(part) not in inside]
    order: list[nn.Module] = []
    hooks = [member.register_forward_hook(lambda own, *given: order.append(own)) for member in set(members)]
    try:
        forward(module, batch)
    finally:
        for hook in hooks:
            hook.remove()
    names = {id(part): name for name, part in module.named_modules()}
    owner = {id(part): member for member in members for part in member.modules()}
    owners: dict[int, set[int]] = {}
    for part in module.modules():
        for array in (*part._parameters.values(), *part._buffers.values()):
            owners.setdefault(id(array), set()).add(id(owner.get(id(part), module)))
    found = []
    for member in dict.fromkeys(order):
        own = [site for site in sites if owners[id(site.target)] == {id(member)}]
        arrays = {id(site.target) for site in own}
        linear = [part for part in member.modules() if _is_linear(part) and id(part._parameters["weight"]) in arrays]
        if linear:
            found.append(Layer(names[id(member)], member, own, linear, order.count(member)))
    if not found:
        kinds = "(torch.nn.Linear, Conv1D)"
        what = f"{type(module).__name__} has no linear layer {kinds} with weights of its own that data reach"
        raise InputError(what, hint="average it, or merge it by another method: pxmerge methods")
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


@contextmanager
def up_to(layer: Layer) -> Iterator[None]:
    """Inside, a forward pass ends when the layer has run."""
    calls = 0

    def count(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == layer.calls:
            raise _DoneError

    hook = layer.module.register_forward_hook(count)
    try:
        yield
    except _DoneError:
        pass
    finally:
        hook.remove()


def by_layer(names: Mapping[str, int]) -> int:
    """The largest sum of numbers of one layer, told by the numbers in names."""
    from mergekit_px.plan.layers import split_layer

    sums: dict[tuple[str, int] | str, int] = {}
    for name, number in names.items():
        split = split_layer(name)
        key = name if split is None else (split.stack, split.layer)
        sums[key] = sums.get(key, 0) + number
    return max(sums.values(), default=0)
