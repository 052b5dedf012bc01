"""The value of an expression on a block of its elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mergekit_px.errors import NonFiniteError
from mergekit_px.methods.declare import Operands, RandomStream
from mergekit_px.plan.nodes import Adapted, Apply, Leaf, Node
from mergekit_px.stages import timed

if TYPE_CHECKING:
    import torch

Load = Callable[[Leaf], "torch.Tensor"]
"""Gives a stored tensor's, or a view's, elements of the block, in the accumulation dtype and
shaped as the method wants them."""

LoadFactors = Callable[[Adapted], Mapping[str, "torch.Tensor"]]
"""Gives an adapter's tensors for one target, as stored."""


class _ShapedRandom:
    """A random stream of flat elements, given in the shape of the block; sources keep their own stream."""

    def __init__(self, stream: RandomStream, shape: torch.Size, indices: Sequence[int]) -> None:
        self._stream = stream
        self._shape = shape
        self._indices = indices

    def uniform(self, source: int) -> torch.Tensor:
        return self._stream.uniform(self._indices[source]).reshape(self._shape)


class Block:
    """Some elements of one output tensor: evaluates expressions on them, each node once.

    Args:
        name: the output tensor.
        start: flat index of the block's first element; ``stop``: of the one after its last.
        load: reads stored tensors.
        factors: reads the tensors of adapters.
        statistics: of the methods that have some, by node.
        seed: of the run.
        shape: of the whole tensor.
        known: values of nodes on this block that were made before, and where those made now are kept.
    """

    def __init__(
        self,
        name: str,
        start: int,
        load: Load,
        factors: LoadFactors,
        statistics: Mapping[int, Any],
        seed: int,
        shape: tuple[int, ...],
        stop: int,
        known: dict[int, torch.Tensor] | None = None,
    ) -> None:
        self._name = name
        self._start = start
        self._stop = stop
        self._load = load
        self._factors = factors
        self._statistics = statistics
        self._seed = seed
        self._shape = shape
        self._known: dict[int, torch.Tensor] = {} if known is None else known

    def value(self, node: Node) -> torch.Tensor:
        """The node's value, in the accumulation dtype."""
        found = self._known.get(id(node))
        if found is None:
            found = self._made(node)
            self._known[id(node)] = found
        return found

    def operands(self, node: Apply, statistics: Any = None) -> Operands:
        """What the node's method sees: sources, or their differences to the base."""
        base = None if node.base is None else self.value(node.base)
        tensors = [self._source(node, source, base) for source in node.sources]
        return self._operands(node, tensors, base, statistics)

    def _source(self, node: Apply, source: Node, base: torch.Tensor | None) -> torch.Tensor:
        value = self.value(source)
        return value - base if base is not None and node.base is not None and source.kind == node.base.kind else value

    def _operands(
        self,
        node: Apply,
        tensors: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        statistics: Any,
    ) -> Operands:
        random = self._random(node, tensors[0] if base is None else base) if node.method.random else None
        return Operands(
            tensors=tensors,
            weights=node.weights,
            params=node.params,
            base=base,
            statistics=statistics,
            random=random,
            name=self._name,
            shape=self._shape,
        )

    def _random(self, node: Apply, like: torch.Tensor) -> RandomStream:
        from mergekit_px.kernels.random import RandomStream

        stream = RandomStream(self._seed, f"{node.step}/{self._name}", self._start, like.numel(), like.device)
        return _ShapedRandom(stream, like.shape, node.source_indices)

    def _made(self, node: Node) -> torch.Tensor:
        if isinstance(node, Leaf):
            return self._load(node)
        return self._adapt(node) if isinstance(node, Adapted) else self._apply(node)

    def _adapt(self, node: Adapted) -> torch.Tensor:
        """The adapted rows of this block, or their change."""
        base = None if node.base is None else self.value(node.base)
        if node.patch is None:
            assert base is not None
            return base.new_zeros(base.shape)
        factors = self._factors(node)
        inner = node.shape[1:]
        row = max(1, math.prod(inner))
        rows = slice(self._start // row, self._stop // row) if node.shape else None
        block = None if base is None else base.reshape(-1, *inner) if node.shape else base
        if node.kind == "delta":
            assert base is not None and block is not None
            return node.patch.change(block, factors, rows).reshape(base.shape)
        adapted = node.patch.merged(block, factors, rows)
        return adapted.reshape(base.shape) if base is not None else adapted.reshape(-1)

    def _apply(self, node: Apply) -> torch.Tensor:
        operands = self.operands(node, self._statistics.get(id(node)))
        merged = node.method(operands)
        return merged if operands.base is None else merged + operands.base


class WholeTensor(Block):
    """A tensor held whole, for methods that cannot be cut; sources are made one at a time, when asked for."""

    def operands(self, node: Apply, statistics: Any = None) -> Operands:
        load_base = self._loader(node.base)
        base = load_base() if load_base is not None and "base" in node.method.arguments else None
        operands = self._operands(node, _Lazy(self, node, load_base), base, statistics)
        return replace(operands, load_base=load_base)

    def value(self, node: Node) -> torch.Tensor:
        """Nothing is kept: what is asked for twice is made twice, which costs time and no memory."""
        return self._made(node)

    def _loader(self, base: Node | None) -> Callable[[], torch.Tensor] | None:
        """A base that is read is not held, one that is computed is computed once."""
        if base is None or isinstance(base, Leaf):
            return None if base is None else partial(self.value, base)
        made = self.value(base)
        return lambda: made

    def _apply(self, node: Apply) -> torch.Tensor:
        operands = self.operands(node, self._statistics.get(id(node)))
        merged = node.method(operands)
        return merged if operands.load_base is None else merged + operands.load_base()


class _Lazy(Sequence["torch.Tensor"]):
    def __init__(self, block: WholeTensor, node: Apply, load_base: Callable[[], torch.Tensor] | None) -> None:
        self._block = block
        self._node = node
        self._load_base = load_base

    def __len__(self) -> int:
        return len(self._node.sources)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        source = self._node.sources[index]
        value = self._block.value(source)
        if index >= len(self._node.source_indices):  # statistics
            return value
        if self._load_base is None or self._node.base is None or source.kind != self._node.base.kind:
            return value
        return value.sub_(self._load_base()) if isinstance(source, Leaf) else value - self._load_base()


def check_finite(block: torch.Tensor, where: str, what: str) -> None:
    """Raises NonFiniteError where a block holds a NaN or an infinity.

    The sum is tried first: it is finite for almost every finite block and costs a tenth of testing each element.
    """
    import torch

    with timed("check"):
        if math.isfinite(block.sum().item()) or bool(torch.isfinite(block).all()):
            return
    bad = int((~torch.isfinite(block)).sum())
    raise NonFiniteError(
        f"{what} holds NaN or infinity ({bad} of the {block.numel()} elements looked at)",
        where=where,
        hint="repair the checkpoint, leave the tensor out by a rule, or pass --allow-nonfinite",
    )
