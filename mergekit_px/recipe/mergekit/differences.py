"""What a config means to mergekit and cannot mean here, one sentence each; and parameters that mean nothing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from mergekit_px.located.yaml_text import Node
from mergekit_px.recipe.mergekit.entries import IdleKeys, entries_of
from mergekit_px.recipe.mergekit.pieces import Piece
from mergekit_px.recipe.mergekit.table import ALL_PARAMETERS, PeerMethod


def parameter_differences(
    peer: PeerMethod, pieces: Iterable[Piece], parameters: Sequence[Node | None], idle: IdleKeys
) -> list[str]:
    """Check the names of all parameters, and tell which of them change nothing.

    Args:
        parameters: those of the whole merge.
        idle: takes up those that mergekit does not have.

    Raises:
        RecipeError: a parameter that is like one that mergekit has.
    """
    told: list[str] = []
    known = [*peer.parameters, *sorted(ALL_PARAMETERS - peer.parameters.keys())]

    def look(node: Node | None, source: str | None, is_base: bool) -> None:
        for name in entries_of(node, "'parameters'", known, idle) if node is not None else {}:
            if name not in peer.parameters:
                told.append(f"'{name}' has no effect on the result of {peer.name}, there or here.")
            elif is_base:
                told.append(f"'{name}' of the base model '{source}' has no effect, there or here.")
            elif source is not None and not peer.parameters[name].per_source:
                told.append(
                    f"'{name}' of '{source}' has no effect, there or here: {peer.name} has one value for all models."
                )

    for node in parameters:
        look(node, None, False)
    for piece in pieces:
        look(piece.parameters, None, False)
        for source in piece.sources:
            is_base = peer.base == "subtracted" and source.reference == piece.base
            look(source.parameters, str(source.reference), is_base)
        if piece.residual_weight:
            told.append("'residual_weight' has no effect, there or here.")
    return told


def method_differences(peer: PeerMethod, pieces: list[Piece], step: Node) -> list[str]:
    """Differences that lie in the methods and in what takes part, given the translated step."""
    told: list[str] = []
    values = _scalars(step)
    if peer.name in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        told.append(
            "Elements that tie at the trim threshold are all kept; mergekit keeps as many of them as its sort has in "
            "front."
        )
    if peer.is_random:
        told.append(
            "Other elements are dropped: random numbers follow from the seed, the tensor, the source and the element "
            "here, and from the order of execution in mergekit."
        )
    if peer.like is not None and ("rescale", "l1") in values | _default_rescale(peer):
        told.append("mergekit does not rescale task vectors whose L1 norm is below 1e-7; here all are rescaled.")
    if peer.name.startswith("breadcrumbs"):
        told.append("Of a tensor too small for its density one element stays; mergekit keeps none.")
    if peer.name == "nearswap":
        told.append("Changes below 1e-6 are taken over up to t; mergekit takes over less of them if t is below 1e-6.")
    if peer.name == "model_stock":
        told.append("Angles between task vectors are exact; mergekit takes those of norms below 1e-3 for larger.")
    if peer.name == "nuslerp":
        told.append("Weights that add up to zero are refused; mergekit goes to the middle.")
    if peer.name == "sce":
        told.append(
            "select_topk is a share of all elements; in mergekit it is one of those whose values vary between sources."
        )
    if peer.name == "karcher":
        told.append("Tensors of norm zero have no direction and lower the norm; mergekit leaves them out.")
    if peer.name == "multislerp":
        told.append(
            "Norms and angles are exact; mergekit adds 1e-8 to them. Opposite sources are averaged, not refused."
        )
    if ("normalize", True) in values and peer.base == "subtracted":
        told.append(
            "Weights that add up to zero cannot be normalized, and are refused; mergekit leaves them as they are."
        )
    if peer.name == "slerp":
        told.append(
            "A tensor that is all zero is interpolated on a straight line; mergekit uses sines at a right angle."
        )
    told.append(
        "Every tensor of the inputs is kept, under its own name and in its own layout; mergekit leaves out tensors "
        "that its description of the architecture does not name, and stores the experts of some models as one tensor."
    )
    if any(len(piece.sources) > 1 for piece in pieces) or peer.base == "subtracted":
        told.append(
            "A tensor that some models have and others lack is refused; mergekit merges what there is of tensors that "
            "its description calls optional."
        )
    if pieces[0].sources[0].layers is not None:
        told.append(
            "Of the tensors outside the layers, embeddings are made as in the first slice and all others as in the "
            "last; mergekit decides this by its description of the architecture."
        )
        if len(pieces[-1].sources) > len(pieces[0].sources):
            told.append(
                "Tensors after the layers are made from all sources of the last slice; mergekit uses only as many as "
                "the first slice has."
            )
    return told


def advice(hint: str, steps: Collection[str]) -> str:
    """What a hint about recipes asks for, as a config of mergekit or ``--set`` may say it."""
    step = next(iter(steps)) if len(steps) == 1 else "STEP"
    said = re.sub(r"\bset `(\w+): (\w+)`( or `\w+: \w+`)?", rf"give --set steps.{step}.\1=\2", hint)
    said = re.sub(r"\bas (output\.\w+)", r"by --set \1=", said)
    said = said.replace("{model: ..., adapter: ...}", "model+adapter").replace("(--base)", "(base_model)")
    if re.search(r"\brules?\b|rename", said):
        said += " (`pxmerge convert` makes a recipe of this config, which may have that)"
    return said


def _default_rescale(peer: PeerMethod) -> set[tuple[str, object]]:
    return {("rescale", "l1")} if peer.is_random else set()


def _scalars(node: Node, name: str = "") -> set[tuple[str, object]]:
    """All (key, value) pairs anywhere in a tree."""
    if isinstance(node.value, dict):
        return {pair for key, child in node.value.items() for pair in _scalars(child, key)}
    if isinstance(node.value, list):
        return {pair for child in node.value for pair in _scalars(child, name)}
    return {(name, node.value)}
