"""Elementwise arithmetic as a program: what a method does with its tensors is recorded instead of done.

A :class:`Traced` stands for a tensor. It has those methods of ``torch.Tensor`` that treat each element alone, and
takes part in torch's functions by their override protocol, so a merge method runs on it unchanged. What it cannot
record (a sum, a sort, a branch on a value) raises :class:`NotTraceable`, and torch does the work then.

Numbers are kept apart from the operations: tensors that are treated alike, with other weights, have one program.
torch is not imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Type = Literal["float", "double", "bool"]
Operation = tuple[str, Type, tuple[int, ...]]
"""What is done, in which type, with which earlier operations (or numbers, for those named ``number``)."""


class NotTraceable(Exception):
    """An operation that is not element by element, or not known here."""


@dataclass
class Program:
    """Operations in order; each one's value is known by its place."""

    type: Type
    """Of the inputs as they are computed with, and of the result."""
    inputs: list[str] = field(default_factory=list)
    """Storage types of the inputs, by their safetensors names."""
    operations: list[Operation] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    """Of streams of random numbers."""
    result: int = -1

    def input(self, dtype: str) -> Traced:
        """A stored tensor, converted to the type of the program."""
        self.inputs.append(dtype)
        return self.add("input", self.type, (len(self.inputs) - 1,))

    def scaled(self, dtype: str) -> Traced:
        """Codes of one byte times a scale, which is the same for all elements of a vector."""
        self.inputs += [dtype, "scales"]
        return self.add("scaled", self.type, (len(self.inputs) - 2, len(self.inputs) - 1))

    def number(self, value: float, kind: Type) -> int:
        self.numbers.append(float(value))
        return self.add("number", kind, (len(self.numbers) - 1,)).place

    def uniform(self, key: int) -> Traced:
        """The random numbers of the elements, float32 in [0, 1)."""
        self.keys.append(key)
        return self.add("uniform", "float", (len(self.keys) - 1,))

    def add(self, name: str, kind: Type, operands: tuple[int, ...]) -> Traced:
        self.operations.append((name, kind, operands))
        return Traced(self, len(self.operations) - 1)

    @property
    def structure(self) -> tuple[Any, ...]:
        """What tells programs apart that need code of their own."""
        return self.type, tuple(self.inputs), tuple(self.operations), self.result


@dataclass(frozen=True)
class _DType:
    """A type, as far as anything can be said of it before torch is there."""

    name: str
    itemsize: int


_DTYPES: dict[Type, _DType] = {"float": _DType("float32", 4), "double": _DType("float64", 8)}


def _dtype(kind: Type) -> Any:
    """torch's own where torch is loaded, since methods compare with it."""
    if kind not in _DTYPES:
        raise NotTraceable("the type of truth values")
    torch = sys.modules.get("torch")
    return _DTYPES[kind] if torch is None else getattr(torch, _DTYPES[kind].name)


def _type(dtype: Any) -> Type:
    for kind, known in _DTYPES.items():
        if dtype is known or str(dtype) == f"torch.{known.name}":
            return kind
    raise NotTraceable(f"a conversion to {dtype}")


class _Shape:
    """Of all tensors of a program: not known, and the same."""


_SHAPE = _Shape()


class Traced:
    """A tensor of which only is known how it is made."""

    def __init__(self, program: Program, place: int) -> None:
        self.program = program
        self.place = place

    @property
    def kind(self) -> Type:
        return self.program.operations[self.place][1]

    # What has a shape or a type, or is a view, is what it was.

    @property
    def shape(self) -> _Shape:
        return _SHAPE

    @property
    def dtype(self) -> Any:
        return _dtype(self.kind)

    def new_zeros(self, shape: Any) -> Traced:
        return self._same_shape(shape).zeros_like()

    def view(self, shape: Any) -> Traced:
        return self._same_shape(shape)

    def reshape(self, shape: Any) -> Traced:
        return self._same_shape(shape)

    def _same_shape(self, shape: Any) -> Traced:
        if shape is not _SHAPE:
            raise NotTraceable("a change of shape")
        return self

    def to(self, dtype: Any) -> Traced:
        kind = _type(dtype)
        if kind == self.kind:
            return self
        return self.program.add("convert", kind, (self.place,))

    def clone(self) -> Traced:
        return Traced(self.program, self.place)

    def __bool__(self) -> bool:
        raise NotTraceable("a branch on a value")

    # Arithmetic. torch converts numbers to the tensor's type first.

    def add(self, other: Any, *, alpha: float = 1) -> Traced:
        if alpha == 1:
            return self._binary("fadd", other)
        if not isinstance(other, Traced):
            raise NotTraceable("a multiple of a number")
        # What torch does on a CPU, with one rounding.
        return self._add("fma", (self._other(other), self.program.number(alpha, self.kind), self.place))

    def sub(self, other: Any) -> Traced:
        return self._binary("fsub", other)

    def mul(self, other: Any) -> Traced:
        if self.kind == "bool" and isinstance(other, Traced):
            self, other = other, self
        return self._binary("fmul", other)

    def div(self, other: Any) -> Traced:
        return self._binary("fdiv", other)

    def maximum(self, other: Any) -> Traced:
        return self._binary("maximum", other)

    def minimum(self, other: Any) -> Traced:
        return self._binary("minimum", other)

    def gt(self, other: Any) -> Traced:
        return self._binary("ogt", other, "bool")

    def ge(self, other: Any) -> Traced:
        return self._binary("oge", other, "bool")

    def lt(self, other: Any) -> Traced:
        return self._binary("olt", other, "bool")

    def le(self, other: Any) -> Traced:
        return self._binary("ole", other, "bool")

    def __eq__(self, other: object) -> Any:
        raise NotTraceable("a comparison for equality")

    __hash__ = None  # type: ignore[assignment]

    def neg(self) -> Traced:
        return self._add("fneg", (self.place,))

    def abs(self) -> Traced:
        return self._add("fabs", (self.place,))

    def sign(self) -> Traced:
        return self._add("sign", (self.place,))

    def zeros_like(self) -> Traced:
        return Traced(self.program, self.program.number(0.0, self.kind))

    def zero_(self) -> Traced:
        return self._become(self.zeros_like())

    def clamp(self, min: float | None = None, max: float | None = None) -> Traced:
        value = self if min is None else self._binary("atleast", min)
        return value if max is None else value._binary("atmost", max)

    def hardshrink(self, cut: float) -> Traced:
        return self._binary("hardshrink", cut)

    def threshold(self, cut: float, value: float) -> Traced:
        numbers = (self.program.number(cut, self.kind), self.program.number(value, self.kind))
        return self._add("threshold", (self.place, *numbers))

    def where(self, chosen: Any, other: Any) -> Traced:
        """``torch.where(self, chosen, other)``."""
        like = next((value for value in (chosen, other) if isinstance(value, Traced)), None)
        if like is None or like.kind == "bool" or self.kind != "bool":
            raise NotTraceable("a choice among numbers")
        return self.program.add("where", like.kind, (self.place, like._other(chosen), like._other(other)))

    def _binary(self, name: str, other: Any, kind: Type | None = None) -> Traced:
        return self._add(name, (self.place, self._other(other)), kind)

    def _other(self, other: Any) -> int:
        if isinstance(other, Traced):
            if other.kind == "bool":
                return other.to(self.dtype).place
            if other.kind != self.kind:
                raise NotTraceable("operands of different types")
            return other.place
        if isinstance(other, bool) or not isinstance(other, (int, float)):
            raise NotTraceable(f"an operand of type {type(other).__name__}")
        return self.program.number(other, self.kind)

    def _add(self, name: str, operands: tuple[int, ...], kind: Type | None = None) -> Traced:
        if self.kind == "bool":  # torch's arithmetic of truth values is another
            raise NotTraceable(f"{name} of truth values")
        return self.program.add(name, kind or self.kind, operands)

    def _become(self, value: Traced) -> Traced:
        if value.kind != self.kind:
            raise NotTraceable("a change of type in place")
        self.place = value.place
        return self

    __add__ = __radd__ = add
    __mul__ = __rmul__ = mul
    __sub__ = sub
    __truediv__ = div
    __gt__, __ge__, __lt__, __le__ = gt, ge, lt, le
    __neg__ = neg
    __abs__ = abs

    def __rsub__(self, other: Any) -> Traced:
        return Traced(self.program, self._other(other)).sub(self)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """torch's functions on traced tensors."""
        name = function.__name__
        out = (kwargs := dict(kwargs or {})).pop("out", None)
        method = getattr(args[0], name, None) if name in _FUNCTIONS and isinstance(args[0], Traced) else None
        if method is None or (out is not None and not isinstance(out, Traced)):
            raise NotTraceable(f"torch.{name}")
        value = method(*args[1:], **kwargs)
        return value if out is None else out._become(value)


_UNARY_OR_BINARY = ("add", "sub", "mul", "div", "neg", "abs", "sign", "clamp", "threshold")
_FUNCTIONS = {*_UNARY_OR_BINARY, "maximum", "minimum", "zeros_like", "clone", "hardshrink", "where", "threshold_"}


def _in_place(name: str) -> Callable[..., Traced]:
    def method(self: Traced, *args: Any, **kwargs: Any) -> Traced:
        return self._become(getattr(self, name)(*args, **kwargs))

    return method


for _name in _UNARY_OR_BINARY:
    setattr(Traced, f"{_name}_", _in_place(_name))
for _name in ("add", "sub", "mul"):
    setattr(Traced, f"__i{_name}__", _in_place(_name))
