"""Which token each row of an embedding or head stands for, so that rows of different tokens are never mixed."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mergekit_px.checkpoint.file_kind import LFS_POINTER
from mergekit_px.checkpoint.json_text import parse_object, shown
from mergekit_px.checkpoint.side_files import LARGEST_SIDE_FILE, is_tokenizer_file, side_files
from mergekit_px.errors import InputError, MalformedCheckpointError, PlanError
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.model import WorkItem
from mergekit_px.plan.nodes import Node, Rows
from mergekit_px.plan.tied import is_vocabulary
from mergekit_px.plan.vocabulary_files import (
    ADDED,
    LISTINGS,
    SENTENCEPIECE,
    SETTINGS,
    AddedToken,
    Tokenizer,
    Vocabulary,
    read_listing,
    with_added,
)
from mergekit_px.small_files import read_small_file

_SHOWN = 5


Offered = Callable[[str], Mapping[str, Node]]
"""The tensors of an input by its name, in the order of its own vocabulary."""


class Tokenizers:
    """The tokenizers of inputs, each read once, and equal files once for all that have them."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, str], Tokenizer | None] = {}
        self._listings: dict[Any, Tokenizer] = {}
        self._digests: dict[tuple[str, str], dict[str, bytes]] = {}

    def of(self, source: ResolvedInput, folder: str = "") -> Tokenizer | None:
        """The tokenizer of a model, or in a folder of it; None where no file that is known lists its tokens.

        Raises:
            MalformedCheckpointError: a file of a tokenizer that is none.
        """
        key = (source.name, folder)
        if key not in self._of:
            self._of[key] = self._read(source, folder)
        return self._of[key]

    def known(self, source: ResolvedInput) -> Tokenizer | None:
        """The tokenizer of a model, if it was read for some reason; large ones take a second."""
        return self._of.get((source.name, ""))

    def same_files(self, one: ResolvedInput, other: ResolvedInput, folder: str = "") -> bool:
        """Whether all files that list tokens are the same, byte for byte."""
        digests = self._of_files(one, folder)
        return bool(digests) and digests == self._of_files(other, folder)

    def difference(self, one: ResolvedInput, other: ResolvedInput, folder: str) -> str | None:
        """Which ids stand for other tokens in a folder of two models, as a sentence; None where none does.

        Raises:
            MalformedCheckpointError: a file of a tokenizer that is none.
        """
        if self.same_files(one, other, folder):
            return None
        found = [self.of(source, folder) for source in (one, other)]
        first, second = ({} if tokenizer is None else tokenizer.tokens for tokenizer in found)
        differing = _differing(first, second)
        return _told(differing, first, second) if differing or (first and second and _moved(first, second)) else None

    def _of_files(self, source: ResolvedInput, folder: str) -> dict[str, bytes]:
        """sha256 of each file that lists tokens."""
        key = (source.name, folder)
        if key not in self._digests:
            files = {name: side_file(source, folder + name) for name in (*LISTINGS, SETTINGS, ADDED)}
            self._digests[key] = {name: hashlib.sha256(raw).digest() for name, raw in files.items() if raw is not None}
        return self._digests[key]

    def _read(self, source: ResolvedInput, folder: str) -> Tokenizer | None:
        file = _listing(source, folder)
        raw = side_file(source, folder + file) if file is not None else None
        if file is None or raw is None:
            return None
        settings, listed = (_object_beside(source, folder + name) for name in (SETTINGS, ADDED))
        merged = f"{folder}merges.txt" in file_names(source)
        key = (file, hashlib.sha256(raw).digest(), merged, settings.get("do_lower_case"))
        if key not in self._listings:
            where = f"{source.reference}/{folder}".removesuffix("/") if folder else source.reference
            self._listings[key] = read_listing(file, raw, settings, where, merged=merged)
        return with_added(self._listings[key], settings, listed)


def tokenizer_folders(source: ResolvedInput) -> list[str]:
    """The folders in a model's, each with a slash, that list tokens."""
    found = (name.rpartition("/") for name in file_names(source))
    return sorted({f"{folder}/" for folder, _, name in found if folder and _lists_tokens(name)})


def _lists_tokens(name: str) -> bool:
    return name in LISTINGS or name.endswith(".tiktoken") or name.startswith("rwkv_vocab")


def _may_list_tokens(name: str) -> bool:
    return is_tokenizer_file(name) and not name.endswith((".json", ".jinja", ".py"))


def file_names(source: ResolvedInput) -> Collection[str]:
    """Names of the files beside a model's weights."""
    if source.checkpoint.directory is not None:
        return source.checkpoint.side_files
    return source.repo.files if source.repo is not None else ()


def side_file(source: ResolvedInput, name: str) -> bytes | None:
    """A file beside a model's weights, whole; None where there is none."""
    if name not in file_names(source):
        return None
    directory = source.checkpoint.directory
    if directory is not None:
        return read_small_file(directory / name, folder=directory, limit=LARGEST_SIDE_FILE)
    from mergekit_px.hub.files import read_small

    assert source.repo is not None
    return read_small(source.repo, name)


def _listing(source: ResolvedInput, folder: str = "") -> str | None:
    """The file that lists a model's tokens, by its name in the folder."""
    own = [name.removeprefix(folder) for name in file_names(source) if name.startswith(folder)]
    file = next((name for name in LISTINGS if name in own), None)
    return file or next((name for name in sorted(own) if _lists_tokens(name) and "/" not in name), None)


def refuse_pointers(source: ResolvedInput) -> None:
    """Raises ``InputError`` where what lists tokens, of the model or a part of it, is only a git-lfs pointer."""
    checkpoint = source.checkpoint
    for file, reason in checkpoint.left_behind.items():
        folder, slash, name = file.rpartition("/")
        if reason == LFS_POINTER.name and _lists_tokens(name) and _listing(source, folder + slash) is None:
            raise InputError(f"this is {reason}", where=f"{checkpoint.label}/{file}", hint=LFS_POINTER.hint)


def _object_beside(source: ResolvedInput, name: str) -> dict[str, Any]:
    raw = side_file(source, name)
    with contextlib.suppress(MalformedCheckpointError):  # what it says of tokens is only an addition
        return parse_object(raw, name, strict=False) if raw is not None else {}
    return {}


@dataclass
class Vocabularies:
    """The tokens of a merge's models, compared with those of the model whose tokenizer goes with the result.

    Models without a tokenizer, and task vectors, are taken to have the tokens of that model.
    """

    inputs: Mapping[str, ResolvedInput]
    donor: str | None
    tokenizers: Tokenizers = field(default_factory=lambda: Tokenizers())
    notes: list[str] = field(default_factory=list)
    differences: dict[str, str] = field(default_factory=dict)
    """Model -> how its tokens differ from the donor's, where no order of rows makes up for it."""

    def arranged(self, source: ResolvedInput, nodes: Mapping[str, Node], offered: Offered) -> Mapping[str, Node]:
        """A model's tensors, with the rows of its vocabulary in the donor's order.

        Raises:
            MalformedCheckpointError: a file of a tokenizer that is none.
            PlanError: the tensors to be brought into order are not known.
        """
        own, wanted = self._compared(source)
        if own is None or wanted is None or own.tokens == wanted.tokens:
            return nodes
        tokens, target = own.tokens, wanted.tokens
        differing = _differing(tokens, target)
        if not differing and not _moved(tokens, target):
            return nodes
        if sorted(tokens.values()) != sorted(target.values()):
            if own.file != wanted.file and not differing:
                return nodes  # only one of the formats lists the tokens that are added
            if own.file != wanted.file and {own.file, wanted.file} & {*SENTENCEPIECE}:
                self.notes.append(
                    f"tokenizers of '{source.name}' and '{self.donor}' are in formats ({own.file}, {wanted.file}) "
                    "between which ids may be shifted; they are taken to be equal"
                )
                return nodes
            self.differences[source.name] = _told(differing, tokens, target)
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

    @property
    def new(self) -> tuple[AddedToken, ...]:
        """No token comes in."""
        return ()

    @property
    def tokens(self) -> Vocabulary | None:
        """The tokens of the result, where they are known."""
        found = self.tokenizers.of(self.inputs[self.donor]) if self.donor is not None else None
        return found.tokens if found is not None else None

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

    def _compared(self, source: ResolvedInput) -> tuple[Tokenizer | None, Tokenizer | None]:
        """The tokenizer of a model and of the donor; None where they need not be compared."""
        if self.donor is None or source.name == self.donor or source.is_task_vector:
            return None, None
        donor = self.inputs[self.donor]
        if _listing(donor) is not None:
            refuse_pointers(source)
        if _listing(source) is None or _listing(donor) is None:
            self._tell_unread(source, donor)
            return None, None
        if self.tokenizers.same_files(source, donor):
            return None, None  # whatever they list
        return self.tokenizers.of(source), self.tokenizers.of(donor)

    def _tell_unread(self, source: ResolvedInput, donor: ResolvedInput) -> None:
        """Say which files that list tokens in a way that is not known differ."""
        shared = [name for name in file_names(source) if name in file_names(donor) and _may_list_tokens(name)]
        differing = [name for name in shared if side_file(source, name) != side_file(donor, name)]
        if differing:
            self.notes.append(
                f"tokenizers of '{source.name}' and '{donor.name}' are in a format that is not read, and "
                f"{shown(differing[0])} differs; their tokens are taken to be equal"
            )

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
    """The tokenizer files (file -> ``input#adapter``) of the adapter that a vocabulary grew or shrank by, and what to
    say. Both are empty where it did neither."""
    stored = source.checkpoint.tensors
    resized = [
        item
        for item in items
        if is_vocabulary(item.name)
        and item.name in stored
        and item.shape
        and item.shape[0] != stored[item.name].shape[0]
    ]
    if not resized or not source.adapters:
        return {}, []
    before, after = stored[resized[0].name].shape[0], resized[0].shape[0]
    rows = f"{resized[0].name} {'grew' if after > before else 'shrank'} from {before} to {after} rows"
    for number, adapter in reversed(list(enumerate(source.adapters))):
        directory = adapter.checkpoint.directory
        beside = side_files(directory).carried if directory is not None and directory.is_dir() else ()
        files = [name for name in beside if is_tokenizer_file(name)]
        if any(name.startswith(("token", "vocab", "spiece", "tekken", "added")) for name in files):
            note = f"{rows}; the tokenizer that lies beside {adapter.label} goes along"
            return dict.fromkeys(files, f"{source.name}#{number}"), [note]
    lacks = "without the new tokens" if after > before else "with tokens that may have no row"
    return {}, [f"{rows}; no tokenizer lies beside the adapter, so the model's own goes along, {lacks}"]


def _differing(tokens: Vocabulary, target: Vocabulary) -> list[int]:
    """The ids that both vocabularies use, and for other tokens."""
    return [place for place in sorted(tokens.keys() & target.keys()) if tokens[place] != target[place]]


def _moved(tokens: Vocabulary, target: Vocabulary) -> bool:
    """Whether a token stands at an id that the other vocabulary does not use."""
    places = {token: place for place, token in target.items()}
    return any(places.get(token, place) != place for place, token in tokens.items())


def _told(differing: list[int], tokens: Vocabulary, target: Vocabulary) -> str:
    places = differing or sorted(tokens.keys() ^ target.keys())
    shown = [f"{place} is {tokens.get(place)!r} and {target.get(place)!r}" for place in places[:_SHOWN]]
    return f"{len(places)} ids differ: {'; '.join(shown)}"


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
