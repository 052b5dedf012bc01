"""The files that belong to a model beside its weights, copied byte for byte.

Names as the Hub's libraries write them. ``config.json`` is not among them: it is edited, not copied. Neither
are model cards, which speak of the model they came with, nor code (``CODE``), which is carried on request.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path

TOKENIZER_FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "tekken.json",
    "normalizer.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""What decides which text becomes which token; one donor gives all of it."""

OTHER_FILES: tuple[str, ...] = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "*_Pooling/config.json",
    "LICENSE*",
    "NOTICE*",
    "COPYING*",
)

CARRIED: tuple[str, ...] = TOKENIZER_FILES + OTHER_FILES

CODE: tuple[str, ...] = ("*.py",)


def is_side_file(name: str, patterns: tuple[str, ...] = CARRIED) -> bool:
    """Whether ``name`` (relative, forward slashes) is one of the files that travel with the weights."""
    return any(name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def side_files(directory: Path, patterns: tuple[str, ...] = CARRIED) -> tuple[str, ...]:
    """The names of the carried files in a folder, sorted; symlinks to files count."""
    found = {
        path.relative_to(directory).as_posix()
        for pattern in patterns
        for path in directory.glob(pattern)
        if path.is_file()
    }
    return tuple(sorted(found))
