"""Configs with ``modules:``: a config for each part of a model, and the step that puts the parts together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for
from mergekit_px.located.yaml_text import Node, Place, mapping, sequence
from mergekit_px.recipe.mergekit.entries import IdleKeys, entries_of

_MAIN = ("text_decoder", "decoder")
"""Modules of mergekit's that a model's head and all that is in no other module belong to, if it has them."""

_KNOWN = ("default", *_MAIN, "encoder", "shared", "vision_model", "vision_tower", "multi_modal_projector")
"""The modules of the architectures that mergekit describes; of others it makes names of its own."""

_PATTERNS = {
    "vision_tower": ("*vision_tower.*", "visual.*", "model.visual.*"),
    "multi_modal_projector": ("*multi_modal_projector.*", "*visual.merger.*", "*visual.deepstack_merger_list.*"),
}
"""Names of the tensors of mergekit's modules, where the module's name does not say them. Of two that match a tensor
the later counts."""


@dataclass(frozen=True, slots=True)
class Module:
    """A part of a model: a config of its own.

    Attributes:
        name: mergekit's; None for a config without modules, or with the one that stands for the whole model.
        config: what the config says, with the part's own models or slices.
        parameters: the part's, which come before those of the whole.
    """

    name: str | None
    config: Node
    parameters: Node | None = None

    def patterns(self) -> list[str]:
        """Globs on the names of its tensors."""
        return list(_PATTERNS.get(self.name or "", (f"{self.name}.*", f"*.{self.name}.*")))

    def stack(self) -> list[str]:
        """Globs on the names of its layers; none for the language model of a multimodal one, whose stack is known."""
        return [] if self.name == "text_decoder" else self.patterns()


def read_modules(root: Node, idle: IdleKeys) -> list[Module]:
    """The modules of a config, that to which everything else belongs first.

    Raises:
        RecipeError: modules beside models or slices, or modules that are none.
    """
    node = root.value.get("modules") if isinstance(root.value, dict) else None
    if node is None or node.value is None:
        return [Module(None, root)]
    assert isinstance(root.value, dict)
    if beside := next((key for key in ("models", "slices") if key in root.value), None):
        raise RecipeError(f"either modules or {beside}, not both", where=str(root.keys[beside]))
    found = []
    for name, part in entries_of(node, "'modules'").items():
        own = entries_of(part, f"the module '{name[:80]}'", ("models", "slices", "parameters"), idle)
        parameters = own.pop("parameters", None)
        entries: dict[str, Node | None] = {
            **{key: child for key, child in root.value.items() if key != "modules"},
            **own,
        }
        if name not in _KNOWN:
            hint = hint_for(name, _KNOWN)
            what = f"the module '{name[:80]}' is none of those that mergekit describes"
            idle.setdefault(f"{what} ({hint}); it is taken by the names of its tensors.", part.place)
        keys = {**root.keys, **part.keys}
        found.append(Module(name, mapping(part.place, entries, keys), parameters))
    if not found:
        raise RecipeError("'modules' is empty", where=str(node.place))
    if len(found) == 1 and found[0].name == "default":
        return [Module(None, found[0].config, found[0].parameters)]
    if any(module.name == "default" for module in found):
        raise RecipeError("the module 'default' is the whole model, and stands alone", where=str(node.place))
    late = list(_PATTERNS)
    return sorted(found, key=lambda one: (one.name not in _MAIN, late.index(one.name) + 1 if one.name in late else 0))


def join_modules(modules: Sequence[Module], steps: Mapping[str, str], place: Place) -> Node:
    """The step that takes each module's tensors from its own step, all others from the first.

    Args:
        steps: what each module has become, by its name.
    """
    main, *others = modules
    rules = [
        mapping(
            place,
            {
                "match": sequence(place, [Node(glob, place) for glob in module.patterns()]),
                "take": Node(steps[module.name or ""], place),
            },
        )
        for module in others
    ]
    return mapping(
        place,
        {
            "method": Node("passthrough", place),
            "sources": sequence(place, [Node(steps[main.name or ""], place)]),
            "rules": sequence(place, rules) if rules else None,
        },
    )
