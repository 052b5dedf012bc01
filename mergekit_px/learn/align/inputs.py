"""What an alignment reads: the checkpoints, what the result depends on, and hashes of all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.task_vector import base_fingerprint
from mergekit_px.errors import UsageError
from mergekit_px.learn.align.reuse import SOURCE_KEY, TARGET_KEY, find_map_file
from mergekit_px.learn.align.settings import AlignOptions
from mergekit_px.learn.data_files import data_sha256
from mergekit_px.learn.models import find_checkpoint
from mergekit_px.learn.sources import find_source, source_fingerprint, stored_source

_HASH_VERSION = 1


def find_checkpoints(options: AlignOptions) -> dict[str, Checkpoint]:
    """The inputs by their part in the matter. Raises ``UsageError`` where they do not make a task vector."""
    if (options.source_model is None) == (options.task_vector is None):
        raise UsageError("either a source model or a task vector is transported", hint="give one of them")
    matched = options.maps is None and options.settings.route in ("theseus", "permutation")
    needs_base = options.source_model is not None or matched
    if needs_base and options.source_base is None:
        raise UsageError("the source base is needed: the model that the fine-tune began with")
    named = {
        "target base": options.target_base,
        "source base": options.source_base,
        "source model": options.source_model,
        "task vector": options.task_vector,
    }
    found = {
        part: find_checkpoint(reference, allow_pickle=options.allow_pickle)
        for part, reference in named.items()
        if reference is not None and part != "source model"
    }
    if options.source_model is not None:
        base = found["source base"]
        found["source model"] = find_source(options.source_model, base, allow_pickle=options.allow_pickle)
    return found


def fingerprints(checkpoints: Mapping[str, Checkpoint]) -> dict[str, str]:
    """By the part of each checkpoint in the matter."""
    return {part: source_fingerprint(checkpoint) for part, checkpoint in checkpoints.items()}


def artefact_metadata(checkpoints: Mapping[str, Checkpoint], prints: Mapping[str, str]) -> dict[str, str]:
    """Which bases matrices or permutations are for; the source is left out where nothing tells it."""
    vector = checkpoints.get("task vector")
    source = prints.get("source base") or (base_fingerprint(vector) if vector is not None else None)
    return {TARGET_KEY: prints["target base"], **({SOURCE_KEY: source} if source is not None else {})}


def plan_hash(options: AlignOptions, prints: Mapping[str, str], device: torch.device) -> str:
    """Names all that the result depends on, so that a run goes on only with the same."""
    document = {
        "version": _HASH_VERSION,
        "settings": asdict(options.settings),
        "models": dict(prints),
        "text": asdict(options.text),
        "files": _file_hashes(options),
        "device": device.type,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _file_hashes(options: AlignOptions) -> dict[str, str]:
    """sha256 of the data, of what is used again and of the code that makes the models."""
    code = [one.rpartition(":")[0] for one in (options.model, options.source_code) if one is not None]
    maps = None if options.maps is None else str(find_map_file(options.maps))
    named = [*code, *(one for one in (options.data, options.test_data, maps) if one is not None)]
    return {path: data_sha256(path) for path in sorted(named) if Path(path).expanduser().exists()}


def input_hashes(options: AlignOptions, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """sha256 of every file that was read, by input."""
    found: dict[str, Any] = {"files": _file_hashes(options)}
    for part, checkpoint in checkpoints.items():
        hashes, stored = {}, stored_source(checkpoint)
        if stored.directory is not None:
            hashes = {file: file_sha256(stored.directory / file) for file in stored.files}
        found[part] = {"reference": checkpoint.label, "files": hashes}
    return found
