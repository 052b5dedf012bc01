"""Which modules a configuration says are adapted, and whether the tensors agree.

PEFT makes adapters where the configuration says, then loads the file and passes over every tensor that has no place:
a file for all layers under ``layers_to_transform: [0]`` changes layer 0 only, without a word. Here every tensor of an
adapter takes part, so a configuration that shuts a module out contradicts its file. ``target_modules`` alone is not
held to: programs other than PEFT write it loosely and apply all tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from mergekit_px.adapters.config import AdapterConfig
from mergekit_px.adapters.peft_keys import Module, ParsedKeys
from mergekit_px.checkpoint.json_text import shown

_ANY_LAYER = r".*?\.[^.]*\.(\d+)\."
"""PEFT's own expression: the first number that is a component, with two before it."""


def check_targets(config: AdapterConfig, keys: ParsedKeys) -> None:
    """Raises AdapterError where the configuration leaves out a module that the file has tensors for, or promises
    token rows that it lacks."""
    for module in _by_target(config, keys.modules):
        field = _shut_out(config, module.name)
        if field is not None:
            raise config.error(
                f"there are tensors for {shown(module.name)}, which '{field}' leaves out",
                hint="PEFT passes over them; take them out of the file, or the field out of the configuration",
            )
    if config.values.get("trainable_token_indices") and not keys.tokens and not keys.whole:
        raise config.error("'trainable_token_indices' names rows, and the file has none")


def missing_whole(config: AdapterConfig, keys: ParsedKeys, modules: Collection[str]) -> str | None:
    """A module of the base that ``modules_to_save`` names and the file does not hold."""
    held = [name.rpartition(".")[0] for name in keys.whole]
    for saved in config.names("modules_to_save"):
        if not any(f".{saved}." in f".{name}." for name in held) and any(_ends(name, saved) for name in modules):
            return saved
    return None


def untargeted(config: AdapterConfig, modules: Mapping[str, Module]) -> list[str]:
    """The modules of the file that ``target_modules`` does not name."""
    if _targets(config) is None:
        return []
    return [module.name for module in _by_target(config, modules) if not _is_named(config, module.name)]


def unfilled(config: AdapterConfig, adapted: Collection[str], layers: Iterable[str]) -> list[str]:
    """The layers of the base that ``target_modules`` names and the file has nothing for, in the stacks that it has
    something for.

    Args:
        adapted: the modules of the base that the file has tensors for.
        layers: all of the base's that have a matrix.
    """
    if _targets(config) is None:
        return []
    stacks = tuple({found.group() for found in map(_BEFORE_NUMBER.match, adapted) if found})
    return [
        name
        for name in layers
        # the experts of a mixture may be one tensor each here and all together in the class that was trained
        if name.startswith(stacks) and name not in adapted and "experts" not in name.split(".")
        if _is_named(config, name) and _shut_out(config, name) is None
    ]


_BEFORE_NUMBER = re.compile(r".*?\.(?=\d+\.)")


def _targets(config: AdapterConfig) -> str | list[str] | None:
    named = config.values.get("target_modules")
    if isinstance(named, str):
        return None if named in ("", "all-linear") else named
    return config.names("target_modules") or None


def _by_target(config: AdapterConfig, modules: Mapping[str, Module]) -> Iterator[Module]:
    """The modules that these fields are about: not those whose bare parameters are adapted."""
    parents = [name.rpartition(".")[0] for name in config.names("target_parameters")]
    for module in modules.values():
        if module.path and not module.inner and not any(_ends(module.name, parent) for parent in parents):
            yield module


def _is_named(config: AdapterConfig, path: str) -> bool:
    targets = _targets(config)
    if isinstance(targets, str):
        return _match(config, "target_modules", rf"(?:{targets})\Z", path) is not None
    # an attention's output is adapted with the attention
    return any(_ends(place, name) for name in targets or () for place in (path, path.removesuffix(".out_proj")))


def _shut_out(config: AdapterConfig, path: str) -> str | None:
    """The field by which PEFT leaves a module out."""
    excluded = config.values.get("exclude_modules")
    if isinstance(excluded, str):
        if excluded and _match(config, "exclude_modules", rf"(?:{excluded})\Z", path):
            return "exclude_modules"
    elif any(_ends(path, name) for name in config.names("exclude_modules")):
        return "exclude_modules"
    for saved in config.names("modules_to_save"):
        if _match(config, "modules_to_save", rf"(?:^|.*\.){saved}(?:$|\.)", path):
            return "modules_to_save"
    return "layers_to_transform" if _in_other_layer(config, path) else None


def _in_other_layer(config: AdapterConfig, path: str) -> bool:
    """Whether the layers that are chosen beside a list of targets are others."""
    layers, targets = config.values.get("layers_to_transform"), _targets(config)
    chosen = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not chosen or isinstance(targets, str) or path in (targets or ()):
        return False
    patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in config.names("layers_pattern") if name]
    found = [_match(config, "layers_pattern", pattern, path) for pattern in patterns or [_ANY_LAYER]]
    first = next(filter(None, found), None)
    return first is None or int(first[1]) not in chosen


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _match(config: AdapterConfig, field: str, pattern: str, path: str) -> re.Match[str] | None:
    try:
        return re.match(pattern, path)
    except re.error as error:
        raise config.error(f"'{field}' is no regular expression: {error}") from None
