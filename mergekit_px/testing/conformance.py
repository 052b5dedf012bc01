"""The conformance battery: what every merge method must satisfy, whatever it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mergekit_px.methods import find_method
from mergekit_px.methods.declare import Method, Operands
from mergekit_px.testing.plain import (
    apply_method,
    cut_blocks,
    gather_statistics,
    resolve_params,
)

_SHAPES = ((), (0,), (1,), (7,), (0, 4), (1, 1), (5, 3), (2, 3, 4))
_CUT_SHAPE = (37, 29)
_CUTS = (29, 100, 700)
_ROUNDING_SHAPE = (96, 256)
_ROUNDED_ALIKE = 0.999


def check_method(
    method: Method | str,
    params: Mapping[str, Any] | None = None,
    *,
    weights: Sequence[float] | None = None,
    sources: int | None = None,
    identity: bool = False,
    symmetric: bool = False,
) -> None:
    """Run a merge method through the battery.

    Documentation and presets are complete; the result has the shape of the input and the accumulation dtype, for
    scalars, vectors, matrices, empty and one-element tensors; arguments stay unchanged; repetition gives the same
    bits; so does every cut that the declared access allows; seeds matter for random methods only; bfloat16 inputs
    give what a float64 computation rounded once gives in at least 99.9 % of the elements.

    Args:
        method: a declared method or its name.
        params: parameters to run it with.
        weights: one for each source; the method's default if None.
        sources: how many; as many as the method takes, up to 3, if None.
        identity: whether with these parameters equal sources must give that source.
        symmetric: whether with these parameters the order of the sources must not matter.

    Raises:
        AssertionError: says which rule is broken.
    """
    declared = find_method(method) if isinstance(method, str) else method
    least, most = declared.sources
    count = sources or (len(weights) if weights else max(least, 3 if most is None else min(3, most)))
    case = _Case(declared, dict(params or {}), count, weights)
    case.check_documentation()
    case.check_shapes()
    case.check_arguments_unchanged()
    case.check_repeatable()
    case.check_cuts()
    case.check_rounding()
    if identity:
        case.check_identity()
    if symmetric:
        case.check_symmetry()


class _Case:
    """A method with parameters, weights and a number of sources."""

    def __init__(self, method: Method, params: dict[str, Any], count: int, weights: Sequence[float] | None) -> None:
        self.method = method
        self.params = params
        self.count = count
        self.weights = list(weights) if weights is not None else [method.default_weight] * count
        self.takes_base = method.space == "deltas" or "base" in method.arguments

    def draw(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Sources around a base, which is None for a method that takes none."""
        generator = torch.Generator().manual_seed(7)
        base = torch.randn(shape, generator=generator) * 0.02
        sources = [(base + torch.randn(shape, generator=generator) * 0.002).to(dtype) for _ in range(self.count)]
        return sources, base.to(dtype) if self.takes_base else None

    def run(self, tensors: Sequence[torch.Tensor], base: torch.Tensor | None, **options: Any) -> torch.Tensor:
        return apply_method(self.method, tensors, self.weights, self.params, base=base, **options)

    def require(self, condition: bool, rule: str) -> None:
        assert condition, f"{self.method.name}: {rule}"

    def check_documentation(self) -> None:
        self.require(self.method.summary.endswith("."), "the docstring begins with one sentence")
        self.require("\n\n" in self.method.documentation, "the docstring says more than one line")
        for name, field in self.method.params.model_fields.items():
            self.require(bool(field.description), f"the parameter {name} has a docstring")
            self.require(not field.is_required(), f"the parameter {name} has a default")
        for name, values in self.method.presets.items():
            self.require(self.method.params.model_validate(dict(values)) is not None, f"the preset {name} is valid")

    def check_shapes(self) -> None:
        for shape in _SHAPES:
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                sources, base = self.draw(shape, dtype)
                blocks = self.blocks(sources, base)
                statistics = gather_statistics(self.method, blocks)
                for block in blocks:
                    merged = self.method(replace(block, statistics=statistics))
                    expected = block.tensors[0]
                    self.require(
                        merged.shape == expected.shape and merged.dtype == expected.dtype,
                        f"{tuple(expected.shape)} {expected.dtype} gives {tuple(merged.shape)} {merged.dtype}",
                    )
                    self.require(bool(merged.isfinite().all()), f"finite sources of shape {shape} give finite results")

    def blocks(self, sources: list[torch.Tensor], base: torch.Tensor | None) -> list[Operands]:
        """What the method sees of one tensor, apart from the statistics."""
        whole = Operands(
            tensors=sources,
            weights=self.weights,
            params=resolve_params(self.method, self.params, self.count),
            base=base,
            name="t",
            shape=tuple(sources[0].shape),
        )
        return list(cut_blocks(self.method, whole, 0, None))

    def check_arguments_unchanged(self) -> None:
        for dtype in (torch.float32, torch.float64):
            blocks = self.blocks(*self.draw(_CUT_SHAPE, dtype))
            given = [tensor for block in blocks for tensor in (*block.tensors, block.base) if tensor is not None]
            before = [tensor.clone() for tensor in given]
            statistics = gather_statistics(self.method, blocks)
            for block in blocks:
                self.method(replace(block, statistics=statistics)).add_(1)
            self.require(all(map(torch.equal, before, given)), "arguments are neither changed nor returned")

    def check_repeatable(self) -> None:
        sources, base = self.draw(_CUT_SHAPE)
        first = self.run(sources, base, seed=1)
        self.require(torch.equal(first, self.run(sources, base, seed=1)), "the same arguments give the same bits")
        if not self.method.random:
            self.require(torch.equal(first, self.run(sources, base, seed=2)), "the seed matters to random methods only")

    def check_cuts(self) -> None:
        if self.method.access_with(resolve_params(self.method, self.params, self.count)) == "tensor":
            return
        sources, base = self.draw(_CUT_SHAPE)
        whole = self.run(sources, base)
        for block in _CUTS:
            self.require(
                torch.equal(whole, self.run(sources, base, block=block)), f"blocks of {block} give the same bits"
            )

    def check_rounding(self) -> None:
        sources, base = self.draw(_ROUNDING_SHAPE, torch.bfloat16)
        merged = self.run(sources, base)
        exact = self.run([source.double() for source in sources], None if base is None else base.double())
        alike = (merged == exact.to(torch.bfloat16)).double().mean().item()
        self.require(
            alike >= _ROUNDED_ALIKE, f"{alike:.2%} of the bfloat16 elements are those of float64, rounded once"
        )

    def check_identity(self) -> None:
        sources, base = self.draw(_CUT_SHAPE)
        merged = self.run([sources[0]] * self.count, base)
        self.require(torch.allclose(merged, sources[0], rtol=1e-5, atol=1e-8), "equal sources give that source")

    def check_symmetry(self) -> None:
        sources, base = self.draw(_CUT_SHAPE)
        first = self.run(sources, base)
        turned = _Case(self.method, self.reversed_params(), self.count, self.weights[::-1])
        second = turned.run(sources[::-1], base)
        self.require(torch.allclose(first, second, rtol=1e-5, atol=1e-8), "the order of the sources does not matter")

    def reversed_params(self) -> dict[str, Any]:
        fields = self.method.per_source_fields()
        return {
            name: tuple(value)[::-1] if name in fields and isinstance(value, (tuple, list)) else value
            for name, value in self.params.items()
        }
