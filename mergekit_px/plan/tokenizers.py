"""Which token each row of an embedding or head stands for, so that rows of different tokens are never mixed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mergekit_px.checkpoint.json_text import parse_object
from mergekit_px.checkpoint.side_files import LARGEST_SIDE_FILE, is_tokenizer_file, side_files
from mergekit_px.errors import MalformedCheckpointError, PlanError
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.model import Node, Rows, WorkItem
from mergekit_px.plan.tied import is_vocabulary
from mergekit_px.small_files import read_small_file

_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
"""Files that list a whole vocabulary; the first that is there counts."""
_SHOWN = 5

Vocabulary = dict[int, str]
"""Id -> token."""


@dataclass
class Vocabularies:
    """The tokens of a merge's models, compared with those of the model whose tokenizer goes with the result.

    Models without a tokenizer, and task vectors, are taken to have the tokens of that model.
    """

    inputs: Mapping[str, ResolvedInput]
    donor: str | None
    notes: list[str] = field(default_factory=list)
    differences: dict[str, str] = field(default_factory=dict)
    """Model -> how its tokens differ from the donor's, where no order of rows makes up for it."""

    def arranged(self, source: ResolvedInput, nodes: Mapping[str, Node]) -> Mapping[str, Node]:
        """A model's tensors, with the rows of its vocabulary in the donor's order.

        Raises:
            MalformedCheckpointError: a file of a tokenizer that is none.
            PlanError: the tensors to be brought into order are not known.
        """
        tokens, target = self._compared(source)
        if tokens is None or target is None or tokens == target:
            return nodes
        differing = [place for place in sorted(tokens.keys() & target.keys()) if tokens[place] != target[place]]
        if not differing and not self._moved(tokens, target):
            return nodes
        if sorted(tokens.values()) != sorted(target.values()):
            places = differing or sorted(tokens.keys() ^ target.keys())
            shown = [f"{place} is {tokens.get(place)!r} and {target.get(place)!r}" for place in places[:_SHOWN]]
            self.differences[source.name] = f"{len(places)} ids differ: {'; '.join(shown)}"
            return nodes
        rows = {name: node for name, node in nodes.items() if _holds(name, node, max(*tokens, *target) + 1)}
        if not rows:
            raise PlanError(
                f"the tokens of '{source.name}' are in another order than those of '{self.donor}', and none of its "
                "tensors is known as an embedding",
                where=source.reference,
            )
        self._refuse_task_vectors(source)
        first = [f"{tokens[place]!r}" for place in differing[:_SHOWN]]
        self.notes.append(
            f"tokenizer of '{source.name}': {len(differing)} tokens ({', '.join(first)} ...) have other ids than in "
            f"'{self.donor}'; their rows are moved to where '{self.donor}' has them"
        )
        return {
            name: Rows(node, _order(tokens, target, node.shape[0])) if name in rows else node
            for name, node in nodes.items()
        }

    def check(self, items: Iterable[WorkItem]) -> None:
        """Refuse rows of other tokens than the result's tokenizer has.

        Raises:
            PlanError: it names the first differences.
        """
        for item in items:
            if not is_vocabulary(item.name):
                continue
            for read in item.reads:
                if read.model in self.differences:
                    raise PlanError(
                        f"'{item.name}' has rows of other tokens in '{read.model}' than in '{self.donor}': "
                        + self.differences[read.model],
                        where=self.inputs[read.model].reference,
                        hint=f"take embedding and head from '{self.donor}' by a rule ({{match: ..., take: ...}}), or "
                        "from another model and its tokenizer with them (output.tokenizer_from)",
                    )

    def _moved(self, tokens: Vocabulary, target: Vocabulary) -> bool:
        """Whether a token stands at an id that the other vocabulary does not use."""
        places = {token: place for place, token in target.items()}
        return any(places.get(token, place) != place for place, token in tokens.items())

    def _compared(self, source: ResolvedInput) -> tuple[Vocabulary | None, Vocabulary | None]:
        """The tokens of a model and of the donor; None where they need not be compared."""
        if self.donor is None or source.name == self.donor or source.is_task_vector:
            return None, None
        raw, wanted = _raw(source), self._of_donor
        if raw is None or wanted is None or raw == wanted:
            return None, None
        return _parsed(*raw, source.reference), self._donor_tokens

    @cached_property
    def _of_donor(self) -> tuple[str, bytes] | None:
        return None if self.donor is None else _raw(self.inputs[self.donor])

    @cached_property
    def _donor_tokens(self) -> Vocabulary | None:
        if self.donor is None or self._of_donor is None:
            return None
        return _parsed(*self._of_donor, self.inputs[self.donor].reference)

    def _refuse_task_vectors(self, source: ResolvedInput) -> None:
        vectors = [name for name, other in self.inputs.items() if other.is_task_vector]
        if vectors:
            raise PlanError(
                f"the tokens of '{source.name}' are in another order than those of '{self.donor}', and it is not known "
                f"in which order the rows of '{vectors[0]}' are",
                where=source.reference,
                hint="give full models, or task vectors of models with one tokenizer",
            )


def adapter_tokenizer(source: ResolvedInput, items: Iterable[WorkItem]) -> tuple[dict[str, str], list[str]]:
    """The tokenizer files (file -> ``input#adapter``) of the adapter that a vocabulary grew by, and what to say.

    Both are empty where the vocabulary did not grow.
    """
    stored = source.checkpoint.tensors
    grown = [
        item
        for item in items
        if is_vocabulary(item.name)
        and item.name in stored
        and item.shape
        and item.shape[0] > stored[item.name].shape[0]
    ]
    if not grown or not source.adapters:
        return {}, []
    rows = f"{grown[0].name} grew from {stored[grown[0].name].shape[0]} to {grown[0].shape[0]} rows"
    for number, adapter in reversed(list(enumerate(source.adapters))):
        directory = adapter.checkpoint.directory
        beside = side_files(directory).carried if directory is not None and directory.is_dir() else ()
        files = [name for name in beside if is_tokenizer_file(name)]
        if any(name.startswith(("token", "vocab", "spiece", "tekken", "added")) for name in files):
            note = f"{rows}; the tokenizer that lies beside {adapter.label} goes along"
            return dict.fromkeys(files, f"{source.name}#{number}"), [note]
    return {}, [f"{rows}; no tokenizer lies beside the adapter, so the model's own goes along, without the new tokens"]


def _raw(source: ResolvedInput) -> tuple[str, bytes] | None:
    """The file that lists a model's tokens, and its bytes."""
    directory = source.checkpoint.directory
    if directory is not None:
        found = next((name for name in _FILES if name in source.checkpoint.side_files), None)
        if found is None:
            return None
        return found, read_small_file(directory / found, folder=directory, limit=LARGEST_SIDE_FILE)
    if source.repo is None:
        return None
    remote = next((name for name in _FILES if name in source.repo.files), None)
    if remote is None:
        return None
    from mergekit_px.hub.files import read_small

    return remote, read_small(source.repo, remote)


def _parsed(file: str, raw: bytes, where: str) -> Vocabulary:
    place = f"{where}/{file}"
    if file == "vocab.txt":
        return dict(enumerate(raw.decode("utf-8", "replace").rstrip("\n").split("\n")))
    content = parse_object(raw, place, strict=False)
    model = content.get("model") if file == "tokenizer.json" else {"vocab": content}
    listed = model.get("vocab") if isinstance(model, dict) else None
    added = content.get("added_tokens") if file == "tokenizer.json" else None
    try:
        if isinstance(listed, dict):
            tokens = {int(place): str(token) for token, place in listed.items()}
        elif isinstance(listed, list):
            tokens = {place: str(entry[0]) for place, entry in enumerate(listed)}
        else:
            raise ValueError
        tokens.update((int(entry["id"]), str(entry["content"])) for entry in added or ())
    except (ValueError, TypeError, KeyError, IndexError):
        raise MalformedCheckpointError("this is no tokenizer: it lists no tokens with their ids", where=place) from None
    if not tokens or min(tokens) < 0:
        raise MalformedCheckpointError("this is no tokenizer: it has no tokens, or ids below 0", where=place)
    return tokens


def _holds(name: str, node: Node, rows: int) -> bool:
    return is_vocabulary(name) and bool(node.shape) and node.shape[0] >= rows


def _order(tokens: Vocabulary, target: Vocabulary, rows: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """For each row of the donor's order, the row of the model; rows without a token keep their order."""
    places = {token: place for place, token in tokens.items()}
    index = np.full(rows, -1, dtype=np.int64)
    for place, token in target.items():
        index[place] = places[token]
    index[index < 0] = [place for place in range(rows) if place not in tokens]
    return index
