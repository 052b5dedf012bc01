"""The tokenizer beside a model. It is data of a stranger: code that lies there is never run."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_px.checkpoint.side_files import is_tokenizer_file
from mergekit_px.errors import InputError, InputNotFoundError, UsageError
from mergekit_px.learn.models import silence

_NO_LIMIT = 10**9
"""What tokenizers without a longest text give as one is far above."""


@dataclass(frozen=True)
class Tokens:
    """Token numbers of a text, and of a pair of texts which of them each belongs to."""

    ids: list[int]
    types: list[int] | None


class Tokenizer:
    """A tokenizer of a folder.

    Attributes:
        where: the folder, for messages.
        pad, end, mask, special: numbers of its tokens for padding, the end and what is hidden, and all special ones.
        unknown: number of the token for what it does not know, where that stands for nothing else.
        longest: most tokens of a text; None for no limit.
    """

    def __init__(self, folder: Path, where: str, hint: str = "give the folder of one: --tokenizer FOLDER") -> None:
        if importlib.util.find_spec("transformers") is None:
            raise UsageError("texts need transformers", hint='run: pip install "pxmerge[models]"')
        if not folder.is_dir():
            raise InputNotFoundError("no such folder of a tokenizer", where=where)
        if not any(is_tokenizer_file(one.name) for one in folder.iterdir()):
            raise InputError("no tokenizer is beside the model", where=where, hint=hint)
        from transformers import AutoTokenizer

        self.where = where
        try:
            with silence():
                self.inner: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # each backend has its own errors
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"transformers cannot read the tokenizer: {lines[0]}", where=where) from error
        inner = self.inner
        self.end: int | None = inner.eos_token_id
        self.mask: int | None = inner.mask_token_id
        own = inner.unk_token_id not in (self.end, inner.bos_token_id, inner.pad_token_id)
        self.unknown: int | None = inner.unk_token_id if own else None
        self.special = frozenset(inner.all_special_ids)
        self.pad: int = next((one for one in (inner.pad_token_id, self.end) if one is not None), 0)
        self.longest: int | None = inner.model_max_length if inner.model_max_length < _NO_LIMIT else None

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, as_target: bool = False
    ) -> list[Tokens]:
        """The tokens of texts, with those that the tokenizer puts around them."""
        given: dict[str, Any] = {"text_target": list(texts)} if as_target else {"text": list(texts)}
        if pairs is not None:
            given["text_pair"] = list(pairs)
        with silence():
            found = self.inner(**given, add_special_tokens=True, padding=False, truncation=False)
        types = found.get("token_type_ids")
        return [
            Tokens(list(ids), None if types is None else list(types[row])) for row, ids in enumerate(found["input_ids"])
        ]
