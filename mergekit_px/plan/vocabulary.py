"""The vocabulary of a result as a recipe chooses it, and every model's rows in its order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from mergekit_px.artefacts.row_mixtures import RowMixtures
from mergekit_px.errors import PlanError
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.model import WorkItem
from mergekit_px.plan.nodes import Node, RowMean, RowMixture, Rows
from mergekit_px.plan.rows import Indices, RowTable
from mergekit_px.plan.tied import is_vocabulary, tied_source
from mergekit_px.plan.tokenizers import Offered, Tokenizers
from mergekit_px.plan.views import first_rows
from mergekit_px.plan.vocabulary_files import ENDS, LISTINGS, AddedToken, Tokenizer
from mergekit_px.plan.vocabulary_pieces import Pieces
from mergekit_px.recipe.model import UNION, TokenRow
from mergekit_px.recipe.model import Tokenizer as Request

_SHOWN = 5
_DRAWN_ROWS = 64
"""Rows that a random one is made of: enough for its values to be spread as a normal distribution is."""
_TRANSPOSED = ("final_logits_bias",)
"""Of encoder-decoders, with the vocabulary along the columns."""

Entry = tuple[str, int, float]
"""A row of a model, and its factor in a mixture."""


@dataclass
class ChosenVocabulary:
    """The tokens of the result, and the rows that each model gives for them.

    A model that lacks a token gets the row of the base where that has it, else the mean of those of the models that
    have it; for a token that no model has, the mean of its own rows. Models without a tokenizer, and task vectors, are
    taken to have the tokens of the base.

    Attributes:
        request: what the recipe says.
        inputs: all of them.
        members: the models that are merged, in order.
        base: the model whose rows stand in, if there is one.
        donor: the model whose tokenizer it is, or which a union begins with.
        seed: of random rows.
        where: the place of the request.
        mixtures: of a file, for tokens that a model lacks, by tensor.
    """

    request: Request
    inputs: Mapping[str, ResolvedInput]
    members: Sequence[str]
    base: str | None
    donor: str
    seed: int
    where: str
    tokenizers: Tokenizers = field(default_factory=Tokenizers)
    notes: list[str] = field(default_factory=list)
    mixtures: Mapping[str, RowMixtures] = field(default_factory=dict)
    _offered: Offered | None = None
    _arranged: set[str] = field(default_factory=set)
    _moved: bool = False

    @property
    def is_union(self) -> bool:
        return self.request.from_ == UNION and UNION not in self.inputs

    @property
    def by_text(self) -> bool:
        """Whether tokens are the same where they stand for the same text, however that is spelled."""
        return self.request.absent != "models" and not self.is_union

    def arranged(self, source: ResolvedInput, nodes: Mapping[str, Node], offered: Offered) -> Mapping[str, Node]:
        """A model's tensors, with the rows of its vocabulary in the order of the result's.

        Raises:
            PlanError: a token that cannot be had, tokenizers that have no union, tensors that do not fit.
        """
        self._offered = offered
        own = self._own(source.name)
        names = [name for name, node in nodes.items() if _has_rows(name, node, own)]
        self._arranged.update(names)
        changed = {name: self._node(source, name, nodes[name], own) for name in names}
        self._moved |= any(changed[name] is not nodes[name] for name in names)
        return {name: changed.get(name, node) for name, node in nodes.items()}

    def check(self, items: Iterable[WorkItem]) -> None:
        """Refuse a result in which no rows follow the tokens, or an adapter for rows that have moved.

        Raises:
            PlanError
        """
        if not self._arranged:
            raise PlanError("a tokenizer is chosen, and no tensor is known as an embedding", where=self.where)
        for item in items:
            if self._moved and item.name.endswith(_TRANSPOSED):
                raise PlanError(
                    f"'{item.name}' has a column for each token, and columns are not moved to other tokens",
                    where=self.where,
                    hint=f"drop it by a rule, {{match: '*{_TRANSPOSED[0]}', drop: true}}; models start it as zeros",
                )
            for node in item.adapted if item.name in self._arranged else ():
                if self.inputs[node.input].adapter_only and node.patch is not None and node.base in item.views:
                    raise PlanError(
                        f"the adapter '{node.input}' changes '{item.name}', whose rows have other places in the result",
                        where=self.inputs[node.input].reference,
                        hint="give it as {model: ..., adapter: ...}",
                    )

    @cached_property
    def start(self) -> Tokenizer:
        """The donor's own tokenizer."""
        found = self.tokenizers.of(self.inputs[self.donor])
        if found is None:
            raise PlanError(
                f"'{self.donor}' has no tokenizer that lists its tokens ({', '.join(LISTINGS[:4])} ...)",
                where=self.inputs[self.donor].reference,
                hint="name another model by --set tokenizer.from=" + (" or tokenizer.base=" if self.is_union else ""),
            )
        return found

    @cached_property
    def new(self) -> tuple[AddedToken, ...]:
        """The tokens that come in beside the donor's own, in the order of their ids."""
        brought: dict[str, Mapping[str, bool] | None] = {}
        for name in self._others():
            own = self.tokenizers.of(self.inputs[name])
            if own is None:
                self.notes.append(f"'{name}' has no tokenizer, and is taken to have the tokens of '{self.donor}'")
                continue
            self._check_alike(name, own)
            if self.is_union:
                for token, flags in self._missing(name, own):
                    brought[token] = brought.get(token) or flags
        self._tell_union(brought)
        # As other tools do: what the models match as text before what they add, and what is asked for last.
        ordered = sorted(brought.items(), key=lambda entry: entry[1] is not None)
        known = {token: flags for own in self._known_tokenizers() for token, flags in own.added.items()}
        asked = [token for token in self.request.tokens if token not in self.start.ids and token not in brought]
        ordered += [(token, known.get(token)) for token in asked]
        return tuple(
            AddedToken(self.start.size + number, token, flags or {}) for number, (token, flags) in enumerate(ordered)
        )

    @cached_property
    def tokens(self) -> dict[int, str]:
        """The vocabulary of the result."""
        return {**self.start.tokens, **{token.id: token.text for token in self.new}}

    def _others(self) -> list[str]:
        return [name for name in self.members if name != self.donor]

    def _known_tokenizers(self) -> Iterator[Tokenizer]:
        for name in self.members:
            if (own := self.tokenizers.of(self.inputs[name])) is not None:
                yield own

    def _check_alike(self, name: str, own: Tokenizer) -> None:
        start, where = self.start, self.inputs[name].reference
        if start.kind and own.kind and start.kind != own.kind:
            if self.by_text:
                self.notes.append(f"tokens of '{name}' ({own.kind}) are matched to others ({start.kind}) by their text")
                return
            raise PlanError(
                f"the tokenizer of '{name}' is of another kind ({own.kind}) than that of '{self.donor}' "
                f"({start.kind}), so equal tokens do not stand for equal text",
                where=where,
                hint="give it the other tokenizer first: pxmerge tokens transplant",
            )
        known = None not in (start.normalizer, own.normalizer)
        if known and start.normalizer != own.normalizer:
            told = f"the normalisers of '{name}' and '{self.donor}' disagree ({own.normalizer or 'none'}; "
            told += f"{start.normalizer or 'none'}), so equal tokens do not stand for equal text"
            if self.is_union:
                raise PlanError(told, where=where, hint="name one model by --set tokenizer.from=")
            self.notes.append(told)

    def _missing(self, name: str, own: Tokenizer) -> Iterator[tuple[str, Mapping[str, bool] | None]]:
        """What a model has and the donor lacks: its tokens, with the flags of added ones."""
        rows = self._embedding_rows(name) or own.size
        for place, token in sorted(own.tokens.items()):
            if place < rows and token not in self.start.ids:
                yield token, own.added.get(token)

    def _tell_union(self, brought: Mapping[str, Any]) -> None:
        if not self.is_union:
            return
        shown = ", ".join(repr(token) for token in [*brought][:_SHOWN])
        more = f" and {len(brought)} tokens that only others have ({shown}{' ...' if len(brought) > _SHOWN else ''})"
        self.notes.append(f"tokenizer: that of '{self.donor}'{more if brought else ', which has all tokens'}")
        if plain := sum(flags is None for flags in brought.values()):
            self.notes.append(
                f"{plain} of them are ordinary tokens of other models, which come in as added tokens: they are matched "
                "in a text before all others"
            )

    def _own(self, name: str) -> Tokenizer:
        """The tokens of a model, or those that it is taken to have."""
        source = self.inputs[name]
        found = None if source.is_task_vector else self.tokenizers.of(source)
        if found is None and self.base is not None:
            found = self.tokenizers.of(self.inputs[self.base])
        return found or self.start

    def _node(self, source: ResolvedInput, name: str, node: Node, own: Tokenizer) -> Node:
        rows = self._rows(name)
        pieces = Pieces(own, node.shape[0])
        index, absent, unused = self._places(source.name, own, pieces, node.shape[0], rows)
        change = source.is_task_vector
        mixed: dict[int, list[Entry]] = {}
        means: list[int] = []
        for place in () if change else absent:
            fitted = self.mixtures[name].of(place) if name in self.mixtures else None
            if fitted is not None and self.tokens[place] not in self.request.tokens:
                mixed[place] = [(source.name, row, weight) for row, weight in fitted]
                continue
            entries = self._stand_in(source.name, self.tokens[place], name, pieces)
            if entries is None:
                means.append(place)
            else:
                mixed[place] = entries
        if absent and not change:
            self._tell_absent(source.name, [self.tokens[place] for place in absent])
        operands: dict[str, Node] = {source.name: node}
        for entries in mixed.values():
            for model, _, _ in entries:
                operands.setdefault(model, self._tensor(model, name))
        self._check_width(name, operands)
        if means:
            places = np.array(sorted(place for place in own.tokens if place < node.shape[0]), dtype=np.int64)
            operands[""] = RowMean(_gathered(node, places))
            mixed |= {place: [("", 0, 1.0)] for place in means}
        gathered = _gathered(node, index) if not mixed else _mixture(operands, index, mixed)
        if not len(unused) or change:
            return gathered
        used = np.setdiff1d(np.arange(rows), unused)
        table = np.arange(rows)
        table[unused] = -1
        pads = {"rows": gathered, "": RowMean(_gathered(gathered, used))}
        return _mixture(pads, table, {int(place): [("", 0, 1.0)] for place in unused})

    def _places(
        self, name: str, own: Tokenizer, pieces: Pieces, stored: int, rows: int
    ) -> tuple[Indices, list[int], Indices]:
        """For each row of the result the model's own, or -1; the tokens among these; the rows without a token."""
        index = np.full(rows, -1, dtype=np.int64)
        forced = {token for token, row in self.request.tokens.items() if row.force}
        absent = []
        for place, token in self.tokens.items():
            if place >= rows:
                continue
            found = pieces.whole(token, self._target) if self.by_text else own.ids.get(token)
            if self.by_text and found is None:
                found = self._by_role(name, own, place)
            if found is None or found >= stored or token in forced:
                absent.append(place)
            else:
                index[place] = found
        unused = np.ones(rows, dtype=bool)
        unused[[place for place in self.tokens if place < rows]] = False
        if self.request.pad_to is None:
            free = [place for place in np.flatnonzero(unused) if place < stored and int(place) not in own.tokens]
            index[free] = free
            unused[free] = False
        return index, absent, np.flatnonzero(unused)

    @cached_property
    def _target(self) -> Tokenizer:
        """The result's tokenizer, as far as it is read here."""
        return replace(self.start, tokens=self.tokens)

    def _by_role(self, name: str, own: Tokenizer, place: int) -> int | None:
        """The model's own token of the beginning, the end or padding, for that of the result's tokenizer."""
        said, others = self.inputs[self.donor].config or {}, self.inputs[name].config or {}
        for key in ENDS:
            if said.get(key) == place and isinstance(found := others.get(key), int) and found in own.tokens:
                return found
        return None

    def _stand_in(self, source: str, token: str, tensor: str, pieces: Pieces) -> list[Entry] | None:
        """What makes up the row of a token for models that have none; None for the mean of their own rows."""
        asked = self.request.tokens.get(token)
        if asked is not None and asked.kind == "model":
            return [(asked.model or "", self._asked_row(token, asked, tensor), 1.0)]
        if asked is not None and asked.kind == "random":
            return self._random(token, asked.model or self.base or self.members[0], tensor)
        if asked is not None and asked.kind == "zero":
            return []
        if asked is None and self.request.absent != "models":
            cut = pieces.cut(token, self._target) if self.request.absent == "subword" else ()
            return [(source, row, 1 / len(cut)) for row in cut] or None
        having = {name: row for name in self.members if (row := self._row(name, token, tensor)) is not None}
        if asked is None and self.base in having:
            having = {self.base: having[self.base]}
        return [(name, row, 1 / len(having)) for name, row in having.items()] or None

    def _row(self, model: str, token: str, tensor: str) -> int | None:
        """The row of a token in a tensor of a model."""
        row = self._own(model).ids.get(token)
        if row is None or (stored := self._find(model, tensor)) is None:
            return None
        return row if row < stored.shape[0] else None

    def _asked_row(self, token: str, asked: TokenRow, tensor: str) -> int:
        model = asked.model or ""
        row = asked.id if asked.id is not None else self._row(model, asked.token or token, tensor)
        if row is None:
            others = [name for name in self.members if self._row(name, asked.token or token, tensor) is not None]
            hint = f"'{others[0]}' has it" if others else "no model has it; give {kind: zero} in the place of the model"
            raise PlanError(
                f"'{model}' has no token {asked.token or token!r}, and its row is asked for {token!r}",
                where=self.where,
                hint=hint,
            )
        stored = self._tensor(model, tensor).shape[0]
        if row >= stored:
            what = f"'{tensor}' of '{model}' has {stored} rows, and row {row} is asked for {token!r}"
            raise PlanError(what, where=self.where)
        return row

    def _random(self, token: str, model: str, tensor: str) -> list[Entry]:
        """A mixture of rows, drawn so that it has their mean and covariance: factors of sum 1, and squares of sum 1."""
        stored = self._tensor(model, tensor).shape[0]
        rows = np.array(sorted(place for place in self._own(model).tokens if place < stored))
        digest = hashlib.sha256(f"{self.seed}:{token}".encode("utf-8", "backslashreplace")).digest()
        random = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        count = min(_DRAWN_ROWS, len(rows))
        drawn = random.choice(rows, count, replace=False)
        factors = random.standard_normal(count)
        factors -= factors.mean()
        factors *= np.sqrt(1 - 1 / count) / max(float(np.linalg.norm(factors)), 1e-12)
        return [(model, int(row), float(factor)) for row, factor in zip(drawn, factors + 1 / count, strict=True)]

    def _tell_absent(self, name: str, tokens: Sequence[str]) -> None:
        shown = ", ".join(repr(token) for token in tokens[:_SHOWN]) + (" ..." if len(tokens) > _SHOWN else "")
        if self.request.absent != "models":
            made = "the mean of those of its pieces" if self.request.absent == "subword" else "the mean of all"
            made = f"mixtures of '{self.request.rows}', else {made}" if self.request.rows is not None else made
            self.notes.append(f"'{name}' gets {len(tokens)} rows for tokens that it lacks ({shown}): {made}")
            return
        by_base = f"those of '{self.base}', where it has none " if self.base not in (None, name) else ""
        self.notes.append(
            f"'{name}' gets {len(tokens)} rows ({shown}) that are not its own: {by_base}the mean of the models that "
            "have them" + (", or what tokenizer.tokens says" if self.request.tokens else "")
        )

    def _rows(self, tensor: str) -> int:
        """How many rows a tensor of the result has."""
        stored = self._find(self.donor, tensor)
        needed = max(self.tokens) + 1
        if stored is not None and not self.new:
            # Tokenizers may list more tokens than their models have rows; only what comes in must have one.
            needed = max(place for place in self.tokens if place < stored.shape[0]) + 1
        if self.request.pad_to is not None:
            return -(-needed // self.request.pad_to) * self.request.pad_to
        return needed if stored is None else max(needed, stored.shape[0])

    def _embedding_rows(self, name: str) -> int | None:
        own = self.tokenizers.of(self.inputs[name])
        nodes = self._nodes(name)
        return next((node.shape[0] for each, node in nodes.items() if own and _has_rows(each, node, own)), None)

    def _nodes(self, name: str) -> Mapping[str, Node]:
        assert self._offered is not None
        return self._offered(name)

    def _find(self, model: str, tensor: str) -> Node | None:
        """A model's tensor by its name; that of which it is a copy; or the one that is called so in its place."""
        nodes = self._nodes(model)
        if tensor in nodes:
            return nodes[tensor]
        if (original := tied_source(tensor, self.inputs[model])) is not None:
            return nodes.get(original)
        ending = tensor.split(".")[-2:]
        alike = [name for name in nodes if name.split(".")[-2:] == ending and is_vocabulary(name)]
        return nodes[alike[0]] if len(alike) == 1 else None

    def _tensor(self, model: str, tensor: str) -> Node:
        found = self._find(model, tensor)
        if found is None:
            raise PlanError(f"rows of '{tensor}' are to come from '{model}', which has no such tensor")
        return found

    def _check_width(self, tensor: str, operands: Mapping[str, Node]) -> None:
        first, *others = operands.items()
        for name, node in others:
            if node.shape[1:] != first[1].shape[1:]:
                raise PlanError(
                    f"rows of '{tensor}' of '{first[0]}' are to come from '{name}', which is {list(node.shape[1:])} "
                    f"wide and not {list(first[1].shape[1:])}"
                )


def _has_rows(name: str, node: Node, tokenizer: Tokenizer) -> bool:
    """Whether a tensor has a row for each token; tokenizers may list a few more."""
    return is_vocabulary(name) and bool(node.shape) and node.shape[0] >= 0.9 * len(tokenizer.tokens)


def _gathered(node: Node, index: Indices) -> Node:
    """The node itself, or its first rows, where the index says no more."""
    if len(index) <= node.shape[0] and np.array_equal(index, np.arange(len(index))):
        return node if len(index) == node.shape[0] else first_rows(node, len(index))
    return Rows(node, index)


def _mixture(operands: Mapping[str, Node], index: Indices, mixed: Mapping[int, Sequence[Entry]]) -> RowMixture:
    """Rows of the first operand by an index, and mixtures in the places that have them."""
    numbers = {name: number for number, name in enumerate(operands)}
    table = RowTable.of(
        index,
        {place: [(numbers[name], row, factor) for name, row, factor in entries] for place, entries in mixed.items()},
    )
    return RowMixture(tuple(operands.values()), table)
