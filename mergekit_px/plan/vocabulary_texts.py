"""What is written of a vocabulary that was built: the tokenizer's files with its new tokens, ids that moved."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_px.checkpoint.json_text import parse_object
from mergekit_px.errors import PlanError
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.tokenizers import Vocabularies, file_names, side_file
from mergekit_px.plan.vocabulary import ChosenVocabulary
from mergekit_px.plan.vocabulary_files import ADDED, DECODER, ENDS, SETTINGS, TEKKEN, TOKENIZER, AddedToken, Tokenizer

GENERATION = "generation_config.json"
_IDS = re.compile(r".*token_(id|ids|index)|.*suppress_tokens")
"""Keys of configurations whose whole numbers are ids of tokens."""


def tokenizer_texts(source: ResolvedInput, tokenizer: Tokenizer, new: Sequence[AddedToken]) -> dict[str, bytes]:
    """The files of a model's tokenizer that change as tokens come in.

    Raises:
        PlanError: the tokenizer's format cannot take them.
    """
    if not new:
        return {}
    if tokenizer.file == TEKKEN:
        raise PlanError(
            f"tokens cannot be added to {TEKKEN}, whose special tokens come first",
            where=source.reference,
            hint="give the model with its tokenizer.json",
        )
    names = file_names(source)
    texts: dict[str, bytes] = {}
    if TOKENIZER in names:
        texts[TOKENIZER] = _with_tokens(_object(source, TOKENIZER), new)
    settings = _object(source, SETTINGS) if SETTINGS in names else {}
    if DECODER in settings or TOKENIZER not in names:
        listed = settings.get(DECODER)
        settings[DECODER] = {**(listed if isinstance(listed, dict) else {}), **{str(t.id): t.entry() for t in new}}
        texts[SETTINGS] = json_text(settings)
    if ADDED in names or TOKENIZER not in names:
        listed = _object(source, ADDED) if ADDED in names else {}
        texts[ADDED] = json_text({**listed, **{token.text: token.id for token in new}})
    return texts


def _with_tokens(content: dict[str, Any], new: Sequence[AddedToken]) -> bytes:
    """``tokenizer.json`` with more added tokens, under the ids that they are to have."""
    entries = [*(content.get("added_tokens") or []), *({"id": token.id, **token.entry()} for token in new)]
    content["added_tokens"] = entries
    vocabulary = content["model"]["vocab"]
    # Readers number added tokens themselves, from the size of the vocabulary on. Where that has left out numbers, only
    # tokens that it has itself keep their own.
    own = {entry[0] for entry in vocabulary} if isinstance(vocabulary, list) else vocabulary
    beside = [entry for entry in entries if entry["content"] not in own]
    if [int(entry["id"]) for entry in beside] != list(range(len(vocabulary), len(vocabulary) + len(beside))):
        if not isinstance(vocabulary, dict):
            raise PlanError(f"{TOKENIZER}: its added tokens leave out ids, so {new[0].text!r} cannot come in")
        vocabulary.update((entry["content"], int(entry["id"])) for entry in beside)
    return json_text(content, indent=None)


def followed_ids(
    config: dict[str, Any],
    inputs: Mapping[str, ResolvedInput],
    config_from: str,
    tokenizer_from: str | None,
    chosen: Vocabularies | ChosenVocabulary,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The config, and what else changes beside it, with ids of tokens as the result's tokenizer has them."""
    if tokenizer_from in (None, config_from):
        return config, {}
    source = inputs[config_from]
    own, tokens = chosen.tokenizers.of(source), chosen.tokens
    if own is None or tokens is None:
        return config, {}
    ids: dict[str, int] = {}
    for place, token in tokens.items():
        ids.setdefault(token, place)
    if all(ids.get(token) == place for token, place in own.ids.items()):
        return config, {}
    donor = inputs[tokenizer_from]
    texts = {}
    if GENERATION in file_names(source):
        said = _object(donor, GENERATION) if GENERATION in file_names(donor) else donor.config or {}
        texts[GENERATION] = json_text(moved_ids(_object(source, GENERATION), own.tokens, ids, said))
    return moved_ids(config, own.tokens, ids, donor.config or {}), texts


def moved_ids(
    config: Mapping[str, Any], own: Mapping[int, str], ids: Mapping[str, int], donor: Mapping[str, Any]
) -> dict[str, Any]:
    """A configuration with its ids of tokens as they are in another vocabulary.

    Args:
        own: the vocabulary that the configuration speaks of.
        ids: token -> id in the other one.
        donor: the same configuration of the model whose vocabulary that is; what it says of the beginning, the end
            and padding counts, and what it says of tokens that are not in both.
    """

    def moved(key: str, value: Any) -> Any:
        said = donor.get(key)
        if said is not None and key in ENDS:
            return said
        if isinstance(value, list):
            found = [moved("", each) for each in value]
            return [each for each in found if each is not None]
        token = own.get(value) if isinstance(value, int) and not isinstance(value, bool) else None
        return value if token is None else ids.get(token, said)

    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            said = donor.get(key)
            result[key] = moved_ids(value, own, ids, said if isinstance(said, Mapping) else {})
        else:
            result[key] = moved(key, value) if _IDS.fullmatch(key) else value
    return result


def json_text(content: Mapping[str, Any], indent: int | None = 2) -> bytes:
    """JSON as it is written beside weights."""
    return (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _object(source: ResolvedInput, name: str) -> dict[str, Any]:
    raw = side_file(source, name)
    return parse_object(raw or b"{}", f"{source.reference}/{name}", strict=False)
