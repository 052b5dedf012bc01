"""Which parameters share a coefficient."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit_px.errors import UsageError
from mergekit_px.learn.ofasd.settings import CoefficientSettings
from mergekit_px.plan.layers import split_layer


@dataclass(frozen=True)
class Parameter:
    """An array that learns: its names in the checkpoint (several where it is tied) and its shape."""

    names: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Blocks:
    """The columns of a table of coefficients.

    Attributes:
        names: of the blocks.
        tensors: tensor name -> (first block, number of blocks that its elements are spread over).
        learned: for each block whether its coefficients learn; those of buffers keep their first value.
        seed: of the draw of random groups.
    """

    names: tuple[str, ...]
    tensors: Mapping[str, tuple[int, int]]
    learned: tuple[bool, ...]
    seed: int


def make_blocks(parameters: Sequence[Parameter], buffers: Sequence[str], settings: CoefficientSettings) -> Blocks:
    """Blocks of parameters as the settings say, then one for each buffer.

    Vectors and tensors with fewer elements than random groups are not split.

    Raises:
        UsageError: a pattern that is no regular expression, or finds no tensor.
    """
    patterns = [_compiled(pattern) for pattern in settings.groups]
    columns: dict[str, int] = {}
    tensors: dict[str, tuple[int, int]] = {}
    for parameter in parameters:
        name = parameter.names[0]
        splits = settings.granularity == "random" and len(parameter.shape) > 1
        splits = splits and math.prod(parameter.shape) >= settings.random_groups
        if splits:
            members = [f"{name} [{number}]" for number in range(settings.random_groups)]
        else:
            members = [_block_name(name, settings, patterns)]
        for member in members:
            columns.setdefault(member, len(columns))
        tensors.update(dict.fromkeys(parameter.names, (columns[members[0]], len(members))))
    for pattern in settings.groups:
        if pattern not in columns:
            raise UsageError(f"the pattern '{pattern}' is the first to match for no tensor")
    learned = len(columns)
    for name in buffers:
        tensors[name] = (len(columns), 1)
        columns[name] = len(columns)
    flags = tuple(index < learned for index in range(len(columns)))
    return Blocks(tuple(columns), tensors, flags, settings.seed)


def _block_name(name: str, settings: CoefficientSettings, patterns: Sequence[re.Pattern[str]]) -> str:
    if settings.granularity == "model":
        return "all"
    if settings.granularity == "groups":
        return next((pattern.pattern for pattern in patterns if pattern.search(name)), "other")
    layer = split_layer(name) if settings.granularity == "layer" else None
    return name if layer is None else f"{layer.stack}{layer.layer}"


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"'{pattern}' is no regular expression: {error}") from None
