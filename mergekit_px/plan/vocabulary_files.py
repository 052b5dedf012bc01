"""The formats in which tokenizers list their tokens, each read to id -> token.

Tokens that stand for bytes are written as byte-level tokenizers write them, whatever the file: a space is ``Ġ``.
"""

from __future__ import annotations

import ast
import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from mergekit_px.checkpoint.json_text import parse_object
from mergekit_px.errors import MalformedCheckpointError

Vocabulary = dict[int, str]
"""Id -> token."""

TOKENIZER, TEKKEN, ADDED, SETTINGS = "tokenizer.json", "tekken.json", "added_tokens.json", "tokenizer_config.json"
SENTENCEPIECE = (
    *("tokenizer.model", "spiece.model", "spm.model", "tokenizer.model.v3"),
    *("sentencepiece.bpe.model", "sentencepiece.model", "spm_char.model", "vocab.spm"),
)
LISTINGS = (TOKENIZER, "vocab.json", "vocab.txt", TEKKEN, "encoder.json", "dict.txt", *SENTENCEPIECE)
"""Files that list a whole vocabulary; the first that is there counts, then any ``*.tiktoken`` or ``rwkv_vocab*``."""

ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Of a configuration: the ids of tokens that go with a tokenizer rather than with a model."""

BYTE_LEVEL, PLAIN_BPE = "byte-level BPE", "BPE"
DECODER = "added_tokens_decoder"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""What a tokenizer says of an added token."""

_FILLER = "<SPECIAL_{}>"


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched before the model sees a text; flags that are not given have their defaults."""

    id: int
    text: str
    flags: Mapping[str, bool] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        """As files of tokenizers write it, without its id."""
        defaults = {flag: flag == "normalized" and not self.flags.get("special", False) for flag in FLAGS}
        return {"content": self.text, **defaults, **self.flags}


@dataclass(frozen=True)
class Tokenizer:
    """What the files of a tokenizer say.

    Attributes:
        file: the one that lists the tokens.
        kind: the model, as people call it; tokens of two kinds are not spelled alike. Empty where it is not known.
        tokens: by id.
        added: those that are matched before the model sees a text -> their flags.
        normalizer: what is done to a text first, without marking of spaces; None where that is not known.
    """

    file: str
    kind: str
    tokens: Vocabulary
    added: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    normalizer: str | None = None

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id; of a token that is listed twice the first."""
        found: dict[str, int] = {}
        for place, token in self.tokens.items():
            found.setdefault(token, place)
        return found

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return max(self.tokens) + 1


def read_listing(file: str, raw: bytes, settings: Mapping[str, Any], where: str, *, merged: bool) -> Tokenizer:
    """The tokenizer that a file lists.

    Args:
        settings: ``tokenizer_config.json``.
        where: the model, for messages.
        merged: whether a list of merges lies beside it.

    Raises:
        MalformedCheckpointError: it lists no tokens with their ids.
    """
    place = f"{where}/{file}"
    try:
        found = _read(file, raw, place, settings, merged)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise MalformedCheckpointError("this is no tokenizer: it lists no tokens with their ids", where=place) from None
    if not found.tokens or min(found.tokens) < 0:
        raise MalformedCheckpointError("this is no tokenizer: it has no tokens, or ids below 0", where=place)
    return found


def with_added(found: Tokenizer, settings: Mapping[str, Any], listed: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer with the tokens that ``tokenizer_config.json`` and ``added_tokens.json`` add to its listing."""
    tokens: Vocabulary = {}
    added: dict[str, Mapping[str, bool]] = {}
    try:
        for number, token, flags in _added_beside(settings, listed):
            if token not in added and token not in found.added and found.tokens.get(number, token) == token:
                tokens[number], added[token] = token, flags
    except (ValueError, TypeError, KeyError, AttributeError):
        return found  # of other software, which means something else by these names
    if not added or min(tokens) < 0:
        return found
    return replace(found, tokens={**found.tokens, **tokens}, added={**found.added, **added})


def _read(file: str, raw: bytes, place: str, settings: Mapping[str, Any], merged: bool) -> Tokenizer:
    if file == TOKENIZER:
        return _tokenizer_json(parse_object(raw, place, strict=False))
    if file == TEKKEN:
        return _tekken(parse_object(raw, place, strict=False))
    if _RWKV.match(raw):
        rows = (_RWKV.match(line) for line in raw.splitlines() if line.strip())
        return Tokenizer(file, "RWKV", {int(row[1]): as_text(_literal(row[2])) for row in rows if row}, normalizer="")
    if file == "vocab.txt":
        lines = raw.decode("utf-8", "replace").rstrip("\r\n").split("\n")
        tokens = dict(enumerate(line.removesuffix("\r") for line in lines))
        lowered = settings.get("do_lower_case", True) is not False
        return Tokenizer(file, "WordPiece", tokens, normalizer=_normalizer({"type": "Bert", "lowercase": lowered}))
    if file == "dict.txt":
        # Of fairseq: a token and its count on each line; four tokens of its own come first.
        words = (line.rpartition(" ")[0] for line in raw.decode("utf-8", "replace").splitlines() if line.strip())
        return Tokenizer(file, "", dict(enumerate(words, 4)))
    if file in ("vocab.json", "encoder.json"):
        listed = parse_object(raw, place, strict=False)
        tokens = {int(number): str(token) for token, number in listed.items()}
        return Tokenizer(file, BYTE_LEVEL if merged else "", tokens, normalizer="" if merged else None)
    if file.endswith(".tiktoken") or _is_tiktoken(raw):
        ranks = (line.split() for line in raw.splitlines() if line.strip())
        tokens = {int(rank): as_text(base64.b64decode(token, validate=True)) for token, rank in ranks}
        return Tokenizer(file, BYTE_LEVEL, tokens, normalizer=None)
    return _sentencepiece(file, raw)


_RWKV = re.compile(rb"(\d+) (b?'.*'|b?\".*\") \d+\s*$", re.MULTILINE)
"""A line of RWKV's lists: an id, a string or bytes as Python writes them, and how many bytes that are."""


def _literal(written: bytes) -> bytes:
    value = ast.literal_eval(written.decode())
    return value if isinstance(value, bytes) else str(value).encode()


def _tokenizer_json(content: Mapping[str, Any]) -> Tokenizer:
    model = content["model"]
    listed = model["vocab"]
    if isinstance(listed, dict):
        tokens = {int(place): str(token) for token, place in listed.items()}
    else:
        tokens = {place: str(entry[0]) for place, entry in enumerate(listed)}
    added: dict[str, Mapping[str, bool]] = {}
    for entry in content.get("added_tokens") or ():
        tokens[int(entry["id"])] = str(entry["content"])
        added[str(entry["content"])] = {flag: bool(entry[flag]) for flag in FLAGS if flag in entry}
    kind = str(model.get("type") or ("BPE" if "merges" in model else "WordLevel"))
    if kind == "BPE":
        parts = [*_parts(content.get("pre_tokenizer")), *_parts(content.get("decoder"))]
        kind = BYTE_LEVEL if any(part.get("type") == "ByteLevel" for part in parts) else PLAIN_BPE
    return Tokenizer(TOKENIZER, kind, tokens, added, _normalizer(content.get("normalizer")))


def _parts(component: Any) -> Iterator[Mapping[str, Any]]:
    """The parts of a component of a tokenizer, sequences opened."""
    if not isinstance(component, dict):
        return
    inner = next((component[key] for key in _SEQUENCES if isinstance(component.get(key), list)), None)
    if inner is None:
        yield component
        return
    for part in inner:
        yield from _parts(part)


_SEQUENCES = ("normalizers", "pretokenizers", "decoders")


def _normalizer(component: Any) -> str:
    """A normaliser as text to compare, without what only marks spaces, which pre-tokenisers do as well."""
    told = []
    for part in _parts(component):
        marks = part.get("content") == "▁" or part.get("prepend") == "▁"
        if marks:
            continue
        kept = {"type": part.get("type"), "lowercase": part.get("lowercase")} if "lowercase" in part else dict(part)
        kept["type"] = str(kept.get("type")).removesuffix("Normalizer")
        told.append(json.dumps(kept, sort_keys=True, default=str))
    return "; ".join(told)


def _tekken(content: Mapping[str, Any]) -> Tokenizer:
    config = content["config"]
    reserved, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
    tokens = {number: _FILLER.format(number) for number in range(reserved)}
    listed = content.get("special_tokens") or ()
    tokens.update((int(entry["rank"]), str(entry["token_str"])) for entry in listed)
    added = {token: {"special": True, "normalized": False} for token in tokens.values()}
    for entry in content["vocab"][: size - reserved]:
        tokens[reserved + int(entry["rank"])] = as_text(base64.b64decode(entry["token_bytes"]))
    return Tokenizer(TEKKEN, BYTE_LEVEL, tokens, added, normalizer="")


def _is_tiktoken(raw: bytes) -> bool:
    """Whether a file has lines of a token in base64 and its rank."""
    parts = raw[:512].split(b"\n", 1)[0].split()
    try:
        return len(parts) == 2 and parts[1].isdigit() and bool(base64.b64decode(parts[0], validate=True))
    except binascii.Error:
        return False


# Fields of sentencepiece_model.proto: the numbers are those of the published schema.
_PIECE, _TRAINER = 1, 2
_PIECE_TEXT, _PIECE_TYPE, _TRAINER_TYPE = 1, 3, 3
_MODEL_TYPES = {1: "Unigram", 2: PLAIN_BPE, 3: "", 4: ""}
_CONTROL, _USER_DEFINED = 3, 4


def _sentencepiece(file: str, raw: bytes) -> Tokenizer:
    tokens: Vocabulary = {}
    added: dict[str, Mapping[str, bool]] = {}
    kind = "Unigram"
    for number, value in _fields(raw):
        if number == _PIECE:
            piece = dict(_fields(value))
            text = bytes(piece[_PIECE_TEXT]).decode("utf-8", "replace")
            if (of := piece.get(_PIECE_TYPE, 1)) in (_CONTROL, _USER_DEFINED):
                added[text] = {"special": of == _CONTROL, "normalized": False}
            tokens[len(tokens)] = text
        elif number == _TRAINER:
            kind = _MODEL_TYPES.get(dict(_fields(value)).get(_TRAINER_TYPE, 1), "")
    return Tokenizer(file, kind, tokens, added)


def _fields(raw: Any) -> Iterator[tuple[int, Any]]:
    """The fields of a message in the wire format of protocol buffers: numbers as int, all else as bytes.

    Raises:
        ValueError, IndexError: it is none.
    """
    view, place = memoryview(raw), 0
    while place < len(view):
        key, place = _varint(view, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(view, place)
            yield number, value
            continue
        if wire == 2:
            length, place = _varint(view, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError
        if number == 0 or place + length > len(view):
            raise ValueError
        yield number, view[place : place + length]
        place += length


def _varint(view: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError


def _added_beside(
    settings: Mapping[str, Any], listed: Mapping[str, Any]
) -> Iterator[tuple[int, str, Mapping[str, bool]]]:
    for number, entry in (settings.get(DECODER) or {}).items():
        yield int(number), str(entry["content"]), {flag: bool(entry[flag]) for flag in FLAGS if flag in entry}
    for token, number in listed.items():
        yield int(number), str(token), {}


def text_of(token: str, tokenizer: Tokenizer) -> bytes:
    """The text that a token stands for, in UTF-8; spaces as such, however they are marked."""
    if token in tokenizer.added:
        return token.encode("utf-8", "backslashreplace")
    if tokenizer.kind == BYTE_LEVEL and all(character in _BYTES_OF for character in token):
        return bytes(_BYTES_OF[character] for character in token)
    if tokenizer.kind == "WordPiece":
        token = token[2:] if token.startswith("##") else f" {token}"
    elif found := _BYTE_PIECE.fullmatch(token):
        return bytes([int(found[1], 16)])
    return token.replace("▁", " ").encode("utf-8", "backslashreplace")


def as_text(token: bytes) -> str:
    """Bytes as byte-level tokenizers write them: one printable character for each."""
    return "".join(_BYTE_CHARACTERS[byte] for byte in token)


def _byte_characters() -> dict[int, str]:
    """Printable Latin-1 characters for themselves, and those from U+0100 on for the other bytes, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + place) for place, byte in enumerate(others)}


_BYTE_CHARACTERS = _byte_characters()
_BYTES_OF = {character: byte for byte, character in _BYTE_CHARACTERS.items()}
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
