"""The permutations of one base that fit another, from two checkpoints; no data, no forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.whole import read_tensors
from mergekit_px.errors import NonFiniteError, PlanError, TensorMismatchError
from mergekit_px.learn.align.assignment import require_solver
from mergekit_px.learn.align.fixed import Artefact, FixedMap
from mergekit_px.learn.align.forward import ChangedModel
from mergekit_px.learn.align.head_counts import head_counts, require_equal_heads
from mergekit_px.learn.align.layout import find_layout
from mergekit_px.learn.align.matching import match, random_permutations
from mergekit_px.learn.align.permutations import Layout, Permutations
from mergekit_px.learn.align.settings import AlignSettings
from mergekit_px.learn.data import Batch

PERMUTATIONS_FILE = "permutations.safetensors"

_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Rebasin:
    """Permutations as a transport, and themselves."""

    permutations: Permutations
    map: FixedMap


def find_rebasin(
    source: Checkpoint,
    target: Checkpoint,
    settings: AlignSettings,
    metadata: Mapping[str, str],
    say: Callable[[str], None] = lambda line: None,
) -> Rebasin:
    """Match the source base to the target base.

    Both are read whole, in float32 (only the tensors that something permutes).

    Args:
        metadata: for the header of the file.
        say: gets a line now and then.

    Raises:
        UsageError: no number of heads, a role that there is not, or scipy is not installed.
        PlanError: tensors that cannot be placed, or shapes or head counts that differ.
        NonFiniteError: a NaN or an infinity in a base.
    """
    require_solver()
    counts = head_counts(target, settings.heads, settings.kv_heads, settings.positions)
    if "heads" in settings.permute:
        theirs = head_counts(source, settings.heads, settings.kv_heads, settings.positions)
        require_equal_heads(source, target, counts, theirs)
    shapes = {name: stored.shape for name, stored in target.tensors.items() if stored.dtype.arithmetic}
    layout = find_layout(shapes, counts, settings.permute, settings.roles, target.label)
    _require_equal_shapes(layout, source, target)
    names = sorted({part.tensor for _, part in layout.parts()})
    ours = _finite_tensors(target, names)
    found = match(
        layout,
        _finite_tensors(source, [name for name in names if name in source.tensors]),
        ours,
        by=settings.match,
        inside=settings.inside,
        rounds=settings.rounds,
        seed=settings.seed,
        say=say,
    )
    chance = random_permutations(layout, ours, settings.inside, settings.seed)
    report = {
        "axes": len(found.permutations.orders),
        "attention_layers": len(layout.attention),
        "mlps": len(layout.hidden),
        "residual_channels": layout.width,
        "left_alone": dict(layout.left_alone),
        "rounds": found.rounds,
        "stable": found.stable,
        "moved": found.permutations.moved(),
        "similarity": {"before": found.similarity[0], "after": found.similarity[1]},
    }
    transport = FixedMap(
        found.permutations.transport,
        Artefact(PERMUTATIONS_FILE, found.permutations.arrays(), metadata),
        {"permutations": report},
        {"random permutation": chance.transport},
    )
    return Rebasin(found.permutations, transport)


@torch.no_grad()
def function_change(permutations: Permutations, model: ChangedModel, batch: Batch) -> float:
    """How far the target's logits move, relative to the largest, when all its own tensors are permuted: not at all,
    if the permutations are symmetries of what it computes.

    Raises:
        PlanError: they are not.
    """
    before = model.logits({}, batch, precision="float32")  # rounding would hide what permutations change
    permuted = {name: permutations.permute(name, site.value) - site.value for name, site in model.sites.items()}
    after = model.logits(permuted, batch, precision="float32")
    change = float((after - before).abs().max() / before.abs().max().clamp_min(torch.finfo(before.dtype).tiny))
    if not change <= _TOLERANCE:
        raise PlanError(
            f"the model is not built as its names tell: permuted, it computes something else (by {change:.2g})",
            hint="say what its tensors are with --place, or permute less (--permute mlp)",
        )
    return change


def _require_equal_shapes(layout: Layout, source: Checkpoint, target: Checkpoint) -> None:
    """Blocks have to be there in both models; what is outside may differ (other classes, another vocabulary)."""
    inner = [part.tensor for key, part in layout.parts() if key != "residual"]
    streamed = [part.tensor for key, part in layout.parts() if key == "residual"] if not inner else []
    for name in [*inner, *streamed]:
        if name not in source.tensors:
            raise TensorMismatchError(f"it has no {shown(name)}, which {target.label} has", where=source.label)
        ours, theirs = target.tensors[name].shape, source.tensors[name].shape
        if ours != theirs:
            raise TensorMismatchError(
                f"{shown(name)} is {list(theirs)} in {source.label} and {list(ours)} in {target.label}:"
                " permutations need equal shapes",
                hint="--route theseus goes across widths",
            )


def _finite_tensors(checkpoint: Checkpoint, names: list[str]) -> dict[str, Tensor]:
    found = {name: tensor.float() for name, tensor in read_tensors(checkpoint, names).items()}
    for name, tensor in found.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{shown(name)} holds a NaN or an infinity", where=checkpoint.label)
    return found
