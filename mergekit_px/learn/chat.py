"""Conversations through a tokenizer's chat template: what the assistant says counts, all else is prompt."""

from __future__ import annotations

import re
from typing import Any

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import InputError
from mergekit_px.learn.data import IGNORED
from mergekit_px.learn.models import silence
from mergekit_px.learn.tables import Table
from mergekit_px.learn.tokenizers import Tokenizer

ASSISTANT = "assistant"

_MARKED = re.compile(r"\{%-?\s*generation\b")
"""Templates that mark themselves what the assistant says."""


def rendered_messages(table: Table, column: str, tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of each conversation.

    Raises:
        InputError: no template, messages that are none, or a template that shows earlier turns differently later on.
    """
    template = tokenizer.inner.chat_template
    if not template:
        raise InputError(
            "messages need a chat template, and the tokenizer has none",
            where=tokenizer.where,
            hint="give prompt and completion, or a tokenizer with a template: --tokenizer FOLDER",
        )
    marked = isinstance(template, str) and bool(_MARKED.search(template))
    found = []
    for messages, line in zip(table.column(column), table.lines, strict=True):
        _require_messages(messages, table.where, line)
        try:
            with silence():
                found.append(_by_marks(tokenizer, messages) if marked else _by_turns(tokenizer, messages))
        except _ChangedTurnError:
            raise InputError(
                f"line {line}: the chat template shows earlier turns differently once later ones follow, so that"
                " nothing tells what the assistant says",
                where=table.where,
                hint="give conversations with one answer each",
            ) from None
        except InputError:
            raise
        except Exception as error:  # a template is a program of its own
            lines = str(error).splitlines() or [type(error).__name__]
            what = f"line {line}: the chat template does not take the messages: {shown(lines[0])}"
            raise InputError(what, where=table.where) from error
    return found


class _ChangedTurnError(Exception):
    pass


def _require_messages(messages: Any, where: str, line: int) -> None:
    is_list = isinstance(messages, list) and messages
    if not is_list or not all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages):
        what = f"line {line}: messages are a list of objects with role and content"
        raise InputError(what, where=where)
    if not any(one["role"] == ASSISTANT for one in messages):
        raise InputError(f"line {line}: no message is of the {ASSISTANT}, so nothing is predicted", where=where)
    for one in messages:
        if isinstance(one.get("content"), str) and not one["content"].strip():
            raise InputError(f"line {line}: a message is empty", where=where)


def _by_marks(tokenizer: Tokenizer, messages: list[Any]) -> tuple[list[int], list[int]]:
    found = tokenizer.inner.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, said = list(found["input_ids"]), found["assistant_masks"]
    return ids, [token if counts else IGNORED for token, counts in zip(ids, said, strict=True)]


def _by_turns(tokenizer: Tokenizer, messages: list[Any]) -> tuple[list[int], list[int]]:
    """What each answer adds to what stood there before it."""
    ids = _rendered(tokenizer, messages)
    labels = [IGNORED] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = _rendered(tokenizer, messages[:number], prompt=True) if number else []
        after = _rendered(tokenizer, messages[: number + 1])
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise _ChangedTurnError
        labels[len(before) : len(after)] = after[len(before) :]
    return ids, labels


def _rendered(tokenizer: Tokenizer, messages: list[Any], *, prompt: bool = False) -> list[int]:
    found = tokenizer.inner.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=prompt)
    return list(found["input_ids"])
