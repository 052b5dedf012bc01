"""Mixtures of experts that are built of dense models: the MLPs of several models in the place of one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mergekit_px.checkpoint.dtypes import parse_dtype
from mergekit_px.errors import PlanError, RecipeError, TensorMismatchError
from mergekit_px.located.nearest import hint_for
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.layers import split_layer
from mergekit_px.plan.mixture_families import (
    DENSE_PARTS,
    FAMILIES,
    Family,
    config_in_full,
    family_named,
    fitting_families,
)
from mergekit_px.plan.nodes import Apply, Drawn, Joined, Node, can_be_cut, combined
from mergekit_px.plan.slots import Namespace, Namespaces
from mergekit_px.recipe.mixture import FROM_PROMPTS, Expert, Mixture

_DENSE = re.compile(rf"(.*\.layers\.\d+\.)mlp\.({'|'.join(DENSE_PARTS)})\.weight")
_ATTENTION_BIAS = re.compile(r".*\.layers\.\d+\.self_attn\.(.*bias)")
ROUTER_FILE_ROWS = "layers.{layer}.router"
"""The rows of one layer's experts in a file of routers."""
ROUTER_FILE_SHARED = "layers.{layer}.shared_gate"
"""The row of one layer's shared expert."""

_ROUTER_DEVIATION = 0.02
"""What transformers draws new weights with, in all of these families."""


@dataclass(frozen=True)
class BuiltMixture:
    """What a config has to follow."""

    family: Family
    count: int
    chosen: int
    biased: bool
    shared: bool

    def followed(self, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The dense model's config as that of the mixture, with what to say of it."""
        family = self.family
        found = {key: value for key, value in config_in_full(config, family).items() if key != "auto_map"}
        found |= {"model_type": family.model_type, "architectures": [family.architecture]}
        found |= {key: entry(found, self.count, self.chosen) for key, entry in family.entries.items()}
        if not self.shared and family.shared_optional:
            found["n_shared_experts"] = None
        if family.bias_entry is not None:
            found[family.bias_entry] = self.biased
        return found, [f"config: {family.model_type} with {self.count} experts, {self.chosen} for each token"]


def with_experts(name: str, mixture: Mixture | None, nodes: Namespace, namespaces: Namespaces) -> Namespace:
    """A step's tensors with experts in the place of its MLPs, where it asks for that.

    Raises:
        PlanError, RecipeError: the models do not make such a mixture; the message says where and why.
    """
    return nodes if mixture is None else _Builder(name, mixture, nodes, namespaces).built()


class _Builder:
    def __init__(self, name: str, mixture: Mixture, nodes: Namespace, namespaces: Namespaces) -> None:
        self.name = name
        self.mixture = mixture
        self.nodes = nodes
        self.namespaces = namespaces
        self.source = _first_model(name, namespaces)
        self.family = self._family()

    def _where(self, *keys: str | int) -> str:
        return self.namespaces.loaded.where("steps", self.name, "mixture", *keys)

    def built(self) -> Namespace:
        self._check_router()
        family = self.family
        layers: dict[str, dict[str, Node]] = {}
        for name, node in self.nodes.items():
            if found := _DENSE.fullmatch(name):
                layers.setdefault(found[1], {})[found[2]] = node
        if not layers:
            what = (
                f"'{self.source.name}' has no MLPs of gate_proj, up_proj and down_proj to put experts in the place of"
            )
            raise PlanError(what, where=self._where())
        self._check_names(layers)
        self._check_depth(layers)
        result: dict[str, Node] = {}
        for name, node in self.nodes.items():
            found = _DENSE.fullmatch(name)
            if found is None:
                result[name] = node
                continue
            self.namespaces.dropped_names[name] = "the experts stand in its place"
            if found[1] in layers:
                result |= self._layer(found[1], layers.pop(found[1]))
        members = self.mixture.experts
        biased = any(_ATTENTION_BIAS.fullmatch(name) for name in self.nodes)
        chosen = self.mixture.experts_per_token
        self.namespaces.mixtures.setdefault(self.name, []).append(
            BuiltMixture(family, len(members), chosen, biased, self.mixture.shared is not None)
        )
        if len({expert.model for expert in members}) == 1 and not any(expert.noise for expert in members):
            self.namespaces.notes.append(
                "all experts are equal, so the mixture computes what the dense model does until it is trained"
            )
        if family.unloaded:
            self.namespaces.notes.append(
                f"transformers has no class for {family.model_type} of its own; vLLM and its authors' code read it"
            )
        return result

    def _family(self) -> Family:
        asked, shared = self.mixture.family, self.mixture.shared is not None
        config = self.source.config
        kind = None if config is None else config.get("model_type")
        if not isinstance(kind, str):
            what = f"the config of '{self.source.name}' does not say what kind of model it is"
            raise PlanError(what, where=self.source.reference, hint="a mixture's config is made from it")
        if asked is not None:
            family = family_named(asked)
            if family is None:
                known = [one.model_type for one in FAMILIES]
                hint = hint_for(asked, known) or f"there are {', '.join(known)}"
                raise RecipeError(
                    f"no mixtures of kind '{asked[:80]}' are built", where=self._where("family"), hint=hint
                )
            if kind not in family.dense:
                what = (
                    f"{family.model_type} is built of {' or '.join(family.dense)}, and '{self.source.name}' is {kind}"
                )
                raise PlanError(what, where=self._where("family"))
            if shared and family.shared is None:
                what = f"{family.model_type} has no shared expert"
                raise RecipeError(what, where=self._where("shared"), hint=self._others(kind, shared=True))
            if not shared and family.shared is not None and not family.shared_optional:
                what = f"{family.model_type} has a shared expert, and none is given"
                raise RecipeError(what, where=self._where("family"), hint="write shared: MODEL")
            return family
        fitting = fitting_families(kind, shared=shared)
        if not fitting:
            one = "with" if shared else "without"
            dense = sorted({each for family in FAMILIES for each in family.dense})
            hint = self._others(kind, shared=not shared) or f"mixtures are built of {', '.join(dense)}"
            what = f"no mixture {one} a shared expert is built of '{self.source.name}', which is {kind}"
            raise PlanError(what, where=self._where(), hint=hint)
        return fitting[0]

    def _others(self, kind: str, *, shared: bool) -> str | None:
        names = ", ".join(one.model_type for one in fitting_families(kind, shared=shared))
        if not names:
            return None
        return f"with a shared expert (`shared: MODEL`) there is {names}" if shared else f"without one there is {names}"

    def _check_router(self) -> None:
        router, count = self.mixture.router, len(self.mixture.experts)
        if router.kind in FROM_PROMPTS:
            raise RecipeError(
                f"a router of kind {router.kind} is made of prompts, which a merge does not read",
                where=self._where("router"),
                hint="run the recipe by `pxmerge moe build`",
            )
        if self.mixture.experts_per_token > count:
            given = "1 is" if count == 1 else f"{count} are"
            what = f"{self.mixture.experts_per_token} experts for each token, and {given} given"
            raise RecipeError(what, where=self._where("experts_per_token"))

    def _check_names(self, layers: Mapping[str, Mapping[str, Node]]) -> None:
        """Refuse what the family's layers have no place for."""
        for layer, parts in layers.items():
            lacking = next((part for part in DENSE_PARTS if part not in parts), None)
            if lacking is not None:
                raise PlanError(
                    f"'{layer}mlp.{lacking}.weight' is missing from '{self.source.name}'", where=self._where()
                )
        for name in self.nodes:
            if split_layer(name) is None or _DENSE.fullmatch(name):
                continue
            if ".mlp." in name:
                what = f"'{name}' has no place in the experts of {self.family.model_type}"
                raise PlanError(what, where=self._where())
            bias = _ATTENTION_BIAS.fullmatch(name)
            if bias is not None and bias[1] not in self.family.biases:
                what = f"{self.family.model_type} has no '{bias[1]}' in its attention, and '{self.source.name}' has"
                raise PlanError(what, where=self._where())

    def _check_depth(self, layers: Mapping[str, Mapping[str, Node]]) -> None:
        """Refuse an expert with layers that would be left out."""
        keys: list[tuple[str | int, ...]] = [("experts", number) for number in range(len(self.mixture.experts))]
        for place, expert in zip([*keys, ("shared",)], self.mixture.members(), strict=False):
            matches = map(_DENSE.fullmatch, self.namespaces.namespace(expert.model))
            more = next((match[1] for match in matches if match and match[1] not in layers), None)
            if more is not None:
                what = f"the expert '{expert.model}' has '{more}mlp', and '{self.source.name}' ends before it"
                raise TensorMismatchError(
                    what, where=self._where(*place), hint="experts are dense models of one shape and depth"
                )

    def _layer(self, layer: str, dense: Mapping[str, Node]) -> dict[str, Node]:
        family, mixture = self.family, self.mixture
        found: dict[str, Node] = {}
        experts = [
            self._expert(layer, expert, ("experts", number), dense, f"expert {number}")
            for number, expert in enumerate(mixture.experts)
        ]
        if family.fused:
            found |= self._fused(f"{layer}{family.module}.", family.fused, experts)
        else:
            for number, expert in enumerate(experts):
                names = [f"{layer}{family.module}.{number}.{part}.weight" for part in family.parts]
                found |= dict(zip(names, expert, strict=True))
        if mixture.shared is not None and family.shared is not None:
            shared = self._expert(layer, mixture.shared, ("shared",), dense, "the shared expert")
            if family.shared_fused:
                found |= self._fused(f"{layer}{family.shared}.", family.shared_fused, [shared], stacked=False)
            else:
                names = [f"{layer}{family.shared}.{part}.weight" for part in DENSE_PARTS]
                found |= dict(zip(names, shared, strict=True))
        found |= self._router(layer, dense[DENSE_PARTS[0]])
        return found

    def _expert(
        self, layer: str, expert: Expert, keys: tuple[str | int, ...], dense: Mapping[str, Node], what: str
    ) -> list[Node]:
        """An expert's gate, up and down matrices."""
        namespace = self.namespaces.namespace(expert.model)
        nodes: list[Node] = []
        for part in DENSE_PARTS:
            name = f"{layer}mlp.{part}.weight"
            node = namespace.get(name)
            if node is None:
                told = f"{what} is '{expert.model}', which has no '{name}'"
                raise TensorMismatchError(told, where=self._where(*keys), hint="experts are dense models of one shape")
            if node.shape != dense[part].shape:
                raise TensorMismatchError(
                    f"{what}: '{name}' has shape {list(node.shape)} in '{expert.model}'"
                    f" and {list(dense[part].shape)} in '{self.source.name}'",
                    where=self._where(*keys),
                    hint="experts are dense models of one shape",
                )
            if node.kind == "delta":
                told = f"{what} is the task vector '{expert.model}', and experts are models"
                raise PlanError(told, where=self._where(*keys), hint="add it to its base in a step, and name the step")
            nodes.append(self._changed(node, expert, part, f"{self.name}/{name}/{what}"))
        return nodes

    def _changed(self, node: Node, expert: Expert, part: str, stream: str) -> Node:
        """The matrix with the noise and the scale that are asked for."""
        scale = float(expert.scale) if part == "down_proj" else 1.0
        sources, weights = [node], [scale]
        if expert.noise:
            sources.append(Drawn(stream, node.shape, node.dtype, "delta", "normal", float(expert.noise)))
            weights.append(scale)
        return node if scale == 1 and len(sources) == 1 else combined(self.name, sources, weights)

    def _fused(
        self, prefix: str, names: tuple[str, ...], experts: list[list[Node]], *, stacked: bool = True
    ) -> dict[str, Node]:
        """Gates and ups of all experts as one tensor, and the downs as another."""
        stack = (len(experts),) if stacked else ()
        (gate, up, down) = experts[0]
        rows = gate.shape[0] + up.shape[0]
        for node in (matrix for expert in experts for matrix in expert):
            self._check_joined(node)
        first = Joined(tuple(matrix for expert in experts for matrix in expert[:2]), (*stack, rows, gate.shape[1]))
        second = Joined(tuple(expert[2] for expert in experts), (*stack, *down.shape))
        return {f"{prefix}{names[0]}": first, f"{prefix}{names[1]}": second}

    def _check_joined(self, node: Node) -> None:
        if isinstance(node, Apply) and not can_be_cut(node):
            raise PlanError(
                f"{self.family.model_type} has its experts in one tensor, and {node.method.name} makes no part of one",
                where=self._where("experts"),
                hint="run that step first, and give its result as a model",
            )

    def _router(self, layer: str, gate: Node) -> dict[str, Node]:
        family, router, count = self.family, self.mixture.router, len(self.mixture.experts)
        width = gate.shape[1]
        name = f"{layer}{family.router}"
        found: dict[str, Node] = {}
        number = split_layer(name)
        assert number is not None
        if router.kind == "file":
            found[name] = self._rows(ROUTER_FILE_ROWS.format(layer=number.layer), (count, width))
        else:
            found[name] = self._drawn_rows(name, (count, width), gate)
        if family.shared_gate is not None:
            own = f"{layer}{family.shared_gate}"
            key = ROUTER_FILE_SHARED.format(layer=number.layer)
            if router.kind == "file" and key in self.namespaces.namespace(router.model or ""):
                found[own] = self._rows(key, (1, width))
            else:
                found[own] = self._drawn_rows(own, (1, width), gate)
        if family.correction is not None:
            bias = f"{layer}{family.correction}"
            found[bias] = Drawn(bias, (count,), parse_dtype("F32"), "weights", "normal", 0.0)
        return found

    def _drawn_rows(self, name: str, shape: tuple[int, int], like: Node) -> Node:
        router = self.mixture.router
        usual = {"random": _ROUTER_DEVIATION, "uniform": 1 / math.sqrt(shape[1])}.get(router.kind, 0.0)
        scale = usual if router.scale is None or not usual else float(router.scale)
        distribution: Literal["normal", "uniform"] = "uniform" if router.kind == "uniform" else "normal"
        return Drawn(f"{self.name}/{name}", shape, like.dtype, "weights", distribution, scale)

    def _rows(self, key: str, shape: tuple[int, int]) -> Node:
        model = self.mixture.router.model or ""
        node = self.namespaces.namespace(model).get(key)
        if node is None:
            what = f"'{model}' has no '{key}'"
            raise TensorMismatchError(what, where=self._where("router"), hint="`pxmerge moe build` writes such files")
        if node.shape != shape:
            needed = f"{shape[0]} experts of width {shape[1]} need {list(shape)}"
            what = f"'{key}' of '{model}' is {list(node.shape)}, and {needed}"
            raise TensorMismatchError(what, where=self._where("router"), hint="a router has a row for each expert")
        return node


def _first_model(step: str, namespaces: Namespaces) -> ResolvedInput:
    """The model whose layers a step has: its base, or its first source, through steps."""
    name = step
    while name not in namespaces.inputs:
        inner = namespaces.loaded.recipe.steps[name]
        name = inner.base or (inner.slices[0].sources[0].model if inner.slices else inner.source_names()[0])
    return namespaces.inputs[name]
