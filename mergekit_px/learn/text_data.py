"""Texts as a model takes them: what a row's columns mean for the model's class, tokens, padding and labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import InputError, UsageError
from mergekit_px.learn.chat import rendered_messages
from mergekit_px.learn.data import IGNORED, LABELS, derived_seed
from mergekit_px.learn.tables import Table
from mergekit_px.learn.tokenizers import Tokenizer

ROLES = ("text", "text_pair", "label", "prompt", "completion", "messages")

Task = Literal["class", "value", "next token", "masked token", "answer", "unknown"]

MASKED_SHARE = 0.15
"""Of the tokens of a text that a masked language model has to find, as BERT was trained (arXiv 1810.04805)."""
_SHOWN = 6
_UNKNOWN_SHARE = 0.5
"""Of a file's tokens: with more unknown ones there is nothing to learn, and the tokenizer is another model's."""


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How rows of text are read.

    Attributes:
        columns: role of `ROLES` -> column; roles that are not named have columns of their own names.
        max_length: tokens after which an example is cut; None for no cut.
        tokenizer: a folder; None for the one beside the model.
    """

    columns: tuple[tuple[str, str], ...] = ()
    max_length: int | None = None
    tokenizer: str | None = None


NO_TEXT = TextOptions()


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example, and their labels; of an encoder and decoder, labels of another length."""

    ids: list[int]
    labels: list[int] | None = None
    types: list[int] | None = None


def task_of(config: Mapping[str, Any] | None) -> Task:
    """What a model of that configuration predicts."""
    architectures = (config or {}).get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    assert config is not None or not name
    if "ForSequenceClassification" in name:
        assert config is not None
        count = len(config["id2label"]) if isinstance(config.get("id2label"), dict) else config.get("num_labels", 2)
        return "value" if config.get("problem_type") == "regression" or count == 1 else "class"
    if name.endswith("ForMaskedLM"):
        return "masked token"
    if config is not None and config.get("is_encoder_decoder"):
        return "answer"
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return "next token"
    return "unknown"


def text_arrays(
    table: Table,
    options: TextOptions,
    tokenizer: Tokenizer,
    config: Mapping[str, Any] | None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Tensor]:
    """Arrays for the forward pass, padded at the end, and ``labels`` where the rows have them.

    Args:
        config: of the model; None where it is not known.
        note: gets a line about what is not used or was cut.

    Raises:
        UsageError: roles that there are not.
        InputError: columns, texts, labels or tokens that do not fit the model.
    """
    columns = _columns(table, options)
    task = task_of(config)
    if task == "unknown" and "label" in columns:
        task = "class"
    elif task == "unknown":
        task = "next token"
    encoded = _encoded(table, columns, task, tokenizer, note)
    cut = 0
    if options.max_length is not None:
        cut = sum(len(one.ids) > options.max_length for one in encoded)
        encoded = [_cut(one, options.max_length, beside=task != "answer") for one in encoded]
    if cut:
        note(f"{table.where}: {cut} of {len(encoded)} examples are cut to {options.max_length} tokens")
    _require_tokens(encoded, table, tokenizer, config)
    arrays = _padded(encoded, tokenizer.pad)
    if task in ("class", "value") and "label" in columns:
        arrays[LABELS] = _labels(table, columns["label"], task, config)
    if task == "masked token":
        arrays |= _masked(arrays, tokenizer, table.where)
    return arrays


def _columns(table: Table, options: TextOptions) -> dict[str, str]:
    """Role -> column, for the roles that the rows have."""
    unknown = [role for role, _ in options.columns if role not in ROLES]
    if unknown:
        raise UsageError(f"there is no role '{unknown[0]}'", where="--columns", hint=f"roles are {', '.join(ROLES)}")
    named, known = dict(options.columns), table.columns()
    missing = [column for column in named.values() if column not in known]
    if missing:
        raise InputError(
            f"it has no column {shown(missing[0])}; the columns are {shown(', '.join(known))}", where=table.where
        )
    taken = set(named.values())
    found = {role: role for role in ROLES if role in known and role not in taken} | named
    forms = [form for form in ("text", "prompt", "messages") if form in found]
    asked = [form for form in forms if form in named]
    if len(forms) > 1 and len(asked) == 1:
        dropped = {"text": ("text", "text_pair"), "prompt": ("prompt", "completion"), "messages": ("messages",)}
        for form in set(forms) - set(asked):
            found = {role: column for role, column in found.items() if role not in dropped[form]}
        forms = asked
    if len(forms) != 1:
        what = f"it has {' and '.join(forms)}" if forms else f"its columns are {shown(', '.join(known))}"
        raise InputError(
            f"{what}; examples are text, prompt and completion, or messages",
            where=table.where,
            hint="say which column holds what, as --columns text=COLUMN label=COLUMN",
        )
    return found


def _encoded(
    table: Table, columns: Mapping[str, str], task: Task, tokenizer: Tokenizer, note: Callable[[str], None]
) -> list[Encoded]:
    predicts_text = task in ("next token", "answer")
    if "label" in columns and predicts_text:
        note(f"{table.where}: the column {columns['label']} is not used: the model predicts tokens")
    if "messages" in columns:
        if task != "next token":
            raise InputError("messages are for causal language models", where=table.where, hint="give text and label")
        return [Encoded(*one) for one in rendered_messages(table, columns["messages"], tokenizer)]
    if "prompt" in columns:
        if not predicts_text:
            raise InputError("prompts and completions are for models that write", where=table.where,
                             hint="give text and label")  # fmt: skip
        prompts = _texts(table, columns["prompt"])
        completions = _texts(table, columns.get("completion", "completion"))
        if task == "answer":
            questions, answers = tokenizer.encode(prompts), tokenizer.encode(completions, as_target=True)
            return [Encoded(one.ids, other.ids) for one, other in zip(questions, answers, strict=True)]
        return _completions(prompts, completions, tokenizer)
    if task == "answer":
        raise InputError(
            "the model answers a text with a text",
            where=table.where,
            hint="give the columns prompt and completion: --columns prompt=COLUMN completion=COLUMN",
        )
    texts = _texts(table, columns["text"])
    pairs = _texts(table, columns["text_pair"]) if "text_pair" in columns else None
    found = [Encoded(one.ids, types=one.types) for one in tokenizer.encode(texts, pairs)]
    return [Encoded(one.ids, list(one.ids)) for one in found] if task == "next token" else found


def _texts(table: Table, column: str) -> list[str]:
    """The texts of a column. Raises ``InputError`` for one that is missing, empty or no text."""
    found = table.column(column)
    for text, line in zip(found, table.lines, strict=True):
        if not isinstance(text, str):
            raise InputError(f"line {line}: {shown(column)} is no text", where=table.where)
        if not text.strip():
            empty = sum(isinstance(one, str) and not one.strip() for one in found)
            more = f", and {empty - 1} more" if empty > 1 else ""
            raise InputError(f"line {line}{more}: {shown(column)} is empty", where=table.where)
    return found


def _completions(prompts: Sequence[str], completions: Sequence[str], tokenizer: Tokenizer) -> list[Encoded]:
    """Prompts with their completions and an end; labels of the completions alone.

    Both are encoded as one text: what a token at the border is, completion or prompt, the prompt's own tokens tell.
    """
    whole = tokenizer.encode([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
    alone = tokenizer.encode(prompts)
    found = []
    for one, prompt in zip(whole, alone, strict=True):
        shared = 0
        for ours, theirs in zip(one.ids, prompt.ids, strict=False):
            if ours != theirs:
                break
            shared += 1
        ids = one.ids if tokenizer.end is None or one.ids[-1:] == [tokenizer.end] else [*one.ids, tokenizer.end]
        found.append(Encoded(ids, [IGNORED] * shared + ids[shared:]))
    return found


def _cut(one: Encoded, length: int, *, beside: bool) -> Encoded:
    labels = one.labels[:length] if one.labels is not None else None
    return Encoded(one.ids[:length], labels, one.types[:length] if one.types is not None else None)


def _require_tokens(
    encoded: Sequence[Encoded], table: Table, tokenizer: Tokenizer, config: Mapping[str, Any] | None
) -> None:
    """Raise ``InputError`` for tokens that the model does not have, and for more than it has positions."""
    config = _text_config(config)
    rows = config.get("vocab_size")
    tokens = [[*one.ids, *(label for label in one.labels or () if label != IGNORED)] for one in encoded]
    largest = max((max(one, default=0) for one in tokens), default=0)
    if isinstance(rows, int) and largest >= rows:
        raise InputError(
            f"the tokenizer gives ids up to {largest}, and the model has a vocabulary of {rows}",
            where=tokenizer.where,
            hint="use the tokenizer that belongs to the model",
        )
    none = [line for one, line in zip(encoded, table.lines, strict=True) if not one.ids]
    if none:
        raise InputError(f"line {none[0]}: the tokenizer makes no token of it", where=table.where)
    words = [
        token for one in encoded for token in one.ids if token == tokenizer.unknown or token not in tokenizer.special
    ]
    unknown = words.count(tokenizer.unknown) if tokenizer.unknown is not None else 0
    if unknown > _UNKNOWN_SHARE * len(words):
        raise InputError(
            f"{unknown} of the {len(words)} tokens of {table.where} are unknown to the tokenizer",
            where=tokenizer.where,
            hint="use the tokenizer that belongs to the model, and texts in its language",
        )
    most = config.get("max_position_embeddings", config.get("n_positions"))
    limits = [one for one in (most, tokenizer.longest) if isinstance(one, int)]
    if config.get("is_encoder_decoder") or not limits:
        return
    limit = min(limits)
    lengths = [len(one.ids) for one in encoded]
    longest = max(lengths)
    if longest > limit:
        raise InputError(
            f"line {table.lines[lengths.index(longest)]} is {longest} tokens long, the model has {limit} positions",
            where=table.where,
            hint=f"cut examples with --max-length {limit}",
        )


def _text_config(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The configuration of the part of a model that reads text, where it has several."""
    config = config or {}
    inner = config.get("text_config")
    return {**inner, **config} if isinstance(inner, dict) else config


def _padded(encoded: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    arrays = {
        "input_ids": _columns_of([one.ids for one in encoded], pad),
        "attention_mask": _columns_of([[1] * len(one.ids) for one in encoded], 0),
    }
    if all(one.types is not None for one in encoded):
        arrays["token_type_ids"] = _columns_of([one.types or [] for one in encoded], 0)
    if all(one.labels is not None for one in encoded):
        arrays[LABELS] = _columns_of([one.labels or [] for one in encoded], IGNORED)
    return arrays


def _columns_of(rows: Sequence[Sequence[int]], nothing: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[nothing] * (width - len(row))] for row in rows])


def _labels(table: Table, column: str, task: Task, config: Mapping[str, Any] | None) -> Tensor:
    values = table.column(column)
    if task == "value":
        try:
            return torch.tensor([float(one) for one in values])
        except (TypeError, ValueError):
            raise InputError(f"{shown(column)} holds labels that are no numbers", where=table.where) from None
    numbers = classes_of(config)
    found = []
    for value, line in zip(values, table.lines, strict=True):
        number = _class(value, numbers)
        if number is None:
            known = sorted(numbers, key=numbers.__getitem__)
            classes = ", ".join(map(shown, known[:_SHOWN])) + (", ..." if len(known) > _SHOWN else "")
            raise InputError(
                f"line {line}: the label {shown(json.dumps(value, default=str))} is unknown to the head, whose classes"
                f" are {classes or 'numbers'}",
                where=table.where,
                hint="give a class's name or number; config.json names classes in label2id"
                if known
                else "number the classes from 0",
            )
        found.append(number)
    return torch.tensor(found)


def _class(value: Any, numbers: Mapping[str, int]) -> int | None:
    """The number of a class by its name, or as it is written; None for one that the head does not have."""
    if isinstance(value, str) and value in numbers:
        return numbers[value]
    try:
        number = int(value) if not isinstance(value, float) or value.is_integer() else None
    except (TypeError, ValueError, OverflowError):
        return None
    return None if number is None or (numbers and number not in numbers.values()) else number


def classes_of(config: Mapping[str, Any] | None) -> dict[str, int]:
    """Name -> number of the head's classes, as far as its configuration tells."""
    config = config or {}
    named, numbered = config.get("label2id"), config.get("id2label")
    if isinstance(named, dict) and all(isinstance(one, int) for one in named.values()):
        return {str(name): number for name, number in named.items()}
    if isinstance(numbered, dict) and all(str(one).isdecimal() for one in numbered):
        return {str(name): int(number) for number, name in numbered.items()}
    if task_of(config) == "class":  # configurations leave out what is transformers' default
        count = config.get("num_labels", 2)
        return {f"LABEL_{number}": number for number in range(count if isinstance(count, int) else 2)}
    return {}


def _masked(arrays: Mapping[str, Tensor], tokenizer: Tokenizer, where: str) -> dict[str, Tensor]:
    """Texts with some tokens hidden, drawn by a fixed seed, and these as labels; at least one in each text."""
    if tokenizer.mask is None:
        raise InputError("the tokenizer has no token that hides another", where=tokenizer.where)
    ids = arrays["input_ids"]
    generator = torch.Generator().manual_seed(derived_seed(0, "masked", where and "tokens"))
    chance = torch.rand(ids.shape, generator=generator)
    special = torch.isin(ids, torch.tensor(sorted(tokenizer.special)))
    chance[(arrays["attention_mask"] == 0) | special] = 2.0
    hidden = (chance < MASKED_SHARE) | (chance == chance.min(dim=1, keepdim=True).values)
    hidden &= chance < 2.0
    return {
        "input_ids": ids.masked_fill(hidden, tokenizer.mask),
        LABELS: ids.masked_fill(~hidden, IGNORED),
    }
