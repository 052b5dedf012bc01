"""What a model's files say of its packed integers: bits, groups and variants, as GPTQ, AWQ and others write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_px.checkpoint.json_text import parse_object

SETTINGS_FILES = ("quantize_config.json", "quant_config.json")
"""Beside the weights, where the config says nothing: AutoGPTQ's and AutoAWQ's."""

_KEYS = ("quantization_config", "compression_config")
_GPTQ_FORMATS = ("gptq", "gptq_v2")
_AWQ_VERSIONS = ("gemm", "exllama", "ipex")
"""All of one layout, for several kernels."""
_AUTO_ROUND = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": None}
"""AutoRound's names of layouts -> how GPTQ calls the way zero points are kept."""


@dataclass(frozen=True)
class IntegerScheme:
    """One way of quantising that a model's settings name; None and -1 where they leave something open.

    Attributes:
        group: inputs that share a scale; -1 for all of them.
    """

    bits: int | None
    group: int | None
    symmetric: bool | None = None

    def allows(self, bits: int, inputs: int, groups: int) -> bool:
        """Whether tensors of these bits, with so many groups of scales, can be of this scheme."""
        size = inputs if self.group == -1 else self.group
        return self.bits in (None, bits) and (size is None or -(-inputs // size) == groups)

    def __str__(self) -> str:
        bits = f"{self.bits} bits" if self.bits else "any bits"
        if self.group is None:
            return bits
        return f"{bits} in groups of {self.group}" if self.group > 0 else f"{bits} with a scale for each output"


@dataclass(frozen=True)
class IntegerSettings:
    """What is declared for a model's packed integers.

    Attributes:
        schemes: of which each tensor must be one; empty where anything may be.
        zero_points: ``gptq`` where they are kept less one, ``gptq_v2`` where as they are; None where nothing is said.
        ordered: inputs were sorted into groups, so that each tensor must have its ``g_idx``.
        unknown: the name of a layout that is not understood.
    """

    schemes: tuple[IntegerScheme, ...] = ()
    zero_points: str | None = None
    ordered: bool = False
    unknown: str | None = None


def integer_settings(
    sections: Iterable[Mapping[str, Any]], read_file: Callable[[str], bytes | None], where: str
) -> IntegerSettings:
    """What the config's sections, or else a file of its own beside the weights, say.

    Args:
        read_file: gives such a file by its name; None where there is none.

    Raises:
        InputError: a settings file that cannot be read.
    """
    for settings in _declared(sections, read_file, where):
        groups = settings.get("config_groups")
        if isinstance(groups, Mapping):
            schemes = [_compressed(group.get("weights")) for group in groups.values() if isinstance(group, Mapping)]
            return IntegerSettings(tuple(scheme for scheme in schemes if scheme is not None))
        return _gptq_or_awq(settings)
    return IntegerSettings()


def _declared(
    sections: Iterable[Mapping[str, Any]], read_file: Callable[[str], bytes | None], where: str
) -> Iterator[Mapping[str, Any]]:
    for section in sections:
        for key in _KEYS:
            if isinstance(section.get(key), Mapping):
                yield section[key]
    for name in SETTINGS_FILES:
        raw = read_file(name)
        if raw is not None:
            yield parse_object(raw, f"{where}/{name}", strict=False)


def _gptq_or_awq(settings: Mapping[str, Any]) -> IntegerSettings:
    method, layout = settings.get("quant_method"), settings.get("packing_format")
    version = str(settings.get("version") or "gemm").lower()
    # GPTQModel has called it by both names.
    kept = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    unknown = None
    if method == "auto-round":
        unknown = None if layout in _AUTO_ROUND else f"AutoRound's layout {layout}"
        kept = _AUTO_ROUND.get(str(layout))
    elif method == "awq":
        unknown = None if version in _AWQ_VERSIONS else f"AWQ's layout {version}"
    elif method not in (None, "gptq"):
        unknown = f"the layout of {method}"
    elif settings.get("is_marlin_format") or kept not in _GPTQ_FORMATS:
        unknown = f"GPTQ's layout {'marlin' if settings.get('is_marlin_format') else kept}"
    bits = _whole(settings.get("bits", settings.get("w_bit")))
    group = _whole(settings.get("group_size", settings.get("q_group_size")))
    # Per-module settings of GPTQModel and AutoRound: patterns of names, which the shapes make superfluous.
    open_ended = settings.get("dynamic") or settings.get("extra_config")
    return IntegerSettings(
        schemes=() if open_ended else (IntegerScheme(bits, group),),
        zero_points=kept if method != "awq" else None,
        ordered=settings.get("desc_act") is True,
        unknown=unknown,
    )


def _compressed(weights: Any) -> IntegerScheme | None:
    if not isinstance(weights, Mapping) or weights.get("type", "int") != "int":
        return None
    whole = weights.get("strategy") in ("channel", "tensor")
    symmetric = weights.get("symmetric", True)
    group = -1 if whole else _whole(weights.get("group_size"))
    return IntegerScheme(_whole(weights.get("num_bits")), group, symmetric if isinstance(symmetric, bool) else None)


def _whole(number: Any) -> int | None:
    """A number of bits or elements, or -1; None for what is none."""
    known = isinstance(number, int) and not isinstance(number, bool) and (number > 0 or number == -1)
    return number if known else None
