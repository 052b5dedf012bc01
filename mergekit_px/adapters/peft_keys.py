"""The tensor names of a PEFT file, taken apart: adapted modules, whole tensors, trained token rows.

Names look like ``base_model.model.<module path>.<parameter>[.<adapter>][.weight|.bias]``. PEFT drops the adapter's
name when it saves; files written by other programs may keep it, or lack the prefix.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import StoredTensor
from mergekit_px.errors import AdapterError

_PREFIXES = ("base_model.model.", "base_model.")
_LEAVES = ("weight", "bias")
_TOKENS = "trainable_tokens_delta"
_TOKENS_BEFORE = "trainable_tokens_original"
_WRAPPERS = ("base_layer", "token_adapter")
_DEFAULT_NAME = "default"


@dataclass(frozen=True)
class Module:
    """The adapter's tensors at one module.

    Attributes:
        path: of the module, in the class that was trained; ``base_layer`` components are kept.
        tensors: by parameter: ``lora_A``, ``lora_B``, ``lora_B.bias``, ... (``.weight`` is left out).
        inner: further modules of the same name that this one was wrapped around, outermost first: one for each
            further parameter of a module whose parameters were adapted (``target_parameters``).
        component: of a pipeline, where the file says so: ``unet``, ``text_encoder``, ...
        flat: the path has underscores where the module's has dots.
        prefix: what stood before a flat path and told its component.
    """

    path: str
    tensors: Mapping[str, StoredTensor]
    inner: tuple[Module, ...] = ()
    component: str | None = None
    flat: bool = False
    prefix: str | None = None

    @property
    def name(self) -> str:
        """The path without the components that PEFT's wrappers put in."""
        return unwrapped(self.path)

    @property
    def keys(self) -> list[str]:
        return [tensor.name for tensor in self.tensors.values()]


@dataclass
class ParsedKeys:
    """Everything in a file.

    Attributes:
        modules: by name.
        whole: tensors that replace the base's, by their name in the trained class.
        tokens: trained embedding rows by module path.
    """

    modules: dict[str, Module] = field(default_factory=dict)
    whole: dict[str, StoredTensor] = field(default_factory=dict)
    tokens: dict[str, StoredTensor] = field(default_factory=dict)


def parse_keys(tensors: Mapping[str, StoredTensor], parameters: Collection[str], where: str) -> ParsedKeys:
    """Sort every tensor of a file into one of the three groups.

    Args:
        parameters: the parameter names of the adapter's kind.

    Raises AdapterError for a name that has no place, or for two adapters in one file.
    """
    found: dict[str, dict[str, StoredTensor]] = {}
    infixes: set[str] = set()
    parsed = ParsedKeys()
    for key, tensor in tensors.items():
        parts = _without_prefix(key).split(".")
        position = max((i for i, part in enumerate(parts) if part in parameters or part == _TOKENS), default=None)
        if position is None:
            _put_whole(parsed.whole, parts, tensor)
            continue
        path, parameter, rest = ".".join(parts[:position]), parts[position], parts[position + 1 :]
        leaf = rest.pop() if rest and rest[-1] in _LEAVES else "weight"
        if len(rest) > 1:
            raise AdapterError(f"{shown(key)} is not the name of an adapter's tensor", where=where)
        infixes.update(rest)
        if parameter == _TOKENS:
            parsed.tokens[unwrapped(path)] = tensor
            continue
        role = parameter if leaf == "weight" else f"{parameter}.{leaf}"
        if role in found.setdefault(path, {}) and len(infixes) < 2:
            raise AdapterError(
                f"{shown(key)} and {shown(found[path][role].name)} are the same factor of one module", where=where
            )
        found[path][role] = tensor
    if len(infixes) > 1:
        raise AdapterError(
            f"several adapters in one file: {', '.join(map(shown, sorted(infixes)))}",
            where=where,
            hint="save each of them into a folder of its own",
        )
    parsed.modules = _nested([Module(path, roles) for path, roles in found.items()])
    return parsed


def _nested(modules: list[Module]) -> dict[str, Module]:
    by_name: dict[str, list[Module]] = {}
    for module in sorted(modules, key=lambda module: len(module.path)):
        by_name.setdefault(module.name, []).append(module)
    return {name: replace(group[0], inner=tuple(group[1:])) for name, group in by_name.items()}


def unwrapped(path: str) -> str:
    """A path without the components that PEFT's wrappers put in."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _without_prefix(key: str) -> str:
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _put_whole(whole: dict[str, StoredTensor], parts: list[str], tensor: StoredTensor) -> None:
    """File a whole tensor under its plain name. A file may hold ``m.bias``, ``m.modules_to_save.bias`` and
    ``m.original_module.bias`` side by side: the first is the trained one, the last never is."""
    if "original_module" in parts or _TOKENS_BEFORE in parts:
        return
    name = unwrapped(".".join(parts))
    if "modules_to_save" not in parts:
        whole[name] = tensor
        return
    at = parts.index("modules_to_save")
    inside = parts[at + 1 :]
    if inside[:1] == [_DEFAULT_NAME]:
        inside = inside[1:]
    whole.setdefault(unwrapped(".".join(parts[:at] + inside)), tensor)
