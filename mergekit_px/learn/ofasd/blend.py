"""Base plus scaled task vectors, in a model's own parameters, and the gradient of the scales.

With ``theta = theta_0 + sum_i c_ij tau_i`` in block j, ``dL/dc_ij = <dL/dtheta_j, tau_ij>``: after one backward pass
each task vector is needed once more and only tensor by tensor, so that they never have to be in memory together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

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
from mergekit_px.learn.models import LearningModel, read_tensor
from mergekit_px.learn.ofasd.blocks import Blocks, Parameter
from mergekit_px.learn.sources import open_source


@dataclass(frozen=True)
class Site:
    """A floating-point array of the model, by its first name in the checkpoint, and what it is in the base."""

    name: str
    names: tuple[str, ...]
    target: Tensor
    base: Tensor

    @property
    def is_parameter(self) -> bool:
        return isinstance(self.target, torch.nn.Parameter)


def find_sites(model: LearningModel) -> list[Site]:
    """The arrays of a model that are scaled, tied names together. Copies the model once.

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
    return [Site(names[0], tuple(names), target, target.detach().clone()) for target, names in found.values()]


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

    Args:
        sites: of the model, on the device.
        blocks: their blocks.
        sources: fine-tunes or task vectors, as `check_sources` accepts them.
        stream: read task vectors from their files whenever they are needed, instead of keeping them.
    """

    def __init__(self, sites: Sequence[Site], blocks: Blocks, sources: Sequence[Checkpoint], *, stream: bool) -> None:
        self.sites = sites
        self.blocks = blocks
        self._sources = sources
        self._readers = [open_source(source) for source in sources]
        self._kept: dict[str, list[Tensor]] = {}
        self._memory = _Memory(sites, sources)
        if not stream:
            self._kept = {site.name: [self._read(site, number) for number in range(len(sources))] for site in sites}

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
        for reader in self._readers:
            reader.close()

    @torch.no_grad()
    def assemble(self, coefficients: Tensor) -> None:
        """Set the model to the base plus the task vectors times ``coefficients``, float64, (sources, blocks).

        The sums are those of the method ``anisotropic``, term by term.
        """
        for site in self.sites:
            first, count = self.blocks.tensors[site.name]
            rows = coefficients[:, first : first + count]
            used = rows.any(dim=1).nonzero().flatten().tolist()
            if not used:
                site.target.copy_(site.base)
                continue
            rows = rows[used]
            if count == 1:
                total = weighted_sum(self._deltas(site, used), rows[:, 0].tolist())
            else:
                groups = self._groups(site, count)
                total = torch.zeros_like(site.base)
                for delta, row in zip(self._deltas(site, used), rows, strict=True):
                    total.addcmul_(delta, row.to(total)[groups].view_as(total))
            site.target.copy_(total.add_(site.base))

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """The gradient of the coefficients after a backward pass; float64, (sources, blocks), on the CPU."""
        result = torch.zeros(len(self._sources), len(self.blocks.names), dtype=torch.float64)
        everyone = range(len(self._sources))
        for site in self.sites:
            gradient = site.target.grad
            if gradient is None:
                continue
            first, count = self.blocks.tensors[site.name]
            groups = None if count == 1 else self._groups(site, count)
            slope = gradient.flatten()
            slope = slope.float() if slope.element_size() < 4 else slope
            rows = []
            for delta in self._deltas(site, everyone):
                if groups is None:
                    rows.append(torch.dot(slope, delta.flatten().to(slope))[None])
                else:
                    rows.append(torch.bincount(groups, (slope * delta.flatten()).double(), count))
            result[:, first : first + count] += torch.stack(rows).cpu()
        return result

    def _groups(self, site: Site, count: int) -> Tensor:
        return group_numbers(self.blocks.seed, site.name, math.prod(site.base.shape), count, site.base.device)

    def _deltas(self, site: Site, sources: Iterable[int]) -> Iterator[Tensor]:
        """The task vectors of some sources at one place, one after another; each only until the next is taken."""
        kept = self._kept.get(site.name)
        return (self._read(site, number, self._memory) if kept is None else kept[number] for number in sources)

    def _read(self, site: Site, number: int, memory: _Memory | None = None) -> Tensor:
        source = self._sources[number]
        stored = source.tensors[site.name]
        if memory is None:
            value = read_tensor(self._readers[number], stored).to(site.base)
        else:
            value = memory.like(site.base, read_tensor(self._readers[number], stored, memory.raw))
        return value if is_task_vector(source) else value.sub_(site.base)


class _Memory:
    """Memory that task vectors are read into again and again: fresh pages cost more than the bytes that fill them."""

    def __init__(self, sites: Sequence[Site], sources: Sequence[Checkpoint]) -> None:
        self._largest = max((site.base.numel() for site in sites), default=0)
        self._bytes = max((source.tensors[site.name].nbytes for site in sites for source in sources), default=0)
        self._raw: Tensor | None = None
        self._value: Tensor | None = None

    @property
    def raw(self) -> Tensor:
        """uint8, enough for any tensor as it is stored."""
        if self._raw is None:
            self._raw = torch.empty(self._bytes, dtype=torch.uint8)
        return self._raw

    def like(self, base: Tensor, read: Tensor) -> Tensor:
        """What was read, in the dtype and on the device of ``base``."""
        if read.dtype == base.dtype and base.device.type == "cpu":
            return read
        if self._value is None:
            self._value = torch.empty(self._largest, dtype=base.dtype, device=base.device)
        return self._value[: base.numel()].view(base.shape).copy_(read)
