"""The files that belong to a model beside its weights, by rule: what is neither weights nor left over from training.

Code counts too: it is carried, never run. ``config.json`` and the model card of the folder itself are not side files:
the one is edited, the other written anew.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from mergekit_px.checkpoint.file_kind import LFS_POINTER, file_kind
from mergekit_px.small_files import leads_out

LARGEST_SIDE_FILE = 200_000_000
"""Bytes. The largest tokenizers have a tenth; what is larger is data or weights under another name."""
_MOST_FILES = 10_000
_LONGEST_POINTER = 1024

WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".keras"),
    *(".msgpack", ".npz", ".distcp", ".tflite", ".mlmodel", ".mlpackage", ".nemo", ".pkl", ".pickle", ".ot"),
)
"""Of weights in any format that models are published in."""

_TOKENIZERS = (
    *("*token*", "*vocab*", "merges*", "bpe.codes", "*.bpe", "*.spm", "*.tiktoken", "*.model", "tekken.json"),
    *("encoder.json", "dict.txt", "normalizer.json", "chat_template*", "special_tokens*", "*sentencepiece*"),
)
_TOKENIZER_FOLDERS = ("additional_chat_templates", "tokenizer*")
# A codec's, which turns no text into tokens; code of models.
_NO_TOKENIZERS = ("audio_tokenizer*", "modeling_*", "configuration_*")

_TRAINING = (
    *("optimizer*", "scheduler.pt", "scheduler.bin", "scaler.pt", "rng_state*", "random_states*", "trainer_state.json"),
    *("training_args*", "trainer_log*", "all_results.json", "train_results.json", "eval_results.json", "zero_to_fp32*"),
    *("training_*.png", "*.log", "events.out.tfevents.*", "latest", "latest_checkpointed_iteration.txt", "*.lock"),
)
_TRAINING_FOLDERS = ("checkpoint-*", "runs", "logs", "wandb", "mlruns", "tensorboard", "lightning_logs", "global_step*")
_OTHER_FOLDERS = (".*", "__pycache__", "__MACOSX", "node_modules", "venv")
_UNFINISHED = ("*.part", "*.incomplete", "*.crdownload", "*.aria2", "*.partial", "*.download")
_OUR_OWN = ("config.json", "README.md", "pxmerge.yaml", "pxmerge.lock.json")

WEIGHTS, OTHER_WEIGHTS = "weights, which are merged", "weights that were not chosen, or of another format"
OTHER_FOLDER = "a folder with weights of its own, which are not merged"
TRAINING, HIDDEN = "left over from training", "hidden, or of a tool"
_EXPECTED = (WEIGHTS, OTHER_WEIGHTS, TRAINING, HIDDEN)


@dataclass(frozen=True)
class SideFiles:
    """``carried``: names relative to the folder, sorted. ``left_behind``: file, or folder with a slash -> why."""

    carried: tuple[str, ...] = ()
    left_behind: Mapping[str, str] = field(default_factory=dict)

    @property
    def unexpected(self) -> dict[str, str]:
        """What was left behind for a reason that its owner should hear of."""
        return {name: reason for name, reason in self.left_behind.items() if reason not in _EXPECTED}


def is_tokenizer_file(name: str) -> bool:
    """Whether a side file decides which text becomes which token; one donor gives all of them."""
    path = PurePosixPath(name.lower())
    if _like(path.name, _NO_TOKENIZERS):
        return False
    return _like(path.name, _TOKENIZERS) or any(_like(part, _TOKENIZER_FOLDERS) for part in path.parts[:-1])


def is_weights(name: str) -> bool:
    """Whether a file is weights, or an index of weights, by its name."""
    lowered = name.lower().removesuffix(".index.json")
    return lowered.endswith(WEIGHT_SUFFIXES) or ".ckpt.data-" in lowered or lowered.endswith(".ckpt.index")


def sort_files(sizes: Mapping[str, int], weights: Collection[str] = (), parts: Collection[str] = ()) -> SideFiles:
    """Decide about the files of a folder or a repository by their names and sizes.

    Args:
        sizes: of all files, by names relative to the folder, with forward slashes.
        weights: those that are merged.
        parts: the folders whose weights are merged; other folders with weights are models of their own.
    """
    others = _folders_of_other_weights(sizes, parts)
    # Of a model whose weights are all in folders, nothing is edited in the folder that holds them.
    own = _OUR_OWN[1:] if parts and "" not in parts else _OUR_OWN
    carried: list[str] = []
    left: dict[str, str] = {}
    for name, size in sizes.items():
        place, reason = _reason(name, size, others)
        if name in weights:
            left[name] = WEIGHTS
        elif reason is not None:
            left.setdefault(place, reason)
        elif name not in own:
            carried.append(name)
    return SideFiles(tuple(sorted(carried)), dict(sorted(left.items())))


def _folders_of_other_weights(names: Iterable[str], parts: Collection[str]) -> set[str]:
    found = set()
    for name in names:
        first, slash, _ = name.partition("/")
        if slash and is_weights(name) and not any(name.startswith(f"{part}/") for part in parts if part):
            found.add(first)
    # A folder that holds a part holds more than other weights.
    return {folder for folder in found if not any(part.split("/")[0] == folder for part in parts)}


def _reason(name: str, size: int, others: Collection[str]) -> tuple[str, str | None]:
    """Where a name is left behind (a folder of it, with a slash, or itself), and why; None if it is carried."""
    *folders, base = name.split("/")
    for depth, folder in enumerate(folders, 1):
        place = "/".join(folders[:depth]) + "/"
        if (reason := _reason_of_folder(folder)) is not None:
            return place, reason
        if depth == 1 and folder in others:
            return place, OTHER_FOLDER
    if _like(base, _TRAINING):
        return name, TRAINING
    if base.startswith("."):
        return name, HIDDEN
    if is_weights(base):
        return name, OTHER_WEIGHTS
    if _like(base.lower(), _UNFINISHED):
        return name, "an unfinished download"
    if size > LARGEST_SIDE_FILE:
        return name, f"{size / 1e6:,.0f} MB of unknown kind"
    return name, None


def _reason_of_folder(folder: str) -> str | None:
    if _like(folder, _TRAINING_FOLDERS):
        return TRAINING
    return HIDDEN if _like(folder, _OTHER_FOLDERS) else None


def _like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def side_files(directory: Path, weights: Collection[str] = (), parts: Collection[str] = ()) -> SideFiles:
    """Decide about the files of a folder on this machine; see ``sort_files``.

    Links are followed within the folder and into the cache of the Hub, nowhere else: what a stranger's folder
    points at is not the stranger's. Of a folder with very many files only those directly in it are looked at.
    """
    sizes: dict[str, int] = {}
    refused: dict[str, str] = {}
    for name in _walk(directory):
        if name.endswith("/"):
            refused[name] = _reason_of_folder(name.rstrip("/").rpartition("/")[2]) or "a link to a folder"
            continue
        path = directory / name
        try:
            target = path.resolve(strict=True)
            if name not in weights and leads_out(path, directory):
                refused[name] = "a link that leaves the folder"
                continue
            if not target.is_file():
                continue
            sizes[name] = target.stat().st_size
        except (OSError, RuntimeError):
            refused[name] = "a link to nothing, or unreadable"
            continue
        if len(sizes) > _MOST_FILES:
            sizes = {each: size for each, size in sizes.items() if "/" not in each}
            refused["*/"] = f"more than {_MOST_FILES:,} files; only those directly in the folder are taken"
            break
    found = sort_files(sizes, weights, parts)
    pointers = {
        name: LFS_POINTER.name
        for name in found.carried
        if sizes[name] < _LONGEST_POINTER and file_kind(directory / name) == LFS_POINTER
    }
    carried = tuple(name for name in found.carried if name not in pointers)
    return SideFiles(carried, dict(sorted({**found.left_behind, **refused, **pointers}.items())))


def _walk(directory: Path) -> Iterator[str]:
    """Names of files, those directly in the folder first; folders that are not looked into, with a slash."""
    waiting = [""]
    while waiting:
        prefix = waiting.pop(0)
        try:
            entries = sorted(os.scandir(directory / prefix), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            if not entry.is_dir():
                yield prefix + entry.name
            elif entry.is_symlink() or _reason_of_folder(entry.name) is not None:
                yield f"{prefix}{entry.name}/"
            else:
                waiting.append(f"{prefix}{entry.name}/")
