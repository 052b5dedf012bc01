"""What the spectral methods share: which tensors are matrices, how they are cut, and what happens to the others.

A spectral merge of one matrix is a generator that is sent the sources' matrices, in order and in as many rounds as
it wants, and returns the merged one. So one source is held at a time, however many there are, also where a tensor
is a stack of many matrices.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, FiniteFloat

from mergekit_px.errors import TensorMismatchError, UsageError
from mergekit_px.methods.declare import Params, merge_method, params_class
from mergekit_px.methods.weighting import finite_weights

if TYPE_CHECKING:
    import torch

    from mergekit_px.kernels.svd import SVD

_log = logging.getLogger(__name__)

_TABLE = re.compile(
    r"(.*embed(ding|dings|_tokens|_in|_out|der)?|wte|wpe|lm_head|shared|text_projection|classifier|score|head|heads)"
)


_PERCENTAGE = re.compile(r"\d+(\.\d+)?%")


def _count(value: object) -> object:
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if isinstance(number, int) and not isinstance(number, bool) and number >= 1:
        return number
    if isinstance(number, str) and _PERCENTAGE.fullmatch(number) and float(number[:-1]) > 0:
        return number
    raise ValueError("must be a whole number of at least 1, or a percentage above 0 such as 10%")


def _split(value: object) -> object:
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


Count = Annotated[
    Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=rf"^{_PERCENTAGE.pattern}$")], BeforeValidator(_count)
]
"""A number of components, or a percentage of the rank that a matrix of this shape can have, as ``"10%"``."""


_GROWTH = 1.5
"""Factor of a merge's norm above which a correction is warned of. The ones that fell below the base had 2 and more."""


class SpectralParams(Params):
    scale: FiniteFloat = 1.0
    """Factor of the merged update, of matrices and all other tensors alike."""
    embeddings: Literal["mean", "spectral"] = "mean"
    """Embeddings, output heads and projections into a shared space: the mean of the updates, or as any matrix."""
    split: Annotated[
        Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^\d+(\+\d+)+$")], BeforeValidator(_split)
    ] = 1
    """Merge parts of the first axis apart: a number of equal parts (3 for fused query, key, value) or their sizes
    (2048+512+512)."""
    stack: Literal["auto", "experts", "flatten", "mean"] = "auto"
    """Tensors of more axes than two: a stack of matrices along the first of three (experts), one matrix of flattened
    rows (convolutions), or the mean of the updates, as the authors of most spectral methods do with convolutions.
    Automatic: experts where the name says so, else flattened."""
    recover: Annotated[float, Field(gt=0, le=1)] | None = None
    """Scale each merged matrix so that its sources find this share of their own updates in it, on average. 0.6 suited
    fine-tunes near their base, and was too long for others and for few components (docs/quality.md). The sources are
    read once more."""

    def treats_by_element(self, shape: Sequence[int], name: str) -> bool:
        return cut_into_matrices(shape, name, self) is None


PAPER = {"stack": "mean", "embeddings": "spectral"}
"""What the authors of TSV-M and the isotropic methods treat as matrices: every tensor of two axes, and no other."""


class NoiseParams(SpectralParams):
    noise_floor: bool = True
    """Leave out components that rounding to 16 bits explains, judged by the values of the base and of the sources.
    Without it, methods that flatten spectra amplify them."""


@dataclass(slots=True)
class Case:
    """One matrix to merge."""

    label: str
    shape: tuple[int, int]
    weights: tuple[float, ...]
    """The factors that the deltas have been multiplied by."""
    noise: float = 0.0
    """Largest singular value that rounding gives one delta before its weight; 0 where it is not known."""
    notes: list[str] = field(default_factory=list)
    load_base: Callable[[], torch.Tensor] | None = None
    """Makes the base's matrix, where there is one and the method asked for it."""
    rescaled: bool = False
    """Whether the size of the result is found afterwards, whatever it is."""

    @property
    def count(self) -> int:
        return len(self.weights)

    @property
    def rank(self) -> int:
        return min(self.shape)

    def edge(self, source: int) -> float:
        """Noise edge of a source's weighted delta."""
        return self.noise * abs(self.weights[source])

    def sum_edge(self) -> float:
        """Noise edge of the sum of all: the sources' roundings are independent, the base's is shared."""
        return self.noise * math.sqrt((sum(w * w for w in self.weights) + sum(self.weights) ** 2) / 2)

    def svd(self, matrix: torch.Tensor, rank: int | None = None) -> SVD:
        """The leading components; fallbacks are noted."""
        from mergekit_px.kernels.svd import truncated_svd

        parts = truncated_svd(matrix, rank, label=self.label)
        self.notes += parts.fallbacks
        return parts

    def note_growth(self, before: torch.Tensor, after: torch.Tensor, what: str) -> None:
        """Note that a correction made a merge much longer than it was."""
        length, grown = float(before.norm()), float(after.norm())
        if grown > _GROWTH * length > 0 and not self.rescaled:
            self.notes.append(
                f"{what} makes the update {grown / length:.2g} times as long, which can overshoot (docs/quality.md);"
                " try a smaller scale"
            )

    def above(self, values: torch.Tensor, edge: float, what: str) -> int:
        """How many of the descending singular values stand above a noise edge; all, with a note, if none does."""
        kept = int((values > edge).sum())
        if kept == 0 and len(values):
            self.notes.append(f"{what} does not exceed rounding noise; nothing was clipped")
            return len(values)
        return kept


MatrixMerge = Generator[None, "list[torch.Tensor]", "torch.Tensor"]
"""Takes the sources' matrices, each alone in a list, which it empties: so nothing else holds what it has done with."""


def matrix_method(
    *,
    paper: str,
    scratch: float,
    centred: bool = True,
    uses_base: bool = False,
    scale: float | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    overshoots: Callable[[Any], str | None] | None = None,
) -> Callable[[Callable[[Case, Any], MatrixMerge]], Callable[..., torch.Tensor]]:
    """Declare a spectral method by how it merges one matrix, as :func:`merge_method` declares one by a block.

    Args:
        uses_base: whether it wants the base, to judge noise by or for the merge itself.
        scale: see :func:`merge_matrices`.
    """

    def declare(merge: Callable[[Case, Any], MatrixMerge]) -> Callable[..., torch.Tensor]:
        def with_base(
            deltas: Sequence[torch.Tensor],
            weights: Sequence[float],
            params: SpectralParams,
            name: str,
            load_base: Callable[[], torch.Tensor] | None,
        ) -> torch.Tensor:
            return merge_matrices(
                deltas, weights, params, lambda case: merge(case, params), name=name, load_base=load_base, scale=scale
            )

        def without_base(
            deltas: Sequence[torch.Tensor], weights: Sequence[float], params: SpectralParams, name: str
        ) -> torch.Tensor:
            return with_base(deltas, weights, params, name, None)

        function = with_base if uses_base else without_base
        documentation = inspect.getdoc(merge) or ""
        function.__doc__ = documentation if "\nRaises:" in documentation else documentation + _RAISES
        function.__name__ = function.__qualname__ = merge.__name__
        function.__module__ = merge.__module__
        return merge_method(
            family="spectral",
            space="deltas",
            access="tensor",
            paper=paper,
            scratch=scratch,
            centred=centred,
            presets=presets,
            overshoots=overshoots,
            params=params_class(merge),
        )(function)

    return declare


_RAISES = """

Raises:
    NonFiniteError: a NaN or an infinity in a delta.
    TensorMismatchError: sources of different shapes."""


def component_count(value: int | str, rank: int) -> int:
    """A :data:`Count` for a matrix of that largest rank: percentages are rounded down, to at least 1."""
    if isinstance(value, int):
        return value
    return max(1, int(rank * float(value.rstrip("%")) / 100 + 1e-9))


def is_table(name: str) -> bool:
    """Whether a tensor's name is that of an embedding, an output head or a projection into a shared space."""
    return name == "output.weight" or any(_TABLE.fullmatch(part) for part in name.lower().split("."))


def cut_into_matrices(
    shape: Sequence[int], name: str, params: SpectralParams
) -> list[Callable[[torch.Tensor], torch.Tensor]] | None:
    """Views of a tensor as matrices, which together cover it; None where it is not to be merged as matrices.

    Vectors, scalars, empty tensors, tables (unless wanted), convolutions (if so wanted) and matrices of one row or
    column are none.

    Raises:
        UsageError: the parts of ``split`` do not add up to the first axis.
    """
    if len(shape) < 2 or math.prod(shape) == 0 or (params.embeddings == "mean" and is_table(name)):
        return None
    if len(shape) > 2 and params.stack == "mean":
        return None
    if len(shape) == 3 and (params.stack == "experts" or (params.stack == "auto" and "expert" in name)):
        inner = shape[1:]
        stack = list(range(shape[0]))
    else:
        inner = (shape[0], math.prod(shape[1:]))
        stack = [-1]
    bounds = list(_bounds(inner[0], params.split, name))
    if inner[1] == 1 or any(stop - start == 1 for start, stop in bounds):
        return None

    def view(tensor: torch.Tensor, number: int, start: int, stop: int) -> torch.Tensor:
        matrix = tensor[number] if number >= 0 else tensor.reshape(inner[0], inner[1])
        return matrix[start:stop]

    def viewer(number: int, start: int, stop: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tensor: view(tensor, number, start, stop)

    return [viewer(number, start, stop) for number in stack for start, stop in bounds]


def _bounds(rows: int, split: int | str, name: str) -> Iterator[tuple[int, int]]:
    if isinstance(split, int):
        if rows % split:
            raise UsageError(f"{rows} rows cannot be split into {split} equal parts", where=name or None)
        sizes = [rows // split] * split
    else:
        sizes = [int(size) for size in split.split("+")]
        if sum(sizes) != rows or 0 in sizes:
            raise UsageError(f"the parts {split} do not add up to {rows} rows", where=name or None)
    start = 0
    for size in sizes:
        yield start, start + size
        start += size


def merge_matrices(
    deltas: Sequence[torch.Tensor],
    weights: Sequence[float],
    params: SpectralParams,
    merge: Callable[[Case], MatrixMerge],
    *,
    name: str,
    load_base: Callable[[], torch.Tensor] | None = None,
    scale: float | None = None,
    otherwise: Literal["mean", "first"] = "mean",
) -> torch.Tensor:
    """Merge a tensor's matrices by ``merge``, and what is not a matrix by the mean (or as the first source has it).

    Args:
        deltas: the sources' deltas, gone through once for each round of the merge, one at a time.
        weights: factors of the deltas.
        merge: started for each matrix.
        name: of the tensor.
        load_base: makes the base, of the shape of the deltas, which tells how large rounding noise is.
        scale: factor of the result; that of the parameters if left out.

    Raises:
        NonFiniteError: a NaN or an infinity in a matrix.
        TensorMismatchError: deltas of different shapes.
        UsageError: a split that does not fit, or a weight that is not finite.
    """
    import torch

    finite_weights(weights)
    factor = params.scale if scale is None else scale
    first = deltas[0]
    views = cut_into_matrices(first.shape, name, params)
    if views is None:
        if otherwise == "first":
            return first * factor
        total = torch.zeros_like(first)
        del first
        for source, weight in enumerate(weights):
            delta = _source(deltas, source, total.shape, name)
            total.add_(delta, alpha=weight)
            del delta
        return total.mul_(factor / len(weights))
    shape = first.shape
    noises = [0.0] * len(views) if load_base is None else _noises(first, load_base(), views)
    merged = torch.empty_like(first, memory_format=torch.contiguous_format)
    del first
    cases = []
    for number, (view, noise) in enumerate(zip(views, noises, strict=True)):
        label = name if len(views) == 1 else f"{name}[{number}]"
        like = view(merged)
        case = Case(label, (like.shape[0], like.shape[1]), tuple(weights), noise, rescaled=params.recover is not None)
        if load_base is not None:
            case.load_base = partial(_viewed, view, load_base)
        cases.append(case)
    if params.recover is not None:
        merge = partial(_recovering, merge, params.recover, 1 if otherwise == "first" else 0)
    running = [(view, merge(case)) for case, view in zip(cases, views, strict=True)]
    for _, generator in running:
        next(generator)
    while running:
        for source, weight in enumerate(weights):
            held = [_source(deltas, source, shape, name)]
            going = []
            for number, (view, generator) in enumerate(running):
                matrix = [view(held[0]) if weight == 1 else view(held[0]) * weight]
                if number == len(running) - 1:
                    held.clear()
                if not _advanced(view, generator, matrix, merged):
                    going.append((view, generator))
            running = going
            if not running:
                break
    for case in cases:
        for note in dict.fromkeys(case.notes):
            _log.warning("%s: %s", case.label, note)
    return merged.mul_(factor)


def _viewed(view: Callable[[torch.Tensor], torch.Tensor], load: Callable[[], torch.Tensor]) -> torch.Tensor:
    return view(load())


def sum_of(case: Case) -> MatrixMerge:
    """One round: the sum of the sources' matrices."""
    total = (yield).pop().clone()
    for _ in range(case.count - 1):
        total += (yield).pop()
    return total


_LEAST_SHARE = 0.02
"""Of its sources' updates in a merge that is scaled by :func:`_recovering`: less is chance, and would grow to nothing
that any of them knows."""


def _recovering(merge: Callable[[Case], MatrixMerge], share: float, skipped: int, case: Case) -> MatrixMerge:
    """One more round: ``M`` times ``share / mean_i (<M, D_i> / <D_i, D_i>)``, over the sources that change anything."""
    from mergekit_px.kernels.orthonormal import inner_product, squared_norm

    merged = yield from merge(case)
    shares = []
    for source in range(case.count):
        delta = (yield).pop()
        size = squared_norm(delta)
        if source >= skipped and size > 0:
            shares.append(inner_product(merged, delta) / size)
    mean = sum(shares) / max(1, len(shares))
    if mean < _LEAST_SHARE:
        if shares:
            case.notes.append(f"its sources find {mean:.2g} of their updates in the merge, too little to scale it by")
        return merged
    return merged.mul_(share / mean)


def _noises(
    first: torch.Tensor, base: torch.Tensor, views: Sequence[Callable[[torch.Tensor], torch.Tensor]]
) -> list[float]:
    """What rounding to the dtype that explains the values of both the base and the first source gives each matrix."""
    from mergekit_px.kernels.spectra import ROUNDING_UNIT, rounding_noise_edge, storage_dtype

    dtype = min((storage_dtype(base), storage_dtype(base, first)), key=ROUNDING_UNIT.__getitem__)
    return [rounding_noise_edge(view(base), dtype) for view in views]


def _source(deltas: Sequence[torch.Tensor], number: int, shape: Sequence[int], name: str) -> torch.Tensor:
    delta = deltas[number]
    if tuple(delta.shape) != tuple(shape):
        raise TensorMismatchError(f"sources of shapes {tuple(shape)} and {tuple(delta.shape)}", where=name or None)
    return delta


def _advanced(
    view: Callable[[torch.Tensor], torch.Tensor],
    merge: MatrixMerge,
    matrix: list[torch.Tensor],
    merged: torch.Tensor,
) -> bool:
    """Send the next source's matrix; whether that was the last one, and the result is stored."""
    try:
        merge.send(matrix)
    except StopIteration as finished:
        view(merged).copy_(finished.value)
        return True
    return False
