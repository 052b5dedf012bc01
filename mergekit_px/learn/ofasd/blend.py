"""Base plus scaled task vectors, in a model's own parameters, and the gradient of the scales.

With ``theta = theta_0 + sum_i c_ij tau_i`` in block j, ``dL/dc_ij = <dL/dtheta_j, tau_ij>``: after one backward pass
each task vector is needed once more and only tensor by tensor, so that they never have to be in memory together.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
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
from mergekit_px.errors import PlanError, TensorMismatchError
from mergekit_px.kernels.reduction import weighted_sum
from mergekit_px.learn.models import LearningModel, read_elements, read_tensor
from mergekit_px.learn.ofasd.blocks import Blocks, Parameter
from mergekit_px.learn.sources import open_source

_PIECE = 1 << 21
"""Elements of a tensor that are read and computed at a time."""


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


def check_sources(base: Checkpoint, sources: Sequence[Checkpoint]) -> None:
    """Raise ``PlanError`` where a source does not belong to the base: names, shapes, or another base's task vector."""
    known: str | None = None
    for source in sources:
        missing = [name for name in base.tensors if name not in source.tensors]
        extra = [name for name in source.tensors if name not in base.tensors]
        if missing or extra:
            what = f"it lacks {shown(missing[0])}" if missing else f"the base has no {shown(extra[0])}"
            raise TensorMismatchError(f"not a fine-tune of {base.label}: {what}", where=source.label)
        for name, stored in base.tensors.items():
            if source.tensors[name].shape != stored.shape:
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

    Nothing that is computed is larger than a piece of a tensor.

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
        self._base, *self._sources = (_Values(one, sites, keep=not stream) for one in (base, *sources))

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
            first, count = self.blocks.tensors[site.name]
            rows = coefficients[:, first : first + count]
            used = rows.any(dim=1).nonzero().flatten().tolist()
            rows = rows[used]
            groups = None if count == 1 else self._groups(site, count)
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
    def gradients(self, values: Tensor) -> Iterator[None]:
        """Inside, backward passes add the gradient of the coefficients to ``values.grad``, tensor by tensor as the
        gradients of the parameters come, which keep none."""

        def hook(site: Site, parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                return
            first, count = self.blocks.tensors[site.name]
            values.grad = torch.zeros_like(values) if values.grad is None else values.grad
            values.grad[:, first : first + count] += self._slopes(site, gradient, count).to(values)

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
    def _slopes(self, site: Site, gradient: Tensor, count: int) -> Tensor:
        """The gradient of the coefficients of a tensor, (sources, its blocks), float64."""
        groups = None if count == 1 else self._groups(site, count)
        slope = gradient.flatten()
        found = torch.zeros(len(self._sources), count, dtype=torch.float64, device=slope.device)
        for piece in _pieces(site):
            base = self._base.read(site, piece)
            for row, delta in enumerate(self._deltas(site, piece, base, range(len(self._sources)))):
                if groups is None:
                    found[row] += torch.dot(slope[piece], delta)
                else:
                    found[row] += torch.bincount(groups[piece], (slope[piece] * delta).double(), count)
        return found

    def _groups(self, site: Site, count: int) -> Tensor:
        return group_numbers(self.blocks.seed, site.name, site.target.numel(), count, site.target.device)

    def _deltas(self, site: Site, piece: slice, base: Tensor, sources: Iterable[int]) -> Iterator[Tensor]:
        """Pieces of the task vectors of some sources, one after another; each only until the next is taken."""
        delta = torch.empty(piece.stop - piece.start, dtype=site.target.dtype, device=site.target.device)
        for number in sources:
            source = self._sources[number]
            delta.copy_(source.read(site, piece))
            yield delta if source.are_differences else delta.sub_(base)


class _Values:
    """What a checkpoint holds at the sites of a model, as it is stored: in memory, or in its files."""

    def __init__(self, checkpoint: Checkpoint, sites: Sequence[Site], *, keep: bool) -> None:
        self.are_differences = is_task_vector(checkpoint)
        self._tensors = checkpoint.tensors
        self._reader = open_source(checkpoint)
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._kept: dict[str, Tensor] = {}
        for site in sites if keep else ():
            stored = self._tensors[site.name]
            self._kept[site.name] = read_tensor(self._reader, stored).to(site.target.device).flatten()

    def read(self, site: Site, piece: slice) -> Tensor:
        """Some elements, in row order; until the next are read."""
        if site.name in self._kept:
            found = self._kept[site.name][piece]
        else:
            stored = self._tensors[site.name]
            room = (piece.stop - piece.start) * stored.dtype.bits // 8
            if len(self._memory) < room:  # fresh pages cost more than the bytes that fill them
                self._memory = torch.empty(room, dtype=torch.uint8)
            found = read_elements(self._reader, stored, piece, self._memory).to(site.target.device)
        return found if found.element_size() > 1 else found.to(site.target.dtype)

    def close(self) -> None:
        self._kept.clear()
        self._reader.close()


def _pieces(site: Site) -> Iterator[slice]:
    count = site.target.numel()
    return (slice(start, min(start + _PIECE, count)) for start in range(0, count, _PIECE))
