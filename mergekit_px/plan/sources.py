"""What of the sources their owner may not have meant: equal models, sums that overshoot, values that are copied."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from itertools import combinations

from mergekit_px.checkpoint.contents import Checkpoint, CheckpointFile
from mergekit_px.checkpoint.whole import read_bytes
from mergekit_px.errors import InputError
from mergekit_px.methods import find_method
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.model import WorkItem
from mergekit_px.plan.nodes import Node, Read
from mergekit_px.recipe.model import Recipe

_FULL_WEIGHT = 3.0
"""Task vectors at full weight that are summed before it is warned. Two are what the field's first papers add."""

_COMPARED = 1 << 20
"""Bytes of a tensor up to which it is compared."""

ContentHash = Callable[[str, Checkpoint, CheckpointFile], str | None]
"""What is the same for files of the same bytes; None where that is not known. Called with the name of the input (or
``input#number`` of its adapter), its checkpoint and the file."""


def equal_sources(recipe: Recipe, inputs: Mapping[str, ResolvedInput], content: ContentHash) -> list[str]:
    """One line for each two sources of a step with the same bytes, and for each source that is its base.

    Args:
        inputs: those that take part.
    """
    notes: list[str] = []
    keys = {name: _key(recipe, source, content) for name, source in inputs.items()}
    for step in recipe.steps.values():
        sources = list(dict.fromkeys(name for name in step.source_names() if name in keys))
        deltas = find_method(step.method).space == "deltas"
        for name in sources:
            if deltas and step.base in keys and keys[name] is not None and keys[name] == keys[step.base]:
                same = "is the base itself" if name == step.base else f"has the same bytes as the base '{step.base}'"
                notes.append(f"the source '{name}' {same}, so its task vector is zero")
        for one, other in combinations([name for name in sources if name != step.base], 2):
            if keys[one] is not None and keys[one] == keys[other]:
                notes.append(f"the sources '{one}' and '{other}' have the same bytes, so this model counts twice")
    return list(dict.fromkeys(notes))


def known_content(inputs: Mapping[str, ResolvedInput]) -> ContentHash:
    """What can be told without reading: the hashes that the Hub lists, and which files are one and the same."""

    def content(label: str, checkpoint: Checkpoint, file: CheckpointFile) -> str | None:
        source = inputs[label.partition("#")[0]]
        if source.repo is not None and "#" not in label:
            return source.repo.files[file.name].sha256 if file.name in source.repo.files else None
        identity = file.identity
        return None if identity is None else identity.etag or f"{identity.device}:{identity.inode}"

    return content


def _key(recipe: Recipe, source: ResolvedInput, content: ContentHash) -> str | None:
    checkpoints = [(source.name, source.checkpoint)]
    if not source.adapter_only:
        checkpoints += [(f"{source.name}#{number}", each.checkpoint) for number, each in enumerate(source.adapters)]
    hashes = [
        [content(label, checkpoint, file) for file in checkpoint.files.values()] for label, checkpoint in checkpoints
    ]
    if not all(hashes) or any(digest is None for digests in hashes for digest in digests):
        return None
    configs = [dict(adapter.config.values) for adapter in source.adapters]
    request = recipe.models.get(source.name)
    settings = [source.identity()["bind_options"], request.rename if request is not None else {}]
    return json.dumps([hashes, configs, settings], sort_keys=True, default=str)


def overshoot(items: Iterable[WorkItem]) -> list[str]:
    """A line for each step that goes too far with many task vectors of full weight."""
    found: dict[str, str] = {}
    for item in items:
        for node in item.applied:
            method, params = node.method, node.params
            if method.space != "deltas" or node.step in found:
                continue
            does = method.overshoots(params)
            scale = getattr(params, "scale", 1.0)
            full = sum(weight for weight in node.weights if weight > 0) * (scale if isinstance(scale, float) else 1.0)
            if does and len(node.weights) >= _FULL_WEIGHT and full >= _FULL_WEIGHT:
                found[node.step] = (
                    f"{method.name} takes {len(node.weights)} task vectors with a total weight of {full:g} and {does},"
                    " which can overshoot: in docs/quality.md the sum of eight kept 20 % of the accuracy of their"
                    " fine-tunes, and 82 % at a scale of 0.2; try a smaller scale, or a method that divides"
                )
    return list(found.values())


def copied_values(found: Mapping[str, Sequence[Node]], inputs: Mapping[str, ResolvedInput]) -> list[str]:
    """A line about integers, masks and the like that differ between the models and are copied from one of them.

    Args:
        found: tensor name -> what each model has, the one that is copied first.
    """
    differing: dict[str, list[str]] = {}
    for name, nodes in found.items():
        first = nodes[0]
        if isinstance(first, Read) and not all(_equal(first, other, inputs) for other in nodes[1:]):
            differing.setdefault(first.model, []).append(name)
    total = len(found)
    return [
        f"{total} tensors are integers, masks or of other types that are not merged but copied; {len(names)} of them "
        f"differ between the models, or are too large to compare, and are those of '{model}', as {names[0]}"
        for model, names in differing.items()
    ]


def _equal(one: Read, other: Node, inputs: Mapping[str, ResolvedInput]) -> bool:
    if not isinstance(other, Read) or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if one.tensor.nbytes > _COMPARED:
        return False
    try:
        return _bytes(one, inputs) == _bytes(other, inputs)
    except InputError:
        return False


def _bytes(read: Read, inputs: Mapping[str, ResolvedInput]) -> bytearray:
    with closing(inputs[read.model].open_reader()) as reader:
        return read_bytes(reader, read.tensor)
