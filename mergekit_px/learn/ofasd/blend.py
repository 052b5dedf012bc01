"""Base plus scaled task vectors, in a model's own parameters, and the gradient of the scales.

With ``theta = theta_0 + sum_i c_ij tau_i`` in block j, ``dL/dc_ij = <dL/dtheta_j, tau_ij>``: each task vector is needed
only tensor by tensor, so that they never have to be in memory together. Where a coefficient can take its step as soon
as its gradient is known, the tensor is summed up anew while its task vectors are there: they are read once a step.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mergekit_px.artefacts.coefficients import group_numbers
from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.fingerprint import fingerprint
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.task_vector import base_fingerprint, is_task_vector
from mergekit_px.checkpoint.whole import read_elements, read_tensor
from mergekit_px.errors import PlanError, TensorMismatchError
from mergekit_px.kernels.reduction import integer_ratio, weighted_sum
from mergekit_px.learn.models import LearningModel
from mergekit_px.learn.ofasd.blocks import Blocks, Parameter
from mergekit_px.learn.sources import open_source

_PIECE = 1 << 21
"""Elements of a tensor that are computed at a time."""

Advance = Callable[[int, slice], Tensor | None]
"""Lets the coefficients of a source in some columns take their step and returns them, float64; None before the last
backward pass of a step."""


@dataclass(frozen=True)
class Site:
    """A floating-point array of the model, by its first name in the checkpoint."""

    name: str
    names: tuple[str, ...]
    target: Tensor

    @property
    def is_parameter(self) -> bool:
        return isinstance(self.target, torch.nn.Parameter)

    @property
    def value(self) -> Tensor:
        """What it holds, in float32 at least."""
        found = self.target.detach()
        return found if found.element_size() >= 4 else found.float()


def find_sites(model: LearningModel) -> list[Site]:
    """The arrays of a model that are scaled, tied names together.

    Raises:
        PlanError: the class keeps a tensor in another form than the checkpoint.
    """
    assert model.checkpoint is not None
    state = model.module.state_dict(keep_vars=True)
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for name, stored in model.checkpoint.tensors.items():
        if name not in model.names:
            raise PlanError(
                f"{type(model.module).__name__} keeps {shown(name)} in another form than the checkpoint",
                where=model.checkpoint.label,
                hint="give a function that makes a model with the checkpoint's own tensors: --model file.py:function",
            )
        target = state[model.names[name]]
        if target.is_floating_point() and stored.dtype.arithmetic:
            found.setdefault(id(target), (target, []))[1].append(name)
            if not target.is_contiguous():
                target.data = target.data.contiguous()
    return [Site(names[0], tuple(names), target) for target, names in found.values()]


def parameters_of(sites: Sequence[Site]) -> tuple[list[Parameter], list[str]]:
    """The arrays that learn, and the names of the others."""
    parameters = [Parameter(site.names, tuple(site.target.shape)) for site in sites if site.is_parameter]
    return parameters, [name for site in sites if not site.is_parameter for name in site.names]


def check_sources(
    base: Checkpoint, sources: Sequence[Checkpoint], apart: Callable[[str], bool] = lambda name: False
) -> None:
    """Raise ``PlanError`` where a source does not belong to the base: names, shapes, or another base's task vector.

    Args:
        apart: tensors that may be others.
    """
    known: str | None = None
    for source in sources:
        missing = [name for name in base.tensors if name not in source.tensors and not apart(name)]
        extra = [name for name in source.tensors if name not in base.tensors and not apart(name)]
        if missing or extra:
            what = f"it lacks {shown(missing[0])}" if missing else f"the base has no {shown(extra[0])}"
            raise TensorMismatchError(f"not a fine-tune of {base.label}: {what}", where=source.label)
        for name, stored in base.tensors.items():
            if not apart(name) and source.tensors[name].shape != stored.shape:
                shapes = f"{list(source.tensors[name].shape)} and {list(stored.shape)} in {base.label}"
                raise TensorMismatchError(f"{shown(name)} has shape {shapes}", where=source.label)
        recorded = base_fingerprint(source) if is_task_vector(source) else None
        if recorded is not None:
            if known is None:
                with closing(open_reader(base)) as reader:
                    known = fingerprint(base, reader)
            if recorded != known:
                raise PlanError(
                    f"the task vector was taken from another base than {base.label}",
                    where=source.label,
                    hint="give the base that it was subtracted from",
                )


class Blend:
    """A model whose parameters are the base plus scaled task vectors.

    Nothing that is computed is larger than a piece of a tensor. What the parameters are set to is remembered, so that
    only those are summed up whose coefficients changed.

    Args:
        sites: of the model, on the device.
        blocks: their blocks.
        sources: fine-tunes or task vectors, as `check_sources` accepts them.
        stream: read base and sources from their files whenever they are needed, instead of keeping them.
    """

    def __init__(
        self, sites: Sequence[Site], blocks: Blocks, base: Checkpoint, sources: Sequence[Checkpoint], *, stream: bool
    ) -> None:
        self.sites = sites
        self.blocks = blocks
        self._base = _Values(base, sites, _Room(), keep=not stream)
        room = _Room()
        self._sources = [_Values(one, sites, room, keep=not stream) for one in sources]
        self._held: dict[str, Tensor] = {}

    def with_blocks(self, blocks: Blocks) -> Blend:
        """The same model, task vectors and files with other blocks."""
        other = copy.copy(self)
        other.blocks = blocks
        return other

    @property
    def source_count(self) -> int:
        """How many task vectors there are."""
        return len(self._sources)

    def close(self) -> None:
        """Release the files."""
        for values in (self._base, *self._sources):
            values.close()

    @torch.no_grad()
    def assemble(self, coefficients: Tensor) -> None:
        """Set the model to the base plus the task vectors times ``coefficients``, float64, (sources, blocks).

        The sums are those of the method ``anisotropic``, term by term.
        """
        for site in self.sites:
            rows = coefficients[:, self._columns(site)]
            if site.is_parameter and self._holds(site, rows):
                continue
            self._held[site.name] = rows.clone()
            used = rows.any(dim=1).nonzero().flatten().tolist()
            rows = rows[used]
            groups = self._groups(site)
            target = site.target.detach().view(-1)
            for piece in _pieces(site):
                base = self._base.read(site, piece)
                if not used:
                    target[piece].copy_(base)
                    continue
                deltas = self._deltas(site, piece, base, used)
                if groups is None:
                    total = weighted_sum(deltas, rows[:, 0].tolist())
                else:
                    total = torch.zeros_like(target[piece])
                    for delta, row in zip(deltas, rows, strict=True):
                        total.addcmul_(delta, row.to(total)[groups[piece]])
                target[piece].copy_(total.add_(base))

    @contextmanager
    def gradients(self, values: Tensor, advance: Advance = lambda source, columns: None) -> Iterator[None]:
        """Inside, backward passes add the gradient of the coefficients to ``values.grad``, tensor by tensor as the
        gradients of the parameters come, which keep none.

        A tensor whose coefficients are its own, and take their step by ``advance``, is set to the new ones at once.
        """
        users = Counter(self._columns(site).start for site in self.sites)

        def hook(site: Site, parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                return
            values.grad = torch.zeros_like(values) if values.grad is None else values.grad
            own = users[self._columns(site).start] == 1
            self._descend(site, gradient.flatten(), values.grad, advance if own else lambda source, columns: None)

        hooks = [
            site.target.register_post_accumulate_grad_hook(partial(hook, site))
            for site in self.sites
            if site.is_parameter
        ]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    @torch.no_grad()
    def _descend(self, site: Site, gradient: Tensor, slopes: Tensor, advance: Advance) -> None:
        """Add the gradients of a tensor's coefficients to ``slopes``; where they then advance, set the tensor anew.

        The new sum is that of `assemble`, term by term. It overwrites the tensor, which nothing needs after its
        gradient is there.
        """
        columns, groups = self._columns(site), self._groups(site)
        target = site.target.detach().view(-1)
        whole = slice(0, target.numel())
        base = self._base.read(site, whole)
        rows: list[Tensor] = []
        for number in range(len(self._sources)):
            values = self._sources[number].read(site, whole)
            slope = slopes[number, columns]
            for piece in _pieces(site):
                delta = self._delta(number, values[piece], base[piece], target)
                if groups is None:
                    slope += torch.dot(gradient[piece], delta)
                else:
                    products = (gradient[piece] * delta).double()
                    slope += torch.bincount(groups[piece], products, len(slope))
            row = advance(number, columns)
            if row is None or not bool(row.to(target.dtype).isfinite().all()):
                continue
            if not rows:
                self._held.pop(site.name, None)
            begun = any(bool(one.any()) for one in rows)
            rows.append(row.clone())
            for piece in _pieces(site) if bool(row.any()) else ():
                delta = self._delta(number, values[piece], base[piece], target)
                if groups is not None:
                    start = target[piece] if begun else target[piece].zero_()
                    start.addcmul_(delta, row.to(delta)[groups[piece]])
                elif begun:
                    target[piece].add_(delta, alpha=float(row))
                else:
                    torch.mul(delta, float(row), out=target[piece])
        if len(rows) < len(self._sources):
            return
        used = [row for row in rows if bool(row.any())]
        if used:
            target.add_(base)
        else:
            target.copy_(base)
        if not used or groups is not None or integer_ratio(tuple(map(float, used)))[1] == 1:
            # `assemble` rounds other sums in another way
            self._held[site.name] = torch.stack(rows)

    def _columns(self, site: Site) -> slice:
        first, count = self.blocks.tensors[site.name]
        return slice(first, first + count)

    def _holds(self, site: Site, rows: Tensor) -> bool:
        held = self._held.get(site.name)
        return held is not None and torch.equal(held, rows)

    def _groups(self, site: Site) -> Tensor | None:
        """The number of each element's block, where a tensor has several."""
        _, count = self.blocks.tensors[site.name]
        if count == 1:
            return None
        return group_numbers(self.blocks.seed, site.name, site.target.numel(), count, site.target.device)

    def _deltas(self, site: Site, piece: slice, base: Tensor, sources: Iterable[int]) -> Iterator[Tensor]:
        """Pieces of the task vectors of some sources, one after another; each only until the next is taken."""
        for number in sources:
            yield self._delta(number, self._sources[number].read(site, piece), base, site.target)

    def _delta(self, number: int, values: Tensor, base: Tensor, like: Tensor) -> Tensor:
        """A piece of a task vector, in fresh memory."""
        delta = values.to(like.dtype, copy=True)
        return delta if self._sources[number].are_differences else delta.sub_(base)


class _Room:
    """Memory that is used again: fresh pages cost more than the bytes that fill them."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of(self, size: int) -> Tensor:
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory


class _Values:
    """What a checkpoint holds at the sites of a model, as it is stored: in memory, or in its files."""

    def __init__(self, checkpoint: Checkpoint, sites: Sequence[Site], room: _Room, *, keep: bool) -> None:
        self.are_differences = is_task_vector(checkpoint)
        self._tensors = checkpoint.tensors
        self._reader = open_source(checkpoint)
        self._room = room
        self._kept: dict[str, Tensor] = {}
        for site in sites if keep else ():
            stored = self._tensors[site.name]
            self._kept[site.name] = read_tensor(self._reader, stored).to(site.target.device).flatten()

    def read(self, site: Site, piece: slice) -> Tensor:
        """Some elements, in row order; until the next are read into the same room."""
        if site.name in self._kept:
            found = self._kept[site.name][piece]
        else:
            stored = self._tensors[site.name]
            memory = self._room.of((piece.stop - piece.start) * stored.dtype.bits // 8)
            found = read_elements(self._reader, stored, piece, memory).to(site.target.device)
        return found if found.element_size() > 1 else found.to(site.target.dtype)

    def close(self) -> None:
        self._kept.clear()
        self._reader.close()


def _pieces(site: Site) -> Iterator[slice]:
    count = site.target.numel()
    return (slice(start, min(start + _PIECE, count)) for start in range(0, count, _PIECE))
