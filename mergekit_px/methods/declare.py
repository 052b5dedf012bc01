"""How a merge method is declared: one decorated function and one parameter class in one file.

The recipe schema, the command with its options, the documentation page and the conformance tests are derived
from the declaration. A method is a pure function of blocks of tensors; reading, chunking, conversion to the
accumulation dtype, adding the base back and rounding are done around it.

    class LinearParams(Params):
        normalize: bool = True
        \"\"\"Divide the weights by their sum.\"\"\"

    @merge_method(space="any", access="elementwise", paper="arXiv:2203.05482")
    def linear(sources, weights, params: LinearParams):
        \"\"\"Weighted average of the sources. ...\"\"\"

A function asks for what it needs by the names of its arguments:

==============  ======================================================================================
``sources``     the sources' weights, one tensor each, in the accumulation dtype (methods on weights)
``deltas``      the sources' task vectors, source minus base (methods on deltas)
``base``        the base's block, or None where a method on weights was given none
``weights``     one float for each source
``params``      the parameter class, resolved for this tensor
``statistics``  what the method's ``statistics`` generator returned for this tensor
``random``      a :class:`RandomStream` whose numbers depend on (seed, tensor, source, element) only
``name``        the name of the output tensor
``shape``       the shape of the whole tensor
==============  ======================================================================================

It returns the merged block: weights if it takes ``sources``, a delta (the base is added afterwards) if it takes
``deltas``. It never changes its arguments in place.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from mergekit_px.declare.built_in import METHODS
from mergekit_px.declare.once import require_new
from mergekit_px.errors import UsageError
from mergekit_px.methods.weighting import total_weight

if TYPE_CHECKING:
    import torch

Space = Literal["weights", "deltas", "any"]
"""``weights``: takes full checkpoints. ``deltas``: takes task vectors, made by subtracting the base from full
checkpoints. ``any``: a linear map, which takes either kind and returns the kind that the coefficients give."""

Access = Literal["elementwise", "two_pass", "rows", "tensor"]
"""How finely a tensor may be cut. ``elementwise``: any cut. ``two_pass``: sums over the whole tensor first, then
any cut. ``rows``: whole rows (vectors along the last axis). ``tensor``: the whole tensor at once."""


Family = Literal["average", "task vectors", "spectral", "federated", "statistics", "building block"]
"""What lists of methods show together."""


class Params(BaseModel):
    """Base of the parameter classes. Field docstrings become help texts, bounds become option ranges."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, defer_build=True)

    def treats_by_element(self, shape: Sequence[int], name: str) -> bool:
        """Whether a method that takes whole tensors treats this one element by element, so that it may be cut."""
        return False


class PerSource:
    """Marker in ``Annotated[float | tuple[float, ...], PerSource()]``: the recipe may give one value for each
    source; the method then receives a tuple with one value for each source, whatever was written."""


@dataclass(frozen=True, slots=True)
class ArtefactFile:
    """Marker of a parameter that names a small file: the method gets what the file holds.

    The file is an input of the merge: it is read while planning, hashed, and named in the lock file.

    Attributes:
        kind: what it holds, for people.
        read: from a path to the file that was read (of a folder, the one in it), its content and its sha256; raises
            ``InputError``.
    """

    kind: str
    read: Callable[[Path], tuple[Path, Any, str]]


class RandomStream(Protocol):
    def uniform(self, source: int) -> torch.Tensor:
        """float32 in [0, 1), one for each element of this block, independent between sources."""
        ...


@dataclass(frozen=True, slots=True)
class Operands:
    """What a method or a sweep sees of one block of one tensor. All tensors share one shape, dtype and device."""

    tensors: Sequence[torch.Tensor]
    weights: Sequence[float]
    params: Any
    base: torch.Tensor | None = None
    """Where tensors are held whole: only for methods that take it."""
    load_base: Callable[[], torch.Tensor] | None = None
    """Makes the base, for methods that need it for a moment and would rather not hold it; None without one."""
    statistics: Any = None
    random: RandomStream | None = None
    name: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Extent:
    """What a statistics generator knows before it has seen a value.

    ``elements`` counts the elements that are swept: those of one tensor, or of all tensors that share the
    statistics where the scope is the model.
    """

    sources: int
    elements: int
    weights: tuple[float, ...]
    params: Any


Sweep = Callable[[Operands], "torch.Tensor"]
"""Maps a block to partial sums (int64 or float64). The engine adds them up over the blocks in a fixed order."""

Statistics = Callable[[Extent], Generator[Sweep, "torch.Tensor", Any]]
"""Yields sweeps, is sent each one's total (on the CPU), and returns what the method gets as ``statistics``."""


@dataclass(frozen=True, slots=True)
class Companions:
    """What a method reads beside each of its sources: statistics of the model on data, from a file of their own.

    The second half of a step's sources are then the companions of the first half, in the same order. The method gets
    the companions' tensors after those of the models; ``weights`` are those of the models. Where no companion has
    statistics of a tensor, the method gets the models alone.

    Attributes:
        what: for messages, as ``Fisher information``.
        suffix: a tensor's statistics have its name with this at the end.
        shape: of the statistics, from that of the tensor. Any but that of the tensor needs ``access="tensor"``.
    """

    what: str
    suffix: str
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """A declared merge method."""

    name: str
    function: Callable[..., torch.Tensor]
    params: type[Params]
    space: Space
    access: Access
    """What it needs with default parameters; see :meth:`access_with`."""
    sources: tuple[int, int | None]
    paper: str | None
    default_weight: float
    uses_weights: bool
    statistics: Statistics | None
    scope: Callable[[Any], Literal["tensor", "model"]]
    random: bool
    scratch: float
    presets: Mapping[str, Mapping[str, Any]]
    origin: str
    coarser: Callable[[Any], Access | None]
    overshoots: Callable[[Any], str | None]
    """What it does with many task vectors at full weight, for given parameters, that can go too far."""
    arguments: frozenset[str] = field(default=frozenset())
    companions: Companions | None = None
    centred: bool = False
    """Whether the mean of its sources is a base that makes sense by itself."""
    signed: bool = False
    """Whether its weights are coefficients of any sign and sum, which decide what comes out."""
    family: Family = "task vectors"
    weighing: Callable[[Sequence[float]], object] | None = None
    """What is done with the weights alone, and raises ``UsageError`` for those that cannot be."""

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")

    @property
    def documentation(self) -> str:
        return inspect.getdoc(self.function) or ""

    def __call__(self, operands: Operands) -> torch.Tensor:
        """Apply the method to one block; shape and dtype of the result are those of the operands."""
        available = {
            "sources": operands.tensors,
            "deltas": operands.tensors,
            "base": operands.base,
            "load_base": operands.load_base or _giving(operands.base),
            "weights": operands.weights,
            "params": operands.params,
            "statistics": operands.statistics,
            "random": operands.random,
            "name": operands.name,
            "shape": operands.shape,
        }
        return self.function(**{name: available[name] for name in self.arguments})

    def check_weights(self, weights: Sequence[float], params: Any) -> None:
        """Raises ``UsageError`` for weights that the method refuses, before anything is read."""
        if self.weighing is not None:
            self.weighing(weights)
        elif self.uses_weights and getattr(params, "normalize", False):
            total_weight(weights)

    def access_with(self, params: Any) -> Access:
        """How finely a tensor may be cut, given the parameters."""
        return self.coarser(params) or self.access

    def per_source_fields(self) -> frozenset[str]:
        return frozenset(
            name
            for name, info in self.params.model_fields.items()
            if any(isinstance(mark, PerSource) or mark is PerSource for mark in info.metadata)
        )

    def artefact_fields(self) -> dict[str, ArtefactFile]:
        """The parameters that name small files."""
        return _artefact_fields(self.params)


@cache
def _artefact_fields(params: type[Params]) -> dict[str, ArtefactFile]:
    """Looked up once for each class: plans ask for every tensor."""
    return {
        name: mark
        for name, info in params.model_fields.items()
        for mark in info.metadata
        if isinstance(mark, ArtefactFile)
    }


REGISTRY: dict[str, Method] = {}


def _giving(base: torch.Tensor | None) -> Callable[[], torch.Tensor] | None:
    return None if base is None else lambda: base


_ARGUMENTS = {"sources", "deltas", "base", "load_base", "weights", "params", "statistics", "random", "name", "shape"}


def merge_method(
    *,
    space: Space,
    access: Access,
    paper: str | None = None,
    sources: tuple[int, int | None] = (1, None),
    default_weight: float = 1.0,
    statistics: Statistics | None = None,
    scope: Callable[[Any], Literal["tensor", "model"]] | None = None,
    coarser: Callable[[Any], Access | None] | None = None,
    random: bool = False,
    scratch: float = 2.0,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    companions: Companions | None = None,
    centred: bool = False,
    signed: bool = False,
    overshoots: Callable[[Any], str | None] | None = None,
    family: Family | None = None,
    weighing: Callable[[Sequence[float]], object] | None = None,
    params: type[Params] | None = None,
    name: str | None = None,
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Declare a merge method; the decorated function stays an ordinary function.

    Args:
        space: what it takes, see :data:`Space`.
        access: how finely a tensor may be cut, see :data:`Access`.
        paper: where it comes from, as ``arXiv:2306.01708``.
        sources: least and most number of sources (base not counted); None for no limit.
        default_weight: a source's weight where the recipe gives none.
        statistics: generator of sweeps; required by ``two_pass``, and for ``rows`` where they depend on other rows.
        scope: whether the statistics of given parameters are of one ``tensor`` or of the whole ``model``.
        coarser: what it needs instead of ``access`` with given parameters; None where that will do.
        random: whether it draws random numbers.
        scratch: temporary memory, in tensors of the block's size in the accumulation dtype.
        presets: parameter values of other implementations' variants, by their names, for ``like:``.
        companions: what it reads beside each source, if anything; ``sources`` does not count them.
        centred: whether it may take the mean of three or more sources as the base that it is not given, rather than
            refuse.
        signed: whether its weights are coefficients of any sign and sum: full models whose weights add up to 1 give a
            model, to 0 a task vector. Adapters then stand for their change alone.
        overshoots: what it does, with given parameters, that can go too far where there are many task vectors at full
            weight; by its ``normalize`` and ``divide_by`` if left out. Plans warn of it.
        family: what lists of methods show it with; by its space if left out.
        weighing: what it does with the weights alone, so that a plan refuses those that it raises ``UsageError`` for;
            division by their sum where its ``normalize`` says so, if left out.
        params: the parameter class, where only the statistics take it; else it is read off the annotation of
            the function's ``params``.
        name: the method's name if it is not the function's.

    Raises:
        ValueError: for a declaration that contradicts itself.
    """

    def declare(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        arguments = frozenset(inspect.signature(function).parameters)
        method_name = name or function.__name__
        if unknown := arguments - _ARGUMENTS:
            raise ValueError(f"{method_name}: unknown arguments {sorted(unknown)}; known are {sorted(_ARGUMENTS)}")
        if ("deltas" in arguments) != (space == "deltas"):
            raise ValueError(f"{method_name}: methods on deltas, and only they, take `deltas`")
        if access not in (("two_pass", "rows") if statistics else ("elementwise", "rows", "tensor")):
            raise ValueError(f"{method_name}: two_pass methods have a statistics generator; of others only rows may")
        if random != ("random" in arguments):
            raise ValueError(f"{method_name}: random methods, and only they, take `random`")
        if not inspect.getdoc(function):
            raise ValueError(f"{method_name}: a method needs a docstring")
        require_new("merge method", method_name, function.__module__, REGISTRY, METHODS)
        REGISTRY[method_name] = Method(
            name=method_name,
            function=function,
            params=params or params_class(function),
            space=space,
            access=access,
            sources=sources,
            paper=paper,
            default_weight=default_weight,
            uses_weights="weights" in arguments,
            statistics=statistics,
            scope=scope or (lambda _: "tensor"),
            random=random,
            scratch=scratch,
            presets=presets or {},
            coarser=coarser or (lambda _: None),
            origin=function.__module__,
            arguments=arguments,
            companions=companions,
            centred=centred,
            signed=signed,
            overshoots=overshoots or adds_up,
            family=family or ("task vectors" if space == "deltas" else "average"),
            weighing=weighing,
        )
        return function

    return declare


def adds_up(params: Any) -> str | None:
    """What a method does that divides task vectors by nothing."""
    divided = getattr(params, "normalize", True) and getattr(params, "divide_by", None) != "nothing"
    return None if divided else "adds them up"


def params_class(function: Callable[..., Any]) -> type[Params]:
    """The class that annotates a function's ``params``."""
    parameter = inspect.signature(function).parameters.get("params")
    if parameter is None:
        return Params
    annotation = parameter.annotation
    if isinstance(annotation, str):
        annotation = function.__globals__[annotation]
    if not (isinstance(annotation, type) and issubclass(annotation, Params)):
        raise ValueError(f"{function.__name__}: annotate `params` with a subclass of Params")
    return annotation


def method_slug(name: str) -> str:
    """The name as a command: ``task_arithmetic`` -> ``task-arithmetic``."""
    return re.sub("_", "-", name)


def check_source_count(method: Method, count: int) -> None:
    """Raises UsageError where the method cannot take that many sources."""
    least, most = method.sources
    if count < least or (most is not None and count > most):
        wanted = f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        raise UsageError(f"{method.name} takes {wanted} source{'s' if wanted != 'exactly 1' else ''}, {count} given")
