"""How checkpoints differ from one of them: per tensor and in total, streamed in chunks.

With ``r`` the reference's tensor, ``x`` another's and ``d = x - r``: the norm of ``d`` and its share of that of
``r``, the largest ``|d|``, the cosine of ``x`` and ``r``; between models the cosine of their ``d``, and the share of
elements on which the ``d`` disagree in sign, of those where any ``d`` is not zero. All sums are float64.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.errors import InputError, UsageError
from mergekit_px.inspection.compare_spectra import mean_spectra, spectra
from mergekit_px.inspection.values import Values, offered_values
from mergekit_px.plan.layers import Place, place_of

if TYPE_CHECKING:
    from concurrent.futures import Executor

    import torch

_ELEMENTS = 1 << 18
"""Elements of each model in memory at a time."""


@dataclass
class Difference:
    """Sums over the elements of one tensor, or of all. Index ``i`` is the i-th model beside the reference."""

    reference_square: float
    squares: list[float]
    products: list[float]
    largest: list[float]
    gram: list[list[float]]
    """Products of the differences of model i and model j; the diagonal holds their squared norms."""
    conflicting: int = 0
    touched: int = 0
    identical: list[bool] = field(default_factory=list)

    @classmethod
    def zero(cls, models: int) -> Difference:
        return cls(
            reference_square=0.0,
            squares=[0.0] * models,
            products=[0.0] * models,
            largest=[0.0] * models,
            gram=[[0.0] * models for _ in range(models)],
            identical=[True] * models,
        )

    def add(self, other: Difference) -> None:
        """Add the sums of another part of the same models."""
        self.reference_square += other.reference_square
        self.conflicting += other.conflicting
        self.touched += other.touched
        for i in range(len(self.squares)):
            self.squares[i] += other.squares[i]
            self.products[i] += other.products[i]
            self.largest[i] = _maximum(self.largest[i], other.largest[i])
            self.identical[i] = self.identical[i] and other.identical[i]
            for j in range(len(self.squares)):
                self.gram[i][j] += other.gram[i][j]

    def of(self, model: int) -> dict[str, Any]:
        """The measures of one model against the reference; None where one has no meaning."""
        norm = math.sqrt(self.gram[model][model]) if self.gram[model][model] >= 0 else math.nan
        return {
            "difference": _finite(norm),
            "relative": _finite(norm / math.sqrt(self.reference_square)) if self.reference_square > 0 else None,
            "largest": _finite(self.largest[model]),
            "cosine": _cosine(self.products[model], self.squares[model], self.reference_square),
            "identical": self.identical[model],
        }

    def delta_cosines(self) -> list[list[float | None]]:
        """The cosine of the differences of each pair of models."""
        count = len(self.squares)
        return [
            [_cosine(self.gram[i][j], self.gram[i][i], self.gram[j][j]) for j in range(count)] for i in range(count)
        ]

    def sign_conflicts(self) -> float | None:
        """Share of the changed elements on which the models disagree in sign; None for fewer than two models."""
        if len(self.squares) < 2:
            return None
        return self.conflicting / self.touched if self.touched else 0.0


def compare(
    reference: Checkpoint,
    others: Sequence[Checkpoint],
    *,
    pattern: str = "*",
    spectral: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure the others against the reference; JSON-able, tensors sorted by relative difference, largest first.

    Args:
        others: at least one; all on this machine.
        pattern: glob on tensor names.
        spectral: also decompose the differences, tensor by tensor, each held whole.
        progress: called with bytes read and bytes in all.

    Raises:
        UsageError: nothing to compare with.
        InputError: a tensor that cannot be read.
    """
    from mergekit_px.kernels.workers import workers

    if not others:
        raise UsageError("there is nothing to compare with", hint="give two models, or one and its --base")
    models = [reference, *others]
    bytes_done = 0
    total = Difference.zero(len(others))
    layers: dict[Place, Difference] = {}
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        offered, notes = offered_values(models, stack)
        pool = stack.enter_context(workers())
        names = list(dict.fromkeys(name for values in offered for name in values))
        names = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise InputError(f"no tensor matches '{pattern}'", where=reference.label)
        common, missing, mismatched = _sort_out([model.label for model in models], offered, names)
        total_bytes = sum(values[name].nbytes for name in common for values in offered)
        for name in common:
            found = [values[name] for values in offered]
            sums = compare_tensor(found, pool)
            if sums is None:
                rows.append(_opaque_row(found))
            else:
                total.add(sums)
                layers.setdefault(place_of(name), Difference.zero(len(others))).add(sums)
                rows.append(_row(found, sums))
            if spectral:
                rows[-1] |= spectra(found)
            bytes_done += sum(each.nbytes for each in found)
            if progress is not None:
                progress(bytes_done, total_bytes)
    rows.sort(key=lambda row: -max(map(_rank, row["models"])))
    return {
        "reference": reference.label,
        "models": [model.label for model in others],
        "total": {
            "models": [
                total.of(i)
                | {"tensors_equal": sum(row["models"][i]["identical"] for row in rows), "tensors": len(rows)}
                for i in range(len(others))
            ],
            "delta_cosines": total.delta_cosines(),
            "sign_conflicts": total.sign_conflicts(),
            **(mean_spectra(rows, len(others)) if spectral else {}),
        },
        "tensors": rows,
        "layers": [
            {
                "stack": place.stack,
                "module": place.module,
                "layer": place.layer,
                "models": [sums.of(i) for i in range(len(others))],
                "delta_cosines": sums.delta_cosines(),
                "sign_conflicts": sums.sign_conflicts(),
            }
            for place, sums in layers.items()
        ],
        "missing": missing,
        "mismatched": mismatched,
        "notes": notes,
    }


def _sort_out(
    labels: Sequence[str], offered: Sequence[Mapping[str, Values]], names: Sequence[str]
) -> tuple[list[str], list[dict[str, Any]], list[dict[str, Any]]]:
    """Names that can be compared, names that some model lacks, names whose shapes differ."""
    common, missing, mismatched = [], [], []
    for name in names:
        lacking = [label for label, values in zip(labels, offered, strict=True) if name not in values]
        if lacking:
            missing.append({"name": name, "not_in": lacking})
        elif len({values[name].shape for values in offered}) > 1:
            mismatched.append({"name": name, "shapes": [list(values[name].shape) for values in offered]})
        else:
            common.append(name)
    return common, missing, mismatched


def _row(found: Sequence[Values], sums: Difference) -> dict[str, Any]:
    return {
        "name": found[0].name,
        "shape": list(found[0].shape),
        "dtype": found[0].dtype.name,
        "models": [sums.of(i) for i in range(len(found) - 1)],
        "delta_cosines": sums.delta_cosines(),
        "sign_conflicts": sums.sign_conflicts(),
    }


def _opaque_row(found: Sequence[Values]) -> dict[str, Any]:
    """A tensor that is not made of real numbers torch can compute with: equal bytes or not."""
    empty = dict.fromkeys(("difference", "relative", "largest", "cosine"))
    return {
        "name": found[0].name,
        "shape": list(found[0].shape),
        "dtype": found[0].dtype.name,
        "models": [{**empty, "identical": found[0].same_bytes(other)} for other in found[1:]],
        "delta_cosines": None,
        "sign_conflicts": None,
    }


def _rank(measures: Mapping[str, Any]) -> float:
    """The relative difference; endless where there is one that has no number."""
    if measures["identical"]:
        return 0.0
    return math.inf if measures["relative"] is None else float(measures["relative"])


def compare_tensor(found: Sequence[Values], pool: Executor) -> Difference | None:
    """The sums over one tensor; None if torch cannot compute with it."""
    if not all(values.dtype.arithmetic for values in found):
        return None
    sums = Difference.zero(len(found) - 1)
    elements = math.prod(found[0].shape)
    pieces = [(start, min(start + _ELEMENTS, elements)) for start in range(0, elements, _ELEMENTS)]
    for piece in pool.map(lambda ends: difference_of([values.read(*ends) for values in found]), pieces):
        sums.add(piece)
    return sums


def difference_of(raw: Sequence[torch.Tensor], voters: int | None = None) -> Difference:
    """The sums over one chunk.

    Args:
        raw: the same elements of the reference and of each model, as stored.
        voters: how many of the models, the first ones, count for conflicts of signs; all if None.
    """
    import torch

    reference = raw[0].double()
    others = torch.stack([piece.double() for piece in raw[1:]])
    deltas = others - reference
    positive, negative = (deltas[:voters] > 0).any(dim=0), (deltas[:voters] < 0).any(dim=0)
    return Difference(
        reference_square=float(reference @ reference),
        squares=(others * others).sum(dim=1).tolist(),
        products=(others @ reference).tolist(),
        largest=deltas.abs().amax(dim=1).tolist(),
        gram=(deltas @ deltas.T).tolist(),
        conflicting=int((positive & negative).sum()),
        touched=int((positive | negative).sum()),
        identical=[
            piece.dtype == raw[0].dtype and torch.equal(piece.view(torch.uint8), raw[0].view(torch.uint8))
            for piece in raw[1:]
        ],
    )


def _maximum(left: float, right: float) -> float:
    return math.nan if math.isnan(left) or math.isnan(right) else max(left, right)


def _cosine(product: float, left_square: float, right_square: float) -> float | None:
    if left_square <= 0 or right_square <= 0:
        return None
    value = product / (math.sqrt(left_square) * math.sqrt(right_square))
    return _finite(max(-1.0, min(1.0, value))) if math.isfinite(value) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
