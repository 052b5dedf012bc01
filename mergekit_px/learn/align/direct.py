"""Routes that train nothing: maps between activations, and masks by the signs of gradients."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import PlanError
from mergekit_px.learn.align.forward import ChangedModel
from mergekit_px.learn.align.pieces import pieces_of
from mergekit_px.learn.data import Batch
from mergekit_px.learn.labels import real_rows
from mergekit_px.learn.models import LearningModel
from mergekit_px.learn.outputs import Precision, predict

MAPS_FILE = "maps.safetensors"
SIGNS_FILE = "signs.safetensors"

_OUTPUTS = re.compile(r"(?P<layer>.+)\[(?P<start>\d+):(?P<stop>\d+)\]\.outputs")

Crossed = dict[str, tuple[Tensor, Tensor]]
"""Layer -> products of the activations of both models: of its inputs (d_A, d_B), and of its outputs."""


def procrustes(product: Tensor) -> Tensor:
    """``U V'`` of the reduced SVD of ``H_A' H_B``, shape (d_A, d_B): the map of orthonormal rows or columns nearest to
    what takes the activations of A to those of B. Of directions that do not occur in them it is the map nearest to the
    identity: their singular vectors would be rounding alone."""
    wide = product.double()
    tolerance = torch.finfo(product.dtype).eps * max(wide.shape)
    left, sizes, right = torch.linalg.svd(wide, full_matrices=False)
    occurring = sizes > tolerance * sizes[0]
    left, right = left[:, occurring], right[occurring]
    nearest = left @ right
    if not bool(occurring.all()):
        rest = torch.eye(*wide.shape, dtype=wide.dtype, device=wide.device)
        rest -= left @ (left.T @ rest)
        rest -= (rest @ right.T) @ right
        left, sizes, right = torch.linalg.svd(rest, full_matrices=False)
        nearest += left[:, sizes > tolerance] @ right[sizes > tolerance]
    found: Tensor = nearest.to(product.dtype)
    return found


@torch.no_grad()
def crossed_activations(
    source: LearningModel, target: LearningModel, batches: Iterable[Batch], precision: Precision = "float32"
) -> Crossed:
    """Run both models on the same batches and multiply what their linear layers of equal names see."""
    found: Crossed = {}
    pairs = {name: (source.module.get_submodule(own), target.module.get_submodule(other))
             for name, own, other in _shared_layers(source, target)}  # fmt: skip
    for batch in batches:
        with _recorded({name: own for name, (own, _) in pairs.items()}) as of_source:
            predict(source.module, batch, precision)
        with _recorded({name: other for name, (_, other) in pairs.items()}) as of_target:
            predict(target.module, batch, precision)
        for name in of_source.keys() & of_target.keys():
            seen = zip(of_source[name], of_target[name], strict=True)
            products = [real_rows(a, batch).T @ real_rows(b, batch) for a, b in seen]
            before = found.get(name)
            found[name] = (products[0], products[1]) if before is None else (
                before[0] + products[0], before[1] + products[1]
            )  # fmt: skip
    return found


@torch.no_grad()
def activation_maps(crossed: Crossed) -> dict[str, Tensor]:
    """``LAYER[rows].outputs`` (rows of A, rows of B) and ``LAYER[rows].inputs`` (d_A, d_B) for every linear layer.

    The rows are those of the source; fused projections are taken in their three parts.
    """
    maps: dict[str, Tensor] = {}
    for layer, (inner, outer) in crossed.items():
        weight = f"{layer}.weight"
        inward = procrustes(inner)
        for own, other in zip(
            pieces_of(weight, outer.shape[0], inner.shape[0]),
            pieces_of(weight, outer.shape[1], inner.shape[1]),
            strict=True,
        ):
            label = f"{layer}[{own.start}:{own.stop}]"
            maps[f"{label}.outputs"] = procrustes(outer[own.start : own.stop, other.start : other.stop])
            maps[f"{label}.inputs"] = inward.clone()
    return maps


@torch.no_grad()
def theseus(deltas: Mapping[str, Tensor], maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``T_out' D T_in`` for weights and ``b T_out`` for biases of linear layers (arXiv 2602.12952), across widths.

    Other tensors are as they were.

    Args:
        deltas: of the source model.
        maps: as `activation_maps` names them.

    Raises:
        PlanError: a tensor does not have the rows or columns of its maps.
    """
    layers: dict[str, list[tuple[slice, Tensor, Tensor]]] = {}
    for name, outward in maps.items():
        matched = _OUTPUTS.fullmatch(name)
        if matched is not None:
            inward = maps[f"{name.removesuffix('.outputs')}.inputs"]
            rows = slice(int(matched["start"]), int(matched["stop"]))
            layers.setdefault(matched["layer"], []).append((rows, outward, inward))
    moved = dict(deltas)
    for layer, pieces in layers.items():
        for leaf in ("weight", "bias"):
            name = f"{layer}.{leaf}"
            if name not in deltas:
                continue
            delta, turned_parts = deltas[name], []
            for rows, outward, inward in sorted(pieces, key=lambda piece: piece[0].start):
                part = delta[rows]
                if len(part) != len(outward) or (leaf == "weight" and part.shape[1] != len(inward)):
                    raise PlanError(f"{shown(name)} is {list(delta.shape)}, which its maps do not fit")
                turned = outward.to(delta).T @ part
                turned_parts.append(turned @ inward.to(delta) if leaf == "weight" else turned)
            moved[name] = torch.cat(turned_parts)
    return moved


def gradient_signs(
    model: ChangedModel, batches: Iterable[Batch], names: Iterable[str], *, majority: bool
) -> dict[str, Tensor]:
    """The signs in which each element lowers the loss: by a vote of single examples, or minus that of the mean.

    0 where votes or gradients cancel.
    """
    wanted = list(names)
    zeros = {name: torch.zeros_like(model.sites[name].value).requires_grad_() for name in wanted}
    totals = {name: torch.zeros_like(model.sites[name].value) for name in wanted}
    for batch in batches:
        rows = len(next(iter(batch.values())))
        singles = [{name: array[row : row + 1] for name, array in batch.items()} for row in range(rows)]
        for one in singles if majority else [batch]:
            loss = model.loss(zeros, one)
            gradients = torch.autograd.grad(loss, list(zeros.values()), allow_unused=True)
            for name, gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    totals[name] -= gradient.sign() if majority else rows * gradient
    return {name: total.sign() for name, total in totals.items()}


def gradfix(deltas: Mapping[str, Tensor], signs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The elements of a task vector that have the sign in which the loss falls (arXiv 2510.09658); the others are 0."""
    return {name: delta * (delta.sign() == signs[name]) for name, delta in deltas.items() if name in signs}


def _shared_layers(source: LearningModel, target: LearningModel) -> list[tuple[str, str, str]]:
    """Linear layers that both models have: name in the checkpoint, and path in either module."""
    found = []
    for name in target.names:
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or name not in source.names:
            continue
        paths = [model.names[name].rpartition(".")[0] for model in (source, target)]
        owners = [model.module.get_submodule(path) for model, path in zip((source, target), paths, strict=True)]
        if all(isinstance(owner, nn.Linear) for owner in owners):
            found.append((layer, paths[0], paths[1]))
    return found


@contextmanager
def _recorded(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What the layers take and give in the next forward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = inputs[0].float(), output.float()

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
