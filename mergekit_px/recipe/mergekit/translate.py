"""mergekit's YAML as a pxmerge recipe of the same meaning.

What cannot be kept is refused by name, and every difference in meaning that remains is told in a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mergekit_px.errors import RecipeError
from mergekit_px.located.nearest import hint_for
from mergekit_px.located.validate import shown
from mergekit_px.located.yaml_text import Node, mapping, sequence
from mergekit_px.recipe.mergekit.differences import method_differences, parameter_differences
from mergekit_px.recipe.mergekit.entries import IdleKeys, entries_of
from mergekit_px.recipe.mergekit.mixture import MARKS, translate_mixture
from mergekit_px.recipe.mergekit.modules import join_modules, read_modules
from mergekit_px.recipe.mergekit.output import (
    TOKENIZER_DIFFERENCE,
    not_yet,
    precision_differences,
    read_chat_template,
    read_dtype,
    read_tokenizer,
)
from mergekit_px.recipe.mergekit.pieces import Piece, Source, read_models, read_slices
from mergekit_px.recipe.mergekit.references import Reference, read_reference, short_name
from mergekit_px.recipe.mergekit.settings import Choice, Settings, read_choices
from mergekit_px.recipe.mergekit.table import METHODS, Parameter, PeerMethod
from mergekit_px.recipe.model import UNION

STEP = "merge"
"""The name of the step that a config becomes; of several documents, the one without a name."""

_KEYS = (
    *("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "name"),
)


@dataclass(frozen=True, slots=True)
class Translation:
    """A recipe whose parts have the places of what they were made from, and how it differs in meaning.

    Attributes:
        idle: what is said of keys that mean nothing, and where they stand.
    """

    recipe: Node
    differences: list[str]
    idle: IdleKeys


def translate(roots: Sequence[Node]) -> Translation:
    """Translate a mergekit config; of several documents, as mergekit-multi takes them, each is a step.

    Raises:
        RecipeError: the config is wrong, or asks for something that is not supported.
    """
    idle: IdleKeys = {}
    modules = [read_modules(root, idle) for root in roots]
    steps = _step_names(roots)
    names = {Reference(name): step for name, step in steps.items()}
    models: dict[str, Node | None] = {}
    graph: dict[str, Node | None] = {}
    differences: list[str] = []
    output: Node | None = None
    tokenizer: Node | None = None
    final = next((root for root in roots if _document_name(root) is None), roots[-1])
    for root, parts in zip(roots, modules, strict=True):
        own = steps.get(_document_name(root) or "", STEP)
        become = {part.name or "": own if len(parts) == 1 else f"{own}-{part.name}" for part in parts}
        taken = frozenset((*steps.values(), *become.values()))
        for part in parts:
            translator = _Translator(part.config, taken, part.parameters, names=names, models=models, idle=idle)
            step, written = translator.run(is_first=part is parts[0])
            if len(parts) > 1 and part.stack() and isinstance(step.value, dict) and "slices" in step.value:
                globs = sequence(step.place, [Node(glob, step.place) for glob in part.stack()])
                step = mapping(step.place, {**step.value, "stack": globs}, step.keys)
            graph[become[part.name or ""]] = step
            differences += translator.differences
            if part is parts[0]:
                output = written if root is final else output
                tokenizer = translator.tokenizer if root is final or tokenizer is None else tokenizer
        if len(parts) > 1:
            graph[own] = join_modules(parts, become, root.place)
            differences.append(
                f"Tensors that are in none of the modules are made as those of '{parts[0].name}'; mergekit leaves out "
                "what is in no module that is listed."
            )
    assert output is not None and isinstance(output.value, dict)
    if len(roots) > 1:
        last = steps.get(_document_name(final) or "", STEP)
        output = mapping(output.place, {**dict(output.value), "from": Node(last, final.place)}, output.keys)
        differences.append("Nothing is written between the documents, so nothing is rounded there; mergekit rounds.")
    recipe = mapping(
        final.place,
        {
            "models": mapping(roots[0].place, models),
            "steps": mapping(roots[0].place, graph),
            "tokenizer": tokenizer,
            "output": output,
        },
    )
    return Translation(recipe, list(dict.fromkeys([*differences, *idle])), idle)


def _document_name(root: Node) -> str | None:
    entries = root.value if isinstance(root.value, dict) else {}
    node = entries.get("name")
    return node.value if node is not None and isinstance(node.value, str) and node.value else None


def _step_names(roots: Sequence[Node]) -> dict[str, str]:
    """The names of the documents, as others may refer to them, and the step that each becomes."""
    if len(roots) == 1:
        return {}
    steps: dict[str, str] = {}
    nameless = [root for root in roots if _document_name(root) is None]
    if len(nameless) > 1:
        raise RecipeError(
            "two documents without a name", where=str(nameless[1].place), hint="name those that others use: 'name: ...'"
        )
    for root in roots:
        name = _document_name(root)
        if name in steps:
            raise RecipeError(f"two documents are named '{name}'", where=str(root.place))
        if name is not None:
            steps[name] = short_name(Reference(name), [*steps.values(), STEP])
    return steps


@dataclass(slots=True)
class _Translator:
    root: Node
    steps: frozenset[str] = frozenset()
    """What the documents and their modules become."""
    module: Node | None = None
    """The parameters of the module that is translated."""
    idle: IdleKeys = field(default_factory=dict)
    entries: dict[str, Node] = field(default_factory=dict)
    names: dict[Reference, str] = field(default_factory=dict)
    models: dict[str, Node | None] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    tokenizer: Node | None = None
    """The section of the recipe by that name."""

    def run(self, *, is_first: bool) -> tuple[Node, Node | None]:
        """The step, and the output if this is the last; modules but the first say nothing of it."""
        if MARKS & self.root.keys.keys() and "merge_method" not in self.root.keys:
            step, mixed, self.differences = translate_mixture(self.root, self._name, self.idle)
            return step, mixed
        self.entries = entries_of(self.root, "the config", _KEYS, self.idle)
        peer = self._method()
        base = read_reference(self.entries["base_model"]) if "base_model" in self.entries else None
        if base is not None:
            self._name(base, self.entries["base_model"])
        pieces = self._pieces(base)
        peer = self._settled(peer, pieces)
        parameters = [self.module, self.entries.get("parameters")]
        self.differences += parameter_differences(peer, pieces, parameters, self.idle)
        if peer.base == "subtracted" and peer.sources is None and peer.name != "model_stock" and _alone(pieces):
            self.differences.append(f"There is no model besides the base_model, so that the result is '{base}' itself.")
            peer = METHODS["passthrough"]
        if peer.name == "sce" and all(len(_members(peer, piece)) == 1 for piece in pieces):
            peer, pieces = self._single_sce(peer, pieces)
        pieces = [self._with_roles(piece, peer) for piece in pieces]
        step = self._step(peer, pieces, base)
        output = self._output(peer, pieces, base) if is_first else None
        self.differences += method_differences(peer, pieces, step)
        return step, output

    def _method(self) -> PeerMethod:
        node = self.entries.get("merge_method")
        if node is None:
            raise RecipeError("'merge_method' is missing", where=str(self.root.place))
        name = node.value if isinstance(node.value, str) else shown(node.data())
        if name not in METHODS:
            hint = hint_for(name, list(METHODS))
            raise RecipeError(f"unknown merge method '{name[:80]}'", where=str(node.place), hint=hint)
        return METHODS[name]

    def _pieces(self, base: Reference | None) -> list[Piece]:
        if ("models" in self.entries) == ("slices" in self.entries):
            both = "models" in self.entries
            what = "either models or slices, not both" if both else "'models' or 'slices' is missing"
            raise RecipeError(what, where=str(self.root.keys["slices"] if both else self.root.place))
        if "models" in self.entries:
            return read_models(self.entries["models"], base, self.idle)
        return read_slices(self.entries["slices"], base, self.idle)

    def _name(self, reference: Reference, node: Node) -> str:
        """The name of a model in the recipe; models get one when they are first seen."""
        if reference not in self.names:
            name = short_name(reference, [*self.models, *self.steps, STEP, UNION])
            self.names[reference] = name
            adapter = Node(reference.adapter, node.place) if reference.adapter is not None else None
            model = Node(reference.model, node.place)
            self.models[name] = mapping(node.place, {"model": model, "adapter": adapter})
        return self.names[reference]

    def _settled(self, peer: PeerMethod, pieces: list[Piece]) -> PeerMethod:
        """The method with its base decided, where it may have one or not, and with the words of flags that combine."""
        if "nuslerp_row_wise" in peer.parameters:
            peer = self._with_vectors(peer, pieces)
        if peer.base != "optional":
            return peer
        given = [piece.base is not None for piece in pieces]
        if any(given) != all(given):
            raise not_yet("slices with and without a base_model in one merge", pieces[given.index(False)].node.place)
        return replace(peer, base="subtracted", target=peer.on_deltas) if any(given) else replace(peer, base="ignored")

    def _single_sce(self, peer: PeerMethod, pieces: list[Piece]) -> tuple[PeerMethod, list[Piece]]:
        """sce of one model, which is that model where all its elements are selected."""
        parameter = peer.parameters["select_topk"]
        for piece in pieces:
            for choice in self._choices("select_topk", parameter, piece, None):
                values = choice.value.data()
                if any(value < 1 for value in (values if isinstance(values, list) else [values])):
                    raise RecipeError(
                        "sce selects elements by how they vary between models, and one model has no such variance: "
                        "nothing of it would be left",
                        where=str(choice.value.place),
                        hint="leave out select_topk, or use another method such as ties",
                    )
        self.differences.append("sce of one model is that model, as it is.")
        return METHODS["passthrough"], [replace(piece, sources=tuple(_members(peer, piece))) for piece in pieces]

    def _with_vectors(self, peer: PeerMethod, pieces: list[Piece]) -> PeerMethod:
        """The method with ``nuslerp_flatten`` in the words of ``along``; what is not flat is rows, or else columns."""
        flag = peer.parameters["nuslerp_row_wise"]
        found = [choice for piece in pieces for choice in self._choices("nuslerp_row_wise", flag, piece, None)]
        values = {bool(choice.value.value) for choice in found} or {False}
        if len(values) > 1:
            raise not_yet("nuslerp_row_wise of several values", found[0].value.place, "give one for the whole merge")
        words = {True: "tensor", False: "columns" if values.pop() else "rows"}
        along = replace(peer.parameters["nuslerp_flatten"], words=words)
        return replace(peer, parameters={**peer.parameters, "nuslerp_flatten": along})

    def _with_roles(self, piece: Piece, peer: PeerMethod) -> Piece:
        """The piece with its sources as the method sees them: a base added where mergekit adds it, ends in order."""
        sources = list(piece.sources)
        where = str(piece.node.place)
        listed = next((source for source in sources if source.reference == piece.base), None)
        if peer.base != "ignored":
            if piece.base is None:
                raise RecipeError(f"{peer.name} needs a base_model", where=where)
            if listed is None and "slices" in self.entries:
                raise RecipeError(f"base_model '{piece.base}' is not among the sources of the slice", where=where)
            if peer.base == "end":
                others = [source for source in sources if source is not listed]
                sources = [listed or Source(piece.base, self.entries["base_model"]), *others]
            elif sources == [listed]:
                raise RecipeError(f"{peer.name} needs a model besides the base_model", where=where)
        elif piece.base is not None and listed is None and "models" in self.entries:
            added = Source(piece.base, self.entries["base_model"])
            weight = peer.parameters.get("weight")
            if peer.sources is None and (weight is None or self._choices("weight", weight, piece, added)):
                sources.append(added)
            else:
                self.differences.append(
                    f"{peer.name} does not use the base_model, which gives the config and the tokenizer; mergekit "
                    "stops, because it takes it for another source."
                )
        piece = replace(piece, sources=tuple(sources))
        if peer.sources not in (None, count := len(_members(peer, piece))):
            beside = {"end": ", the base_model counted", "subtracted": " besides the base_model"}.get(peer.base, "")
            wanted = "one source" if peer.sources == 1 else "two sources"
            raise RecipeError(f"{peer.name} takes {wanted}{beside}, and {count} are given", where=where)
        for source in sources:
            self._name(source.reference, source.node)
        return piece

    def _step(self, peer: PeerMethod, pieces: list[Piece], base: Reference | None) -> Node:
        in_models = "models" in self.entries
        whole = Settings()
        own = [whole if in_models else Settings(outside=piece is pieces[-1]) for piece in pieces]
        for name, parameter in peer.parameters.items():
            if parameter.per_source and (peer.sources != 1 or peer.base == "subtracted"):
                for piece, settings in zip(pieces, own, strict=True):
                    self._put_per_source(name, parameter, peer, piece, settings)
                continue
            found = [
                self._choices(name, parameter, piece, piece.sources[0] if parameter.per_source else None)
                for piece in pieces
            ]
            if parameter.required and not all(found):
                where = str(pieces[[bool(choices) for choices in found].index(False)].node.place)
                raise RecipeError(f"{peer.name} needs the parameter '{name}'", where=where)
            if not parameter.target:
                continue
            alike = all(_same(choices, found[0]) for choices in found)
            for settings, choices in zip([whole] if alike else own, found, strict=False):
                default = None if parameter.default is None else Node(parameter.default, self.root.place)
                settings.put(("params", parameter.target), choices, default)
        method = self.entries["merge_method"].place
        subtracted = base if peer.base == "subtracted" else None
        slices = [self._slice(peer, piece, settings, base) for piece, settings in zip(pieces, own, strict=True)]
        return mapping(
            method,
            {
                "method": Node(peer.target or peer.name, method),
                "base": Node(self.names[subtracted], self.entries["base_model"].place) if subtracted else None,
                "sources": self._sources(peer, pieces[0], whole) if in_models else None,
                "params": whole.part("params"),
                "like": Node(peer.like, method) if peer.like else None,
                "rules": whole.rules(method),
                "slices": None if in_models else sequence(self.entries["slices"].place, slices),
            },
        )

    def _put_per_source(
        self, name: str, parameter: Parameter, peer: PeerMethod, piece: Piece, settings: Settings
    ) -> None:
        members = _members(peer, piece)
        found = [self._choices(name, parameter, piece, member) for member in members]
        for member, choices in zip(members, found, strict=True):
            if not choices and parameter.required:
                what = f"{peer.name} needs the parameter '{name}' for '{member.reference}'"
                beside = isinstance(member.node.value, dict) and name in member.node.value
                hint = f"write '{name}' under 'parameters:'" if beside else None
                raise RecipeError(what, where=str(member.node.place), hint=hint)
        if not parameter.required and not any(found):
            return
        default = Node(parameter.default, piece.node.place) if parameter.default is not None else None
        if "models" in self.entries and name != "weight" and all(_same(choices, found[0]) for choices in found):
            settings.put(("params", parameter.target), found[0], default)
            return
        for member, choices in zip(members, found, strict=True):
            source = self.names[member.reference]
            key = ("weights", source) if name == "weight" else ("params", parameter.target, source)
            settings.put(key, choices, default)

    def _choices(self, name: str, parameter: Parameter, piece: Piece, source: Source | None) -> list[Choice]:
        """What a parameter is in a piece (for a source), as it is called here."""
        holders = [source.parameters if source else None, piece.parameters, self.module, self.entries.get("parameters")]
        settings = [node.value.get(name) for node in holders if node is not None and isinstance(node.value, dict)]
        choices = read_choices(settings, parameter.kind, name)
        if parameter.required and choices and choices[-1].filter is not None:
            self.differences.append(
                f"Tensors that no filter of '{name}' matches get this method's default; mergekit stops at them."
            )
        if source is not None and source.layers is not None and source.layers[0] != piece.first:
            _check_filters(choices, name)
        if parameter.words is None:
            return choices
        named = []
        for choice in choices:
            value = bool(choice.value.value)
            if value not in parameter.words:
                raise not_yet(f"{name}: {str(value).lower()}", choice.value.place)
            named.append(replace(choice, value=Node(parameter.words[value], choice.value.place)))
        return named

    def _sources(self, peer: PeerMethod, piece: Piece, settings: Settings) -> Node:
        names = {self.names[member.reference]: member for member in _members(peer, piece)}
        if "weight" not in peer.parameters:
            return sequence(piece.node.place, [Node(name, member.node.place) for name, member in names.items()])
        entries: dict[str, Node | None] = {
            name: settings.values.get(("weights", name), Node(None, member.node.place))
            for name, member in names.items()
        }
        keys = {name: member.node.place for name, member in names.items()}
        return mapping(piece.node.place, entries, keys)

    def _slice(self, peer: PeerMethod, piece: Piece, settings: Settings, base: Reference | None) -> Node:
        place = piece.node.place
        sources = []
        for source in piece.sources:
            name, here = self.names[source.reference], source.node.place
            first, last = source.layers or (0, 0)
            own = {key[1]: value for key, value in settings.values.items() if len(key) == 3 and key[2] == name}
            sources.append(
                mapping(
                    here,
                    {
                        "model": Node(name, here),
                        "layers": Node("none" if last < first else first if first == last else f"{first}-{last}", here),
                        "weight": settings.values.get(("weights", name)),
                        "params": mapping(here, {**own}) if own else None,
                    },
                )
            )
        other = peer.base == "subtracted" and piece.base is not None and piece.base != base
        return mapping(
            place,
            {
                "sources": sequence(place, sources),
                "base": Node(self.names[piece.base], place) if other and piece.base else None,
                "params": settings.part("params", by_source=False),
                "rules": settings.rules(place),
            },
        )

    def _output(self, peer: PeerMethod, pieces: list[Piece], base: Reference | None) -> Node:
        computed = read_dtype(self.entries.get("dtype"), "dtype")
        stored = read_dtype(self.entries.get("out_dtype"), "out_dtype")
        self.differences += precision_differences(peer.is_exact, computed, stored)
        self._read_tokenizer(peer, pieces, base)
        template = read_chat_template(self.entries.get("chat_template"))
        config_from = None
        if base is not None and peer.base == "ignored" and self.names[base] not in self.steps:
            config_from = Node(self.names[base], self.entries["base_model"].place)
        if self.tokenizer is None and base is None and len(self.names) > 1:
            first = self.names[pieces[0].sources[0].reference]
            self.differences.append(
                f"Config and tokenizer come from '{first}', the first model; without a base_model, mergekit takes "
                "those of a model picked at random."
            )
        if template is not None and template.value == "auto":
            template = None
            self.differences.append(
                "The chat template comes along with the tokenizer; mergekit takes the one that most models share."
            )
        return mapping(
            self.root.place,
            {
                "dtype": stored or computed,
                "config_from": config_from,
                "chat_template": template,
            },
        )

    def _read_tokenizer(self, peer: PeerMethod, pieces: list[Piece], base: Reference | None) -> None:
        merged = {source.reference for piece in pieces for source in piece.sources}
        in_merge = base is not None and (base in merged or peer.base == "subtracted")
        base_name = self.names[base] if base is not None and in_merge else None
        self.tokenizer = read_tokenizer(
            self.entries.get("tokenizer_source"),
            self.entries.get("tokenizer"),
            base,
            base_name if base_name not in self.steps else None,
            self._name,
            self.idle,
        )
        if self.tokenizer is not None:
            self.differences.append(TOKENIZER_DIFFERENCE)


def _alone(pieces: list[Piece]) -> bool:
    """Whether the base is all that there is."""
    return all(source.reference == piece.base for piece in pieces for source in piece.sources)


def _members(peer: PeerMethod, piece: Piece) -> list[Source]:
    """The sources that are merged: all but a base that is subtracted."""
    return [source for source in piece.sources if peer.base != "subtracted" or source.reference != piece.base]


def _same(choices: list[Choice], others: list[Choice]) -> bool:
    first, second = ([(one.filter, one.region, one.value.data()) for one in each] for each in (choices, others))
    return first == second


def _check_filters(choices: list[Choice], name: str) -> None:
    """Refuse filters that may hit a layer number: mergekit tests the source's, and rules here the output's."""
    for choice in choices:
        if choice.filter is not None and any(part.isdecimal() for part in choice.filter.split(".")):
            what = f"the filter '{choice.filter}' of '{name}' with layers that change their number"
            raise not_yet(what, choice.value.place, "write slices for the layers that it is meant for")
