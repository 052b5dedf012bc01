"""The parts of a transformer that may be permuted, found by names, shapes and the numbers of heads."""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import PlanError, UsageError
from mergekit_px.learn.align.head_counts import HeadCounts
from mergekit_px.learn.align.permutations import Attention, Hidden, Layout, Part
from mergekit_px.learn.align.roles import (
    ATTENTION_ROLES,
    DOUBTFUL_FUSIONS,
    MLP_ROLES,
    OUTER_ROLES,
    RELATIVE_POSITIONS,
    Place,
    Role,
    is_placed,
    roles_of,
    split_name,
)

Shapes = Mapping[str, tuple[int, ...]]

_ATTENTION_NAME = re.compile(r"att", re.IGNORECASE)
_MLP_NAME = re.compile(r"mlp|ffn|feed|expert|^ff", re.IGNORECASE)
_STACK = re.compile(r"^(.*?)\.?\b\d+\.")


def find_layout(
    shapes: Shapes, counts: HeadCounts, permute: Collection[str], places: Sequence[Place], where: str
) -> Layout:
    """The parts of a model by the names and shapes of its floating-point tensors.

    Args:
        permute: any of ``heads``, ``mlp`` and ``residual``.
        where: the model, for messages.

    Raises:
        PlanError: a tensor that a permutation of the residual stream would have to change cannot be placed, or
            nothing is recognised.
        UsageError: the number of heads is needed and not told.
    """
    return _Search(shapes, counts, places, where).layout(permute)


class _Search:
    def __init__(self, shapes: Shapes, counts: HeadCounts, places: Sequence[Place], where: str) -> None:
        self.shapes, self.counts, self.where = shapes, counts, where
        self.modules: dict[str, dict[str, str]] = {}
        for name in shapes:
            path, leaf = split_name(name)
            self.modules.setdefault(path, {})[leaf] = name
        self.paths = sorted(self.modules)
        self.roles = {path: roles_of(path, places) for path in self.paths}
        self.named_by_user = {path for path in self.paths if is_placed(path, places)}
        self.claimed: dict[str, Role] = {}
        self.transposed = False
        self.attention = self._blocks(ATTENTION_ROLES)
        self.mlps = self._mlps(self._blocks(MLP_ROLES))

    def layout(self, permute: Collection[str]) -> Layout:
        found = Layout()
        widths = self._widths()
        if "heads" in permute:
            self._find_heads(found, widths)
        if "mlp" in permute:
            for block, (ups, down) in self.mlps.items():
                self._find_hidden(found, block, ups, down, widths)
        if "residual" in permute:
            self._find_residual(found, widths)
        if next(found.parts(), None) is None:
            reason = next((f"; {block[:-1]}: {why}" for block, why in found.left_alone.items()), "")
            raise PlanError(
                f"nothing to permute is recognised by the names of its tensors{reason}",
                where=self.where,
                hint="say what they are with --place, as in --place query=to_q",
            )
        return found

    # Blocks

    def _blocks(self, roles: tuple[Role, ...]) -> dict[str, dict[Role, list[str]]]:
        """Modules by the block and the role that they may have in it; innermost blocks first."""
        found: dict[str, dict[Role, list[str]]] = {}
        for path in self.paths:
            for role, block in self.roles[path]:
                shape = self._shape(path)
                if role in roles and shape is not None and len(shape) == (1 if role.endswith("norm") else 2):
                    found.setdefault(block, {}).setdefault(role, []).append(path)
        kept = {}
        for block in sorted(found, key=lambda one: (-len(one), one)):
            members = {
                role: [path for path in paths if path not in self.claimed] for role, paths in found[block].items()
            }
            if roles == ATTENTION_ROLES and (not _is_attention(members) or self._is_doubtful(members)):
                continue
            kept[block] = members
            if roles == ATTENTION_ROLES:
                self.claimed.update({path: role for role, paths in members.items() for path in paths})
                self.transposed |= any(map(self._is_transposed, members.get("qkv", ())))
        return kept

    def _mlps(self, blocks: Mapping[str, dict[Role, list[str]]]) -> dict[str, tuple[list[str], str]]:
        """Block -> projections to the hidden units, and the one back."""
        found = {}
        for block, members in blocks.items():
            downs = [path for path in members.get("down", ()) if path not in self.claimed]
            if len(downs) != 1:
                continue
            units = self._sizes(downs[0])[1]
            ups = [
                path
                for path in members.get("up", ())
                if path not in self.claimed and path != downs[0] and self._sizes(path)[0] in (units, 2 * units)
            ]
            if ups:
                found[block] = ups, downs[0]
                self.claimed.update({downs[0]: "down", **dict.fromkeys(ups, "up")})
        return found

    def _is_doubtful(self, members: Mapping[Role, list[str]]) -> bool:
        """Whether the order of query, key and value in one projection differs between models with these names."""
        fused = members.get("qkv", [])
        if not fused or fused[0] in self.named_by_user:
            return False
        ends = fused[0].rpartition(".")[2], members["output"][0].rpartition(".")[2]
        shape = self._shape(fused[0])
        assert shape is not None
        # One below the other where the weight is (in, out), head by head in another model where it is (out, in).
        plain = ends[0] == "c_attn" and shape[0] == 3 * shape[1]
        return plain or ends in DOUBTFUL_FUSIONS

    def _shape(self, path: str) -> tuple[int, ...] | None:
        name = self.modules[path].get("weight")
        return None if name is None else self.shapes[name]

    def _is_transposed(self, path: str) -> bool:
        """Whether a weight is (in, out), which a bias of another length than its rows tells."""
        shape, bias = self._shape(path), self.modules[path].get("bias")
        return shape is not None and bias is not None and self.shapes[bias] == (shape[1],) != (shape[0],)

    def _sizes(self, path: str) -> tuple[int, int]:
        """Numbers of outputs and inputs."""
        shape = self._shape(path)
        assert shape is not None and len(shape) == 2
        return (shape[1], shape[0]) if self.transposed else (shape[0], shape[1])

    def _outputs(self, path: str, rows: Tensor) -> list[Part]:
        """The parts of some outputs of a layer: its weight and its bias."""
        arrays = self.modules[path]
        parts = [Part(arrays["weight"], 1 if self.transposed else 0, rows)]
        return [*parts, Part(arrays["bias"], 0, rows)] if "bias" in arrays else parts

    def _inputs(self, path: str) -> Part:
        return Part(self.modules[path]["weight"], 0 if self.transposed else 1, torch.arange(self._sizes(path)[1]))

    def _widths(self) -> dict[int, str]:
        """Channels of the residual stream -> a tensor that says so; one entry in a model of one stream."""
        found: dict[int, str] = {}
        for path, role in self.claimed.items():
            if not role.endswith("norm"):
                size = self._sizes(path)[0 if role in ("output", "down") else 1]
                found.setdefault(size, self.modules[path]["weight"])
        return found

    # Heads

    def _find_heads(self, found: Layout, widths: Mapping[int, str]) -> None:
        if self.attention and self.counts.heads is None:
            raise UsageError(
                "the number of heads is told by no config.json",
                where=self.where,
                hint="give it with --heads (and --kv-heads)",
            )
        if self.attention and self.counts.positions is None:
            raise UsageError(
                "nothing tells how it knows positions, and heads that do so themselves cannot be permuted freely",
                where=self.where,
                hint="say --positions additive (or none at all), or --positions rotary",
            )
        relative = self._relative_positions()
        for block, members in self.attention.items():
            if relative is not None:
                found.left_alone[block] = f"{shown(relative)} tells heads apart by their number"
                continue
            one = self._attention(block, members)
            reason = one if isinstance(one, str) else self._stranger(block, widths, _ATTENTION_NAME)
            if isinstance(one, str) or reason is not None:
                found.left_alone[block] = reason or ""
            else:
                found.attention.append(one)
        if self.attention and not found.attention:
            block, reason = next(iter(found.left_alone.items()))
            raise PlanError(
                f"the heads of {shown(block[:-1] or 'the model')} cannot be permuted: {reason}",
                where=self.where,
                hint="say what it is with --place or how many heads there are with --heads and --kv-heads, or leave"
                " them alone with --permute mlp residual",
            )

    def _attention(self, block: str, members: Mapping[Role, list[str]]) -> Attention | str:
        """The heads of a block, or why they cannot be told apart."""
        counts = self.counts
        assert counts.heads is not None
        if counts.positions == "alibi":
            return "heads differ by their number (ALiBi)"
        output = members["output"][0]
        if "query" in members:
            paths = [members[role][0] for role in ("query", "key", "value")]
            sizes = [self._sizes(path)[0] for path in paths]
            channels = sizes[0] // counts.heads
            groups = sizes[1] // channels if channels else 0
            rows = [torch.arange(size) for size in sizes]
        else:
            fused = members["qkv"] if "qkv" in members else members["qkv-by-head"]
            paths = fused * 3
            groups = counts.kv_heads or counts.heads
            channels = self._sizes(fused[0])[0] // (counts.heads + 2 * groups)
            sizes = [counts.heads * channels, groups * channels, groups * channels]
            if sum(sizes) != self._sizes(fused[0])[0]:
                return _odd(self.modules[fused[0]]["weight"], self._sizes(fused[0])[0], counts.heads, groups)
            rows = list(torch.arange(sum(sizes)).split(sizes))
            if "qkv-by-head" in members:
                by_head = torch.arange(sum(sizes)).reshape(groups, -1, channels)
                rows = [one.flatten() for one in by_head.split([counts.heads // groups, 1, 1], dim=1)]
        value_channels = sizes[2] // groups if groups else 0
        expected = [counts.heads * channels, groups * channels, groups * value_channels]
        for path, size, wanted in zip(paths, sizes, expected, strict=True):
            if size != wanted or size == 0:
                return _odd(self.modules[path]["weight"], size, counts.heads, groups)
        if counts.heads % groups or counts.kv_heads not in (None, groups):
            return _odd(self.modules[paths[1]]["weight"], sizes[1], counts.heads, counts.kv_heads or groups)
        if self._sizes(output)[1] != counts.heads * value_channels:
            return _odd(self.modules[output]["weight"], self._sizes(output)[1], counts.heads, groups)
        query, key, value = (self._outputs(path, one) for path, one in zip(paths, rows, strict=True))
        fixed = counts.positions == "rotary"
        for role, size, parts in (("query-norm", sizes[0], query), ("key-norm", sizes[1], key)):
            for path in members.get(role, ()):  # type: ignore[call-overload]
                for name in self.modules[path].values():
                    if self.shapes[name] == (size,):
                        parts.append(Part(name, 0, torch.arange(size)))
                    elif self.shapes[name] == (channels,):  # one for all heads
                        fixed = True
                    else:
                        return f"{shown(name)} has neither {size} nor {channels} elements"
        return Attention(
            block, groups, counts.heads // groups, channels, value_channels, fixed, query, key, value,
            [self._inputs(output)],
        )  # fmt: skip

    # Hidden units

    def _find_hidden(self, found: Layout, block: str, ups: list[str], down: str, widths: Mapping[int, str]) -> None:
        units = self._sizes(down)[1]
        parts = [self._inputs(down)]
        for path in ups:
            for start in range(0, self._sizes(path)[0], units):
                parts += self._outputs(path, torch.arange(start, start + units))
        for path in self._inside(block):
            norm = any(role == "vector" for role, _ in self.roles[path])
            arrays = self.modules[path].values()
            direct = _MLP_NAME.search(block.rstrip(".").rpartition(".")[2]) and "." not in path[len(block) :]
            if direct and norm and all(self.shapes[name] == (units,) for name in arrays):
                parts += [Part(name, 0, torch.arange(units)) for name in arrays]
        reason = self._stranger(block, widths, _MLP_NAME, units)
        if reason is None:
            found.hidden.append(Hidden(block, units, parts))
        else:
            found.left_alone[block] = reason

    def _stranger(self, block: str, widths: Mapping[int, str], own: re.Pattern[str], units: int = 1) -> str | None:
        """What is inside a block and has no known part in it, so that it may depend on the order of its units."""
        alone = own.search(block.rstrip(".").rpartition(".")[2]) is not None  # nothing but this layer is in the block
        for path in self._inside(block):
            roles = {role for role, _ in self.roles[path]}
            direct = alone and "." not in path[len(block) :]
            for name in self.modules[path].values():
                shape = self.shapes[name]
                channelled = bool(shape) and shape[-1] in widths and max(shape[:-1], default=1) == 1
                known = (
                    "fixed" in roles
                    or max(shape, default=1) == 1
                    or (len(shape) == 4 and shape[:2] == (1, 1))  # a mask of positions
                    or ("vector" in roles and channelled and (not direct or self._is_named_in_full(path)))
                    or (units > 1 and "vector" in roles and direct and shape == (units,))
                    or (not alone and not roles.isdisjoint(OUTER_ROLES))
                    or (units > 1 and all(size % units for size in shape))
                )
                if not known:
                    return f"{shown(name)} is inside it and nothing tells what it is"
        return None

    def _is_named_in_full(self, path: str) -> bool:
        """Whether a pattern for vectors of the stream names the block too, or the user does."""
        parent = path.rpartition(".")[0]
        return path in self.named_by_user or any(
            role == "vector" and len(block.rstrip(".")) < len(parent) for role, block in self.roles[path]
        )

    def _relative_positions(self) -> str | None:
        """A tensor that tells heads apart by their number."""
        return next((name for name in self.shapes if RELATIVE_POSITIONS.search(name)), None)

    def _inside(self, block: str) -> Iterator[str]:
        """The modules under a block that belong to no block."""
        for number in range(bisect.bisect_left(self.paths, block), len(self.paths)):
            path = self.paths[number]
            if not path.startswith(block):
                return
            if path not in self.claimed:
                yield path

    # Residual stream

    def _find_residual(self, found: Layout, widths: Mapping[int, str]) -> None:
        hint = "leave the residual stream alone with --permute heads mlp"
        if not widths:
            return
        if len(widths) > 1:
            (one, first), (other, second) = list(widths.items())[:2]
            what = f"the residual stream has {one} channels at {shown(first)} and {other} at {shown(second)}"
            raise PlanError(what, where=self.where, hint=hint)
        stacks = {match[1] for block in (*self.attention, *self.mlps) if (match := _STACK.match(block))}
        if len(stacks) > 1:
            what = f"it has several residual streams ({', '.join(shown(one) for one in sorted(stacks)[:2])})"
            raise PlanError(what, where=self.where, hint=hint)
        found.width = next(iter(widths))
        unknown = []
        for path in self.paths:
            role = self.claimed.get(path)
            if role is None:
                unknown += self._place_outside(found, path)
            elif role in ("output", "down"):
                found.residual += self._outputs(path, torch.arange(found.width))
            elif not role.endswith("norm"):
                found.residual.append(self._inputs(path))
        if unknown:
            # Rather one whose name is like no other: it is why the names beside it have no place.
            path, name = min(unknown, key=lambda one: (bool(self.roles[one[0]]), one[1].endswith("bias")))
            raise PlanError(
                f"nothing tells what {shown(name)} {list(self.shapes[name])} does with the residual stream",
                where=self.where,
                hint=f"say what it is with --place ROLE={path.rpartition('.')[2]}, or {hint}",
            )

    def _place_outside(self, found: Layout, path: str) -> list[tuple[str, str]]:
        """Place a module that is in no block, by its role and shape; or what of it cannot be placed and left alone."""
        arrays = self.modules[path]
        for role, _ in self.roles[path]:
            parts = self._outside(role, path, found.width)
            if parts is not None:
                found.residual += parts
                if role == "dense" and len(parts) > 1:
                    found.square.add(arrays["weight"])
                return []
        return [(path, name) for name in arrays.values() if self._may_be_of_the_stream(self.shapes[name], found.width)]

    @staticmethod
    def _may_be_of_the_stream(shape: tuple[int, ...], width: int) -> bool:
        """Whether an axis has the channels of the stream, or several times as many side by side."""
        return shape == (width,) or (len(shape) > 1 and any(size >= width and size % width == 0 for size in shape))

    def _outside(self, role: Role, path: str, width: int) -> list[Part] | None:
        """The channels of a module in a role; None where its shapes are not those of the role."""
        arrays = self.modules[path]
        shape = self._shape(path)
        channels = torch.arange(width)
        if role == "fixed":
            return []
        if role == "vector":
            wanted = {name: self.shapes[name] for name in arrays.values()}
            if all(one and one[-1] == width and max(one[:-1], default=1) == 1 for one in wanted.values()):
                return [Part(name, len(one) - 1, channels) for name, one in wanted.items()]
            return None
        if shape is None or not shape:
            return None
        if role == "embedding" and shape[-1] == width and "bias" not in arrays and (len(shape) < 4 or shape[0] == 1):
            return [Part(arrays["weight"], len(shape) - 1, channels)]
        if role == "writer" and len(shape) > 1 and shape[0] == width:
            return [Part(name, 0, channels) for name in arrays.values()]
        if role in ("reader", "dense") and len(shape) == 2 and shape[1] % width == 0:
            copies = [Part(arrays["weight"], 1, channels + start) for start in range(0, shape[1], width)]
            if role == "dense" and shape[0] == width:
                copies += [Part(name, 0, channels) for name in arrays.values()]
            return copies
        return None


def _is_attention(members: Mapping[Role, list[str]]) -> bool:
    single = {role for role, paths in members.items() if len(paths) == 1}
    inputs = {"query", "key", "value"} <= single or "qkv" in single or "qkv-by-head" in single
    return inputs and "output" in single


def _odd(name: str, size: int, heads: int, groups: int) -> str:
    return f"{shown(name)} has {size} channels, which do not fit {heads} heads and {groups} of keys and values"
