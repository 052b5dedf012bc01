"""From a recipe's graph to one expression for each output tensor.

Everything is driven by the names in the files: the union of the names of a step's inputs is what the step gives,
and a name is left out only where the recipe says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergekit_px.errors import PlanError, RecipeError, TensorMismatchError, UsageError
from mergekit_px.methods import find_method
from mergekit_px.methods.declare import Companions, Method, Params, check_source_count
from mergekit_px.plan.adapters import adapted_model, adapter_changes, as_kind, is_unchanged
from mergekit_px.plan.artefacts import Artefacts
from mergekit_px.plan.companions import Companion, companion_nodes, model_names, split_companions
from mergekit_px.plan.expert_choice import ChosenExperts, with_choice
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.layers import depth, is_derived, stack_sizes
from mergekit_px.plan.mixtures import BuiltMixture, with_experts
from mergekit_px.plan.names import alone, bridge, difference, in_all_layers, rename_hint, renamed, respelled
from mergekit_px.plan.nodes import Apply, Kind, Leaf, Node
from mergekit_px.plan.rules import by_source, idle_rules, matching, rules_outside, weights_by_rule
from mergekit_px.plan.slices import slice_slots, stacked_models
from mergekit_px.plan.slots import Namespace, Slot
from mergekit_px.plan.tied import is_head, is_vocabulary, tied_copy, tied_source
from mergekit_px.plan.tokenizers import Vocabularies
from mergekit_px.plan.values import resolve_params, resolve_weight, varies
from mergekit_px.plan.views import StoredView, first_rows, stored_view
from mergekit_px.plan.vocabulary import ChosenVocabulary
from mergekit_px.recipe.loaded import LoadedRecipe
from mergekit_px.recipe.model import Rule, Step, Value


@dataclass
class Expressions:
    """Builds the namespaces of a recipe's models and steps, each once; notes and dropped names fill up meanwhile."""

    loaded: LoadedRecipe
    inputs: Mapping[str, ResolvedInput]
    vocabularies: Vocabularies | ChosenVocabulary | None = None
    notes: list[str] = field(default_factory=list)
    dropped_names: dict[str, str] = field(default_factory=dict)
    """Output tensor name -> why the recipe leaves it out."""
    untied: list[str] = field(default_factory=list)
    """Heads that were tied in an input and are written on their own."""
    layer_sources: dict[str, list[list[tuple[str, int]]]] = field(default_factory=dict)
    """Step with slices -> for each output layer, its (source, layer) pairs."""
    mixtures: dict[str, list[BuiltMixture | ChosenExperts]] = field(default_factory=dict)
    """Step with experts -> what its source's config has to follow, in order."""
    config_updates: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Input with adapters -> what they change in its config."""
    tied: dict[str, dict[str, str]] = field(default_factory=dict)
    """Step -> the copies that it leaves out, each with the tensor that it is a copy of."""
    artefacts: Artefacts = field(init=False)
    uncomputed: dict[str, Sequence[Node]] = field(default_factory=dict)
    """Tensors that are copied because they are no real numbers -> what each model has, the one that is copied first."""
    companions: set[str] = field(default_factory=set)
    """Inputs that hold statistics of others."""
    _namespaces: dict[tuple[str, str | None], Namespace] = field(default_factory=dict)
    _offered: dict[str, Namespace] = field(default_factory=dict)
    _views: dict[str, StoredView] = field(default_factory=dict)
    _resolved: dict[Any, tuple[Method, Params, tuple[float, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.artefacts = Artefacts(self.loaded.path)

    def namespace(self, name: str, base: str | None = None) -> Namespace:
        """The tensors of a model or step.

        Args:
            base: for an adapter without a model, the model that it is for.

        Raises:
            PlanError, RecipeError: the step cannot be made of its inputs; the message says where and why.
        """
        alone = name in self.inputs and self.inputs[name].adapter_only
        key = (name, base if alone else None)
        if key not in self._namespaces:
            if alone:
                model = self.inputs.get(base or "")
                nodes = None if model is None else self.namespace(model.name)
                checkpoint = None if model is None else self.view(model).checkpoint
                changes = adapter_changes(self.inputs[name], nodes, checkpoint)
                self.notes.extend(changes.notes)
                self._namespaces[key] = changes.nodes
            elif name in self.inputs:
                self._namespaces[key] = self._stored(self.inputs[name])
            else:
                step = self.loaded.recipe.steps[name]
                built = with_experts(name, step.mixture, self._step(name, step), self)
                self._namespaces[key] = with_choice(name, step.experts, built, self)
        return self._namespaces[key]

    def _stored(self, source: ResolvedInput) -> Namespace:
        nodes = self.offered(source.name)
        if self.vocabularies is not None:
            nodes = self.vocabularies.arranged(source, nodes, self.offered)
        request = self.loaded.recipe.models.get(source.name)
        if request is not None and request.rename:
            nodes = renamed(nodes, request.rename, self.loaded.where("models", source.name, "rename"))
        return nodes

    def offered(self, name: str) -> Namespace:
        """What a model offers with its adapters, before its rows are arranged and its tensors renamed."""
        if name not in self._offered:
            source = self.inputs[name]
            if not source.checkpoint.tensors:
                raise PlanError("the model has no tensors", where=source.reference)
            view = self.view(source)
            adapted = adapted_model(source, view.nodes, view.checkpoint)
            self.notes.extend(adapted.notes)
            if adapted.config_updates is not None:
                self.config_updates[source.name] = adapted.config_updates
            self._offered[name] = adapted.nodes
        return self._offered[name]

    def view(self, source: ResolvedInput) -> StoredView:
        """What an input's checkpoint offers before its adapters."""
        if source.name not in self._views:
            self._views[source.name] = stored_view(source)
            self.notes.extend(self._views[source.name].notes)
        return self._views[source.name]

    def _step(self, name: str, step: Step) -> Namespace:
        where = self.loaded.where("steps", name)
        slots = self._stacked(name, step) if step.slices is not None else self._slots(name, step)
        sizes = stack_sizes(slot.name for slot in slots)
        nodes: dict[str, Node] = {}
        by_name = {slot.name: slot for slot in slots}
        self.notes += idle_rules(name, step, by_name)
        for slot in slots:
            if self._is_copy(name, slot, by_name):
                continue
            node = self._node(name, step, slot, sizes, where)
            if node is not None:
                nodes[slot.name] = node
        if not nodes:
            raise PlanError(f"step '{name}' gives no tensors", where=where)
        if step.slices is None:
            members = [member for member in (step.base, *step.source_names()) if member in self.layer_sources]
            if members:
                self.layer_sources[name] = self.layer_sources[members[0]]
        return nodes

    def _stacked(self, name: str, step: Step) -> list[Slot]:
        members = stacked_models(step)
        bridged = {member: self._bridged(name, step, members[0], member) for member in members[1:]}
        spelled = {member: in_all_layers(names, self.namespace(member)) for member, names in bridged.items()}
        named = dict(self._namespaces)
        named |= {(member, None): respelled(self.namespace(member), names) for member, names in spelled.items()}
        stacked = slice_slots(name, step, replace(self, _namespaces=named))
        if not step.stack:  # other stacks keep their layers, so the config has nothing to follow
            self.layer_sources[name] = stacked.layer_sources
        self.untied.extend(head for head in stacked.untied if head not in self.untied)
        return [slot.spelled(spelled) for slot in stacked.slots]

    def _is_copy(self, step: str, slot: Slot, slots: Mapping[str, Slot]) -> bool:
        """Whether a tensor is a copy of another one in all models that make it, and so follows that one.

        A rule that names a head and not its embedding wants them apart: the pair is then untied.
        """
        originals = {self._original(member, slots) for member in slot.members if not self._is_change(member[0])}
        original = originals.pop() if len(originals) == 1 else None
        if original is None or original not in slots or slots[original].models != slot.models:
            return False
        if is_head(slot.name):
            rules, others = (rules_outside(one.rules, one.name, one.position) for one in (slot, slots[original]))
            if any(rule not in others and not rule.drop for rule in rules):
                self.untied.append(slot.name)
                self.notes.append(f"{slot.name} is tied to {original}; a rule treats it apart, so it is untied")
                return False
        self.tied.setdefault(step, {})[slot.name] = original
        self.dropped_names[slot.name] = f"it is tied to {original}, which is written once"
        self.notes.append(f"{slot.name} is tied to {original} and follows it; one of them is written")
        return True

    def _is_change(self, name: str) -> bool:
        return name in self.inputs and self.inputs[name].is_task_vector

    def _original(self, made: tuple[str, str], slots: Mapping[str, Slot]) -> str | None:
        """The slot of the tensor of which a model's is a copy, whatever it is called there."""
        if (original := self._original_there(*made)) is None:
            return None
        return next((slot.name for slot in slots.values() if (made[0], original) in slot.members), original)

    def _original_there(self, member: str, tensor: str) -> str | None:
        if member not in self.inputs:
            return self.tied.get(member, {}).get(tensor)
        source = self.inputs[member]
        self.namespace(member)
        if source.config is None or self.config_updates.get(member, {}).get("tie_word_embeddings") is False:
            return None
        text = self.config_updates.get(member, {}).get("text_config", {})
        return None if text.get("tie_word_embeddings") is False else tied_copy(tensor, source, source.config)

    def _slots(self, step_name: str, step: Step) -> list[Slot]:
        sources = step.source_names()
        names: dict[str, None] = {}
        spelled: dict[str, Mapping[str, str]] = {}
        members = list(dict.fromkeys(([step.base] if step.base else []) + model_names(step)))
        for member in members:
            own = self.namespace(member, step.base)
            spelled[member] = self._bridged(step_name, step, members[0], member) if member != members[0] else {}
            known = set(spelled[member].values())
            names.update(dict.fromkeys(name for name in own if name not in known))
        written = step.sources if isinstance(step.sources, Mapping) else dict.fromkeys(sources)
        weights = tuple(written.values())
        return [
            Slot(
                name=name,
                sources=tuple((source, spelled.get(source, {}).get(name, name)) for source in sources),
                base=(step.base, name) if step.base else None,
                params=step.params,
                weights=weights,
                rules=tuple(step.rules),
                position=None,
                part=-1,
            )
            for name in names
        ]

    def _bridged(self, step_name: str, step: Step, first: str, member: str) -> Mapping[str, str]:
        """Names of a step's first model -> those of another of its models, where they are spelled in two ways.

        Raises:
            PlanError: a policy for missing tensors where almost none is in both.
        """
        reference, own = self.namespace(first, step.base), self.namespace(member, step.base)
        found = bridge(reference, own)
        if found.names:
            self.notes.append(
                f"names of '{member}' are read as those of '{first}': {found.describe()}"
                f" ({len(found.names)} of {len(own)} tensors)"
            )
        if step.missing != "error" and step.slices is None:
            where = self.loaded.where("steps", step_name)
            left = alone((first, reference), (member, own), found, f"missing: {step.missing}", where)
            self.notes += [left] if left else []
        return found.names

    def _node(self, step_name: str, step: Step, slot: Slot, sizes: Mapping[str, int], where: str) -> Node | None:
        place = slot.position if slot.position is not None else depth(slot.name, sizes)
        matched = matching(slot.rules, slot.name, place)
        rules = [slot.rules[index] for index in matched]
        decisive = next((rule for rule in reversed(rules) if rule.drop or rule.take or rule.method), None)
        if decisive is not None and decisive.drop:
            self.dropped_names[slot.name] = f"dropped by a rule of step '{step_name}'"
            return None
        if decisive is not None and decisive.take is not None:
            return self._taken(decisive.take, slot, where)
        method = find_method(decisive.method if decisive is not None and decisive.method else step.method)
        slot, companions = split_companions(step, method, slot, where)
        base = self._operand(*slot.base) if slot.base is not None else None
        wanted: Kind = "delta" if method.space == "deltas" or method.signed else "weights"
        operands = [as_kind(self._operand(source, name, step.base), wanted, slot.name) for source, name in slot.sources]
        if base is not None and all(is_unchanged(node) for node in operands) and method.space == "deltas":
            return base
        storage = [node for node in (base, *operands) if node is not None]
        if not storage:
            return None
        if not all(node.dtype.arithmetic for node in storage):
            return self._uncomputed(step_name, slot, base, operands)
        chosen = self._present(step_name, step, slot, method, base, operands, where)
        if not isinstance(chosen, tuple):
            return chosen
        base, indices = chosen
        method, params, weights = self._parameters(step, slot, rules, matched, method, indices, sizes, where)
        sources = [operands[index] for index in indices]
        nodes = self._same_shape(step, slot, base, [node for node in sources if node is not None], indices, where)
        base, members = (nodes[0], nodes[1:]) if base is not None else (None, nodes)
        statistics: list[Node] = []
        if method.companions is not None:
            statistics = self._statistics(method.companions, [companions[index] for index in indices], members, where)
        return self._apply(step_name, slot, method, params, weights, members, statistics, tuple(indices), base, where)

    def _statistics(self, kind: Companions, found: Sequence[Companion], members: list[Node], where: str) -> list[Node]:
        self.companions.update(source for source, _ in found)
        namespaces = {source: self.namespace(source) for source, _ in found}
        nodes = companion_nodes(kind, found, namespaces, members[0].shape, where)
        if not nodes:
            self.notes.append(f"tensors without {kind.what} are averaged by the weights")
        return nodes

    def _taken(self, name: str, slot: Slot, where: str) -> Node:
        translated = dict((source, tensor) for source, tensor in slot.sources)
        if slot.base is not None:
            translated.setdefault(*slot.base)
        node = self._operand(name, translated.get(name, slot.name), slot.base[0] if slot.base else None)
        node = as_kind(node, "weights", slot.name)
        if node is None:
            raise TensorMismatchError(
                f"'{slot.name}' is to be taken from '{name}', which does not have it", where=where
            )
        return node

    def _operand(self, source: str, name: str, base: str | None = None) -> Node | None:
        """A source's tensor; a head that is tied to the embedding is read from the embedding."""
        namespace = self.namespace(source, base)
        node = namespace.get(name)
        if node is None and source in self.inputs:
            tied = tied_source(name, self.inputs[source])
            if tied is not None:
                if name not in self.untied:
                    self.untied.append(name)
                    self.notes.append(f"{name} is tied to {tied} in '{source}' and stands on its own in the output")
                node = namespace.get(tied)
        if node is None and name in self.tied.get(source, {}):
            self.untied.append(name)
            node = namespace[self.tied[source][name]]
        return node

    def _uncomputed(self, step: str, slot: Slot, base: Node | None, operands: Sequence[Node | None]) -> Node:
        """Integer, boolean and packed tensors are not averaged: the base's is kept, else the first source's."""
        candidates = [node for node in (base, *operands) if node is not None]
        if not candidates:
            raise PlanError(f"step '{step}': no input has '{slot.name}'")
        self.uncomputed[slot.name] = candidates
        return candidates[0]

    def _present(
        self,
        step_name: str,
        step: Step,
        slot: Slot,
        method: Method,
        base: Node | None,
        operands: Sequence[Node | None],
        where: str,
    ) -> Node | tuple[Node | None, list[int]]:
        """Apply the policy for tensors that only some inputs have: a node to take, or the sources that take part."""
        indices = [index for index, node in enumerate(operands) if node is not None]
        base_needed = slot.base is not None and method.space == "deltas"
        base_missing = base_needed and base is None
        if len(indices) == len(operands) and not base_missing:
            return base, indices
        derived = is_derived(slot.name)
        if derived:
            self.notes.append("buffers that follow from the config, and that not all inputs store, are not merged")
        if derived or step.missing == "base":
            return base or next(node for node in operands if node is not None)
        if step.missing == "present":
            if not indices:
                assert base is not None
                return base
            if base_missing:
                only = operands[indices[0]]
                return only if len(indices) == 1 and only is not None else (None, indices)
            return base, indices
        have = [source for (source, _), node in zip(slot.sources, operands, strict=True) if node is not None]
        lack = [source for (source, _), node in zip(slot.sources, operands, strict=True) if node is None]
        if slot.base is not None:
            (have if base is not None else lack).append(slot.base[0])
        lacking = ", ".join(f"'{name}'" for name in dict.fromkeys(lack))
        having = ", ".join(f"'{name}'" for name in dict.fromkeys(have))
        told, hint = "", None
        if step.slices is None and have and lack:
            one, other = (self.namespace(name, step.base) for name in (have[0], lack[0]))
            told, hint = f"; {difference(one, other)}", rename_hint(one, other)
        raise TensorMismatchError(
            f"step '{step_name}': '{slot.name}' is in {having} but not in {lacking}{told}",
            where=where,
            hint=hint
            or "set `missing: present` or `missing: base`, drop it by a rule, or check that the models fit together",
        )

    def _parameters(
        self,
        step: Step,
        slot: Slot,
        rules: Sequence[Rule],
        matched: tuple[int, ...],
        method: Method,
        indices: Sequence[int],
        sizes: Mapping[str, int],
        where: str,
    ) -> tuple[Method, Params, tuple[float, ...]]:
        changed = False
        params: dict[str, Value] = dict(slot.params)
        weights = list(slot.weights)
        names = [source for source, _ in slot.sources]
        for rule in rules:
            if rule.method is not None:
                params, changed = {}, True
            params |= {field: by_source(value, params.get(field), names) for field, value in rule.params.items()}
            if rule.weights is not None:
                weights = weights_by_rule(rule, names, weights, where)
        place = slot.position if slot.position is not None else depth(slot.name, sizes)
        moving = any(varies(value) for value in (*params.values(), *weights))
        key = (id(step), slot.part, matched, tuple(indices), place if moving else None, method.name)
        if key not in self._resolved:
            chosen = [names[index] for index in indices]
            try:
                check_source_count(method, len(chosen))
            except UsageError as error:
                raise RecipeError(error.what, where=where) from None
            like = None if changed else step.like
            resolved = resolve_params(method, params, like, chosen, place, where, self.artefacts)
            if not method.uses_weights and not changed and any(weights[index] is not None for index in indices):
                raise RecipeError(f"{method.name} takes no weights", where=where)
            numbers = tuple(
                resolve_weight(weights[index], method.default_weight, place, names[index], where) for index in indices
            )
            try:
                method.check_weights(numbers, resolved)
            except UsageError as error:
                raise RecipeError(error.what, where=where, hint=error.hint) from None
            self._resolved[key] = (method, resolved, numbers)
        return self._resolved[key]

    def _same_shape(
        self, step: Step, slot: Slot, base: Node | None, sources: list[Node], indices: Sequence[int], where: str
    ) -> list[Node]:
        nodes = sources if base is None else [base, *sources]
        labels = [slot.sources[index][0] for index in indices]
        if base is not None and slot.base is not None:
            labels = [slot.base[0], *labels]
        shape = nodes[0].shape
        odd = next((index for index, node in enumerate(nodes) if node.shape != shape), None)
        if odd is None:
            return nodes
        other = nodes[odd].shape
        rows_differ = len(shape) == len(other) >= 1 and shape[1:] == other[1:] and is_vocabulary(slot.name)
        if step.vocabulary == "truncate" and all(
            len(node.shape) == len(shape) and node.shape[1:] == shape[1:] and isinstance(node, Leaf) for node in nodes
        ):
            rows = min(node.shape[0] for node in nodes)
            self.notes.append(f"{slot.name} keeps its first {rows} rows, which all inputs have")
            return [first_rows(node, rows) for node in nodes]
        raise TensorMismatchError(
            f"'{slot.name}' has shape {list(shape)} in '{labels[0]}' and {list(other)} in '{labels[odd]}'",
            where=where,
            hint=(
                "choose one tokenizer by --set tokenizer.from=union (or =MODEL), set `vocabulary: truncate` to keep "
                "the common rows, or take it from one model by a rule"
                if rows_differ
                else "the models are of different architectures or sizes; take or drop the tensor by a rule"
            ),
        )

    def _apply(
        self,
        step: str,
        slot: Slot,
        method: Method,
        params: Params,
        weights: tuple[float, ...],
        sources: list[Node],
        statistics: list[Node],
        indices: tuple[int, ...],
        base: Node | None,
        where: str,
    ) -> Node:
        kinds = [source.kind for source in sources]
        first = base if base is not None and base.kind == "weights" else sources[0]
        kind: Kind
        if method.space == "weights":
            if "delta" in kinds:
                delta = slot.sources[indices[kinds.index("delta")]][0]
                raise RecipeError(f"{method.name} merges full models, and '{delta}' is a task vector", where=where)
            kind, base = "weights", base if first is base and "load_base" in method.arguments else None
        elif method.space == "any":
            kind, base = self._linear_kind(method, weights, kinds, where), None
        elif base is None and "weights" in kinds:
            raise PlanError(f"step '{step}': {method.name} needs a base for '{slot.name}'", where=where)
        else:
            kind = "delta" if base is None else base.kind
        return Apply(
            step=step,
            method=method,
            params=params,
            weights=weights,
            sources=(*sources, *statistics),
            source_indices=indices,
            base=base,
            kind=kind,
            shape=sources[0].shape,
            dtype=first.dtype,
        )

    def _linear_kind(self, method: Method, weights: Sequence[float], kinds: Sequence[Kind], where: str) -> Kind:
        if not method.signed:
            if len(set(kinds)) > 1:
                raise RecipeError(f"{method.name} cannot mix full models with task vectors", where=where)
            return kinds[0]
        total = sum(weight for weight, kind in zip(weights, kinds, strict=True) if kind == "weights")
        if math.isclose(total, 1.0, abs_tol=1e-9):
            return "weights"
        if math.isclose(total, 0.0, abs_tol=1e-9):
            return "delta"
        raise RecipeError(
            f"the coefficients of the full models add up to {total:g}, "
            "and must add up to 1 (a model) or 0 (a task vector)",
            where=where,
        )
