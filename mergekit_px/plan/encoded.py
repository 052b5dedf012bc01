"""Which tensors of the result are stored in encoded form: as the donor of the config keeps them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import StoredTensor
from mergekit_px.errors import PlanError
from mergekit_px.plan.expressions import Expressions
from mergekit_px.plan.model import WorkItem
from mergekit_px.plan.nodes import Apply, Decoded, Node, Read, walk
from mergekit_px.plan.views import quantisation_sections
from mergekit_px.storage.encoding import Encodable, Encoding

_OF_A_LAYER = re.compile(r"(layers|blocks|h)[.\\]+\d+")


def encoded_items(
    items: Sequence[WorkItem], donor: str | None, expressions: Expressions, where: str
) -> tuple[list[WorkItem], str]:
    """The items as they are stored where quantised storage is kept, and what is to be said of it.

    Args:
        donor: the input whose scheme is kept.

    Raises:
        PlanError: the donor is not quantised, or in a way that values are not written in.
    """
    view = None if donor is None else expressions.view(expressions.inputs[donor])
    if donor is None or view is None or not view.encoded:
        raise PlanError(
            f"`quantize: keep` keeps the storage of {shown(donor or 'the first model')}, which is not quantised",
            where=where,
            hint="name a quantised model as output.config_from, or leave quantize out",
        )
    known, config = expressions.namespace(donor), expressions.inputs[donor].config
    if expressions.layer_sources and any(_OF_A_LAYER.search(str(part)) for part in quantisation_sections(config or {})):
        raise PlanError(
            f"the config of '{donor}' names layers by their numbers where it says what is quantised, and layers are"
            " stacked anew",
            where=where,
            hint="leave `quantize: keep` out and quantise the result",
        )
    stored: list[WorkItem] = []
    counts: Counter[str] = Counter()
    for item in items:
        encoding = _encoding(item, donor, known)
        if encoding is None or not item.node.dtype.arithmetic:
            stored.append(item)
            continue
        node = _given(item.node)
        if isinstance(node, Decoded) and node.encoding.is_like(encoding):
            kind, parts, giver = "as they are", node.encoding.renamed(item.name).stored, node.parts[0].input
            sources = zip(parts, node.encoding.stored, strict=True)
            held = expressions.inputs[giver].checkpoint.tensors
            stored += [_copied(part.name, held[source.name], giver) for part, source in sources]
        else:
            if encoding.shape != item.shape or not isinstance(encoding, Encodable):
                raise _refused(item, encoding, donor, where)
            renamed, kind = encoding.renamed(item.name), "anew"
            stored.append(replace(item, dtype=encoding.parts["codes"].dtype, encoding=renamed))
            beside = zip(renamed.beside, encoding.beside, strict=True)
            stored += [_copied(part.name, source, donor) for part, source in beside]
        counts[f"{encoding.title}, {kind}"] += 1
    stored += [_copied(tensor.name, tensor, donor) for tensor in view.markers]
    listed = ", ".join(f"{count} of {what}" for what, count in counts.items())
    return stored, f"stored as '{donor}' is: {listed or 'nothing of what is merged is quantised there'}"


def _encoding(item: WorkItem, donor: str, known: Mapping[str, Node]) -> Encoding | None:
    """How the donor keeps a tensor; for one that it does not have, how the first of those that make it up does."""
    node = _given(item.node)
    taken = isinstance(node, Decoded) and node.parts[0].model == donor
    nodes = list(walk(node if taken else known.get(item.name, node)))
    decoded = [node for node in nodes if isinstance(node, Decoded)]
    own = [node for node in decoded if node.parts[0].model == donor]
    reads_plainly = any(isinstance(node, Read) and node.input == donor for node in nodes)
    return (own or decoded)[0].encoding if own or (decoded and not reads_plainly) else None


def _given(node: Node) -> Node:
    """What a method gives that takes one source as it is."""
    while isinstance(node, Apply) and node.base is None and len(node.sources) == 1:
        alone = node.method.name == "linear" and (node.weights == (1.0,) or getattr(node.params, "normalize", False))
        if not alone and not (node.method.name == "passthrough" and getattr(node.params, "scale", None) == 1.0):
            break
        node = node.sources[0]
    return node


def _copied(name: str, tensor: StoredTensor, model: str) -> WorkItem:
    return WorkItem(name, tensor.dtype, tensor.shape, Read(model, tensor, tensor.shape, "weights"))


def _refused(item: WorkItem, encoding: Encoding, donor: str, where: str) -> PlanError:
    if isinstance(encoding, Encodable):
        what = f"{shown(item.name)} has shape {list(item.shape)}, and '{donor}' keeps it as {list(encoding.shape)}"
        return PlanError(
            f"{what} in {encoding.title}",
            where=where,
            hint="leave `quantize: keep` out and quantise the result",
        )
    return PlanError(
        f"{shown(item.name)} is stored as {encoding.title} in '{donor}', and values are not written in that form here",
        where=where,
        hint="leave `quantize: keep` out: the result is plain, and the scheme's own tool quantises it",
    )
