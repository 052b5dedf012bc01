"""Experts that are chosen of a mixture: which tensors they are, by name, and what is made of them."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_px.errors import PlanError, RecipeError
from mergekit_px.plan.layers import split_layer
from mergekit_px.plan.nodes import Joined, Node, Section, can_be_cut, combined
from mergekit_px.plan.slots import Namespace, Namespaces
from mergekit_px.recipe.mixture import ExpertChoice, Group

_NUMBERED = re.compile(r"(?P<block>.+?)\.experts\.(?P<number>\d+)\.(?P<rest>.+)")
_STACKED = re.compile(r"(?P<block>.+?)\.(experts\..+|(input|output)_linear\.weight)")
_ROUTERS = frozenset({"gate", "router", "moe_statics"})
_BY_EXPERT = ("correction_bias", "per_expert_scale")

_COUNTS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts", "n_experts"),
)
"""Entries of configs that count experts."""
_CHOSEN = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k"),
    *("experts_per_token", "num_selects"),
)
"""Entries that say how many a token goes to."""
_GROUPS = ("n_group", "num_expert_group")


@dataclass
class _Block:
    """The experts of one layer.

    Attributes:
        count: how many there are.
        numbered: for each expert, what follows its number -> tensor name.
        stacked: tensors that hold all of them, along the first axis.
        router: tensors with a row or a value for each.
    """

    prefix: str
    count: int = 0
    numbered: dict[int, dict[str, str]] = field(default_factory=dict)
    stacked: list[str] = field(default_factory=list)
    router: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ChosenExperts:
    """What a config has to follow."""

    old: int
    new: int
    per_token: int | None

    def followed(self, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The config with its counts of experts changed, and what to say of it.

        Raises:
            PlanError: it does not count the experts, or counts groups of them that no longer come out even.
        """
        changed = copy.deepcopy(dict(config))
        parts = [changed, *(part for part in changed.values() if isinstance(part, dict))]
        found = [(part, key) for part in parts for key in _COUNTS if part.get(key) == self.old]
        if not found:
            raise PlanError(
                f"the config says nowhere that there are {self.old} experts (looked for {', '.join(_COUNTS)})",
                hint="give a model with the config of its own as output.config_from",
            )
        notes = [f"config: {key} {self.old} -> {self.new}" for _, key in found]
        for part, key in found:
            part[key] = self.new
        for part in parts:
            for key in _CHOSEN:
                old = part.get(key)
                if not isinstance(old, int) or isinstance(old, bool):
                    continue
                new = self.per_token or min(old, self.new)
                if new != old:
                    notes.append(f"config: {key} {old} -> {new}")
                    part[key] = new
            for key in _GROUPS:
                groups = part.get(key)
                if isinstance(groups, int) and groups > 1 and self.new % groups:
                    raise PlanError(
                        f"{self.new} experts do not come out even in {groups} groups ({key} of the config)",
                        hint=f"choose a multiple of {groups}",
                    )
        return changed, notes


def with_choice(name: str, choice: ExpertChoice | None, nodes: Namespace, namespaces: Namespaces) -> Namespace:
    """A step's tensors with the experts that are chosen of it.

    Raises:
        PlanError, RecipeError: there are no experts, or none of the numbers that are asked for.
    """
    if choice is None:
        return nodes
    where = namespaces.loaded.where("steps", name, "experts")
    blocks = _blocks(nodes, where)
    counts = {block.count for block in blocks}
    if len(counts) > 1:
        what = f"the layers have different numbers of experts: {', '.join(map(str, sorted(counts)))}"
        raise PlanError(what, where=where)
    layers = {split.layer for block in blocks if (split := split_layer(f"{block.prefix}.")) is not None}
    unknown = next((layer for layer in choice.layers if int(layer) not in layers), None)
    if unknown is not None:
        what = f"layer {unknown} has no experts; layers {min(layers)} to {max(layers)} have"
        raise RecipeError(what, where=namespaces.loaded.where("steps", name, "experts", "layers", unknown))
    if choice.of is not None and counts != {choice.of}:
        what = f"the experts were chosen of {choice.of}, and the model has {counts.pop()} in a layer"
        raise RecipeError(what, where=where, hint="choose by scores of this model")
    made: dict[str, Node] = {}
    gone: dict[str, str] = {}
    new = 0
    for block in blocks:
        found = split_layer(f"{block.prefix}.")
        groups = choice.of_layer(found.layer if found is not None else None, block.count)
        if block is not blocks[0] and len(groups) != new:
            what = f"'{block.prefix}' would have {len(groups)} experts, and '{blocks[0].prefix}' {new}"
            raise RecipeError(what, where=where, hint="choose as many in every layer, for the config has one number")
        new = len(groups)
        _check(choice, groups, block, where)
        made |= _made(name, block, groups, nodes, where)
        used = {number for group in groups for number, _ in group}
        for number in set(range(block.count)) - used:
            gone |= dict.fromkeys(block.numbered.get(number, {}).values(), f"expert {number} is left out")
    per_token = choice.experts_per_token
    if per_token is not None and per_token > new:
        where = namespaces.loaded.where("steps", name, "experts", "experts_per_token")
        raise RecipeError(f"{per_token} experts for each token, and {new} are left", where=where)
    namespaces.dropped_names.update(gone)
    namespaces.mixtures.setdefault(name, []).append(ChosenExperts(counts.pop(), new, per_token))
    owners = {
        tensor: block.prefix for block in blocks for names in block.numbered.values() for tensor in names.values()
    }
    reached: set[str] = set()
    result: dict[str, Node] = {}
    for tensor, node in nodes.items():
        prefix = owners.get(tensor)
        if prefix is None:
            result[tensor] = made.get(tensor, node)
        elif prefix not in reached:
            reached.add(prefix)
            result |= {key: value for key, value in made.items() if key.startswith(f"{prefix}.experts.")}
    return result


def _blocks(nodes: Namespace, where: str) -> list[_Block]:
    """The experts of every layer that has some.

    Raises:
        PlanError: there are none, or some are missing.
    """
    blocks: dict[str, _Block] = {}
    for name in nodes:
        found = _NUMBERED.fullmatch(name)
        if found is not None:
            block = blocks.setdefault(found["block"], _Block(found["block"]))
            block.numbered.setdefault(int(found["number"]), {})[found["rest"]] = name
        elif (stacked := _STACKED.fullmatch(name)) is not None:
            blocks.setdefault(stacked[1], _Block(stacked[1])).stacked.append(name)
    for block in blocks.values():
        _read_router(block, nodes)
    found_blocks = [block for block in blocks.values() if block.numbered or (block.stacked and block.router)]
    if not found_blocks:
        raise PlanError(
            "there are no experts by name in the model", where=where, hint="`pxmerge inspect` shows its names"
        )
    for block in found_blocks:
        _check_block(block, where)
    return found_blocks


def _read_router(block: _Block, nodes: Namespace) -> None:
    """Find what has a row, or a value, for each expert beside the experts themselves."""
    own = [name for name in nodes if name.startswith(f"{block.prefix}.") and name not in block.stacked]
    routers = []
    for name in own:
        parts = name[len(block.prefix) + 1 :].split(".")
        if parts[0] in _ROUTERS or name.endswith(_BY_EXPERT):
            routers.append(name)
    rows = [nodes[name].shape[0] for name in routers if len(nodes[name].shape) == 2 and name.endswith("weight")]
    block.count = len(block.numbered) or (rows[0] if len(rows) == 1 else 0)
    fitting = {(block.count,), (1, block.count)}
    block.router = [
        name
        for name in routers
        if nodes[name].shape in fitting or (len(nodes[name].shape) == 2 and nodes[name].shape[0] == block.count)
    ]


def _check_block(block: _Block, where: str) -> None:
    lacking = next((number for number in range(block.count) if number not in block.numbered), None)
    if block.numbered and lacking is not None:
        raise PlanError(f"'{block.prefix}.experts.{lacking}' is missing", where=where)
    odd = next((number for number, names in block.numbered.items() if names.keys() != block.numbered[0].keys()), None)
    if odd is not None:
        raise PlanError(f"'{block.prefix}.experts.{odd}' has other tensors than the first expert", where=where)
    if not any(name.endswith("weight") for name in block.router):
        what = f"'{block.prefix}' has {block.count} experts, and no router with a row for each"
        raise PlanError(what, where=where)


def _check(choice: ExpertChoice, groups: Sequence[Group], block: _Block, where: str) -> None:
    numbers = {number for group in groups for number, _ in group} | choice.named()
    if not groups:
        raise RecipeError("no experts are left", where=where)
    if (unknown := max(numbers)) >= block.count:
        what = f"expert {unknown} of '{block.prefix}', which has {block.count} (0-{block.count - 1})"
        raise RecipeError(what, where=where)


def _made(step: str, block: _Block, groups: Sequence[Group], nodes: Namespace, where: str) -> dict[str, Node]:
    """The tensors of a layer's experts, and of its router, by their new names."""
    made: dict[str, Node] = {}
    for number, group in enumerate(groups):
        for rest in block.numbered.get(0, {}):
            parts = [nodes[block.numbered[old][rest]] for old, _ in group]
            made[f"{block.prefix}.experts.{number}.{rest}"] = _mean(step, parts, group)
    for name in [*block.stacked, *block.router]:
        made[name] = _chosen(step, name, nodes[name], block.count, groups, where)
    return made


def _mean(step: str, parts: list[Node], group: Group) -> Node:
    return parts[0] if len(parts) == 1 else combined(step, parts, [weight for _, weight in group])


def _chosen(step: str, name: str, node: Node, count: int, groups: Sequence[Group], where: str) -> Node:
    """A tensor that holds something for every expert, with the experts that are chosen."""
    axis = 1 if node.shape == (1, count) else 0
    if node.shape[axis] % count:
        raise PlanError(f"'{name}' is {list(node.shape)}, which {count} experts do not share evenly", where=where)
    if not can_be_cut(node):
        what = f"'{name}' holds several experts, and is made by a method that goes over whole tensors or draws numbers"
        raise PlanError(what, where=where, hint="run that step first, and give its result as a model")
    share = node.shape[axis] // count
    one = (1, share) if axis else (share, *node.shape[1:])
    size = math.prod(one)
    parts = [_mean(step, [Section(node, old * size, one) for old, _ in group], group) for group in groups]
    shape = (1, share * len(groups)) if axis else (share * len(groups), *node.shape[1:])
    return Joined(tuple(parts), shape)
