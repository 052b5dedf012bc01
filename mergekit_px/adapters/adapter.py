"""An adapter as found on disk, and what it makes of a base checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mergekit_px.adapters.binder import Binder, BindOptions
from mergekit_px.adapters.components import DENOISERS
from mergekit_px.adapters.config import AdapterConfig
from mergekit_px.adapters.patch import Patch, ReplacePatch, chain
from mergekit_px.adapters.peft_keys import Module, ParsedKeys
from mergekit_px.adapters.registry import Family
from mergekit_px.adapters.replaced import bind_rows
from mergekit_px.adapters.targets import check_targets, missing_whole, unfilled
from mergekit_px.adapters.ties import config_updates, is_vocabulary
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.open import Checkpoint, StoredTensor
from mergekit_px.errors import AdapterError


@dataclass(frozen=True)
class Binding(Mapping[str, Patch]):
    """The patches of one adapter on one base, by target.

    Attributes:
        config_updates: fields of the base's config.json that must change with the tensors, nested as in the file.
        modules: the adapter's module for each target of the adapter proper.
        left_out: adapter tensors that belong to another component of a pipeline than the one bound.
        unfilled: layers of the base that the configuration says are adapted, and that the adapter has nothing for.
    """

    patches: Mapping[str, Patch]
    config_updates: Mapping[str, Any] = field(default_factory=dict)
    modules: Mapping[str, Module] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    unfilled: tuple[str, ...] = ()

    def __getitem__(self, target: str) -> Patch:
        return self.patches[target]

    def __iter__(self) -> Iterator[str]:
        return iter(self.patches)

    def __len__(self) -> int:
        return len(self.patches)


@dataclass(frozen=True)
class Adapter:
    """One adapter, described; no numbers are read.

    Attributes:
        label: as the user wrote it.
        checkpoint: its tensors.
        config: its configuration; for files without one, what their names tell.
        family: how its modules are merged.
        keys: its tensors, sorted.
    """

    label: str
    checkpoint: Checkpoint
    config: AdapterConfig
    family: Family
    keys: ParsedKeys

    @property
    def kind(self) -> str:
        """``peft_type``, or the family of a file that has no configuration."""
        return self.config.kind

    @property
    def base_model_name(self) -> str | None:
        """The base that the adapter says it was trained on."""
        return self.config.base_model_name

    def bind(self, base: Checkpoint, options: BindOptions | None = None) -> Binding:
        """What the adapter makes of each tensor of ``base``. Every tensor of the adapter takes part.

        Patches that replace a whole tensor come first, then the adapter proper, then single rows.

        Raises AdapterError: an adapter that cannot be merged, with the reason; names that fit nothing in the base;
        shapes that clash; a missing half; a rank that contradicts the configuration.
        """
        options = options or BindOptions()
        if base.parts:
            return _joined(self._bind_parts(base, options))
        self.check(options)
        modules, left_out = self.of_component(options.component)
        binder = Binder(base, self.config, options, modules)
        collected: dict[str, list[Patch]] = defaultdict(list)
        for patch in self._replacements(binder):
            collected[patch.target].append(patch)
        resized = {name: patches[0].out_shape for name, patches in collected.items()}
        binder.resize(resized)
        owners: dict[str, Module] = {}
        for module in modules.values():
            for patch in self.family.bind(module, binder):
                other = owners.setdefault(patch.target, module)
                if other is not module:
                    raise self._both_fit(other, module, patch.target)
                collected[patch.target].append(patch)
        for path, rows in self.keys.tokens.items():
            patch = bind_rows(path, rows, resized, binder)
            collected[patch.target].append(patch)
        patches, untied = binder.ties.resolve(
            {target: chain(patches) for target, patches in collected.items()},
            keep_tied=options.keep_tied,
            trained_tied=self.config.flag("ensure_weight_tying"),
            where=self.config.where,
        )
        adapted = {target.rpartition(".")[0] for target in owners}
        layers = [name.removesuffix(".weight") for name, tensor in base.tensors.items() if len(tensor.shape) > 1]
        empty = tuple(unfilled(self.config, adapted, layers))
        return Binding(patches, config_updates(base.config, patches, untied=untied), owners, left_out, empty)

    def check(self, options: BindOptions) -> None:
        """Raises AdapterError, with the reason, for an adapter that no base can be changed by."""
        self.family.check(self.config, options)
        check_targets(self.config, self.keys)

    def _bind_parts(self, base: Checkpoint, options: BindOptions) -> Iterator[tuple[str, Binding]]:
        """The folders of a model in several that the adapter changes, with what it makes of the tensors in each.

        An adapter that names no components is for the model in the folder itself, where there is one.
        """
        named = sorted({module.component for module in self.keys.modules.values() if module.component})
        if not named and "" not in base.parts:
            raise self.config.error(
                f"it does not say for which of {', '.join(base.parts)} it is",
                hint="give that one alone as its model: {model: ..., component: ..., adapter: ...}",
            )
        if not named:
            yield "", self.bind(base.part(""), options)
        for component in named:
            names = DENOISERS if component in DENOISERS else (component,)
            folder = next((name for name in names if name in base.parts), None)
            if folder is None:
                raise self.config.error(
                    f"it is for {shown(component)} too, and the model has {', '.join(base.parts)}",
                    hint="is this the right base? For one component alone: {model: ..., component: ..., adapter: ...}",
                )
            binding = self.bind(base.part(folder), replace(options, component=component))
            if binding.config_updates:
                raise self.config.error(
                    f"it changes the config of {folder}", hint=f"apply it to {folder} alone, by `component: {folder}`"
                )
            yield folder, binding

    def _both_fit(self, one: Module, other: Module, target: str) -> AdapterError:
        names = [f"{module.component}: {module.name}" if module.component else module.name for module in (one, other)]
        apart = one.component != other.component
        return self.config.error(
            f"{shown(names[0])} and {shown(names[1])} both fit {shown(target)} of the base",
            hint="name the part that the base is with --component (component: in a recipe)" if apart else None,
        )

    def of_component(self, wanted: str | None) -> tuple[dict[str, Module], tuple[str, ...]]:
        """The modules of one component of a pipeline, and the names of the other tensors; all, where none is named.

        Raises AdapterError where there is nothing for the component.
        """
        present = {module.component for module in self.keys.modules.values() if module.component}
        if wanted is None:
            return self.keys.modules, ()
        names = set(DENOISERS) if wanted in DENOISERS else {wanted}
        if not present & names:
            raise self.config.error(
                f"there is nothing for the component {shown(wanted)}",
                hint=f"the file has {', '.join(sorted(present)) or 'no components'}",
            )
        chosen = {key: module for key, module in self.keys.modules.items() if module.component in names}
        others = [key for name, module in self.keys.modules.items() if name not in chosen for key in module.keys]
        return chosen, tuple(sorted(others))

    def _replacements(self, binder: Binder) -> Iterator[Patch]:
        missing = missing_whole(self.config, self.keys, binder.names.modules)
        if missing is not None and not (binder.ties.tied and is_vocabulary(f"{missing}.weight")):
            raise self.config.error(f"'modules_to_save' names {shown(missing)}, and the file does not hold it")
        for name, tensor in self.keys.whole.items():
            yield _replacement(name, tensor, binder)


def _joined(bindings: Iterable[tuple[str, Binding]]) -> Binding:
    """One binding of those of a model's folders."""
    patches: dict[str, Patch] = {}
    modules: dict[str, Module] = {}
    updates: Mapping[str, Any] = {}
    for folder, binding in bindings:
        start = f"{folder}/" if folder else ""
        for target, patch in binding.patches.items():
            source = None if patch.source is None else start + patch.source
            patches[start + target] = replace(patch, target=start + target, source=source)
        modules.update({start + target: module for target, module in binding.modules.items()})
        updates = binding.config_updates or updates
    return Binding(patches, updates, modules)


def _replacement(name: str, tensor: StoredTensor, binder: Binder) -> ReplacePatch:
    module, _, leaf = name.rpartition(".")
    place = binder.names.find(module)
    target = f"{place}.{leaf}" if place else leaf if place == "" else name
    existing = binder.base.tensors.get(target)
    listed = any(
        module == saved or module.endswith(f".{saved}") or f".{saved}." in f".{module}."
        for saved in binder.config.names("modules_to_save")
    )
    if existing is None and not listed and not binder.ties.is_missing_head(module):
        raise binder.names.unmatched([name])
    resized = is_vocabulary(target) and existing is not None and existing.shape[1:] == tensor.shape[1:]
    if existing is not None and existing.shape != tensor.shape and not (listed or resized):
        raise binder.clash(existing, tensor.shape)
    return ReplacePatch(
        target=target,
        source=None,
        out_shape=tensor.shape,
        out_dtype=None if existing is not None and existing.dtype.arithmetic else tensor.dtype,
        factors={"value": tensor},
    )
