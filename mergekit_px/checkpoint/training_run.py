"""The checkpoints of one training run, in order of step: which folders they are, and of which step each is.

The step is what the trainer recorded (``trainer_state.json``), else the number in the name. Names that trainers give to
what they are still writing are skipped, and said. No weights are opened here.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from mergekit_px.checkpoint.distributed import METADATA_FILE, MODEL_PLACES, distributed_place
from mergekit_px.checkpoint.index import LARGEST_INDEX
from mergekit_px.checkpoint.json_text import parse_object, read_object, shown
from mergekit_px.checkpoint.object_store import ObjectStore, store_scheme
from mergekit_px.checkpoint.selection import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX, select_weights
from mergekit_px.errors import InputError, InputNotFoundError

TRAINER_STATE = "trainer_state.json"
_MAGIC = re.compile(r"[*?[]")
# What trainers, download tools and copies call a folder until it is whole.
_TEMPORARY = re.compile(
    r"(^|[-_.])(tmp|temp|temporary|incomplete|partial|part|staging|writing)($|[-_.\d])", re.IGNORECASE
)
# Of HF Trainer, OLMo, torchtitan, DeepSpeed, Megatron, Lightning and nanotron, which calls a folder by the number.
_STEP = re.compile(r"(?:step|iter(?:ation)?)s?[-_=]?(\d+)", re.IGNORECASE)
_CHECKPOINT = re.compile(r"(?:^|[^a-z])(?:checkpoint|ckpt|epoch|global)|step|iter|^\d+$", re.IGNORECASE)
_MOST_NAMED = 4
_FEWEST_FOR_SPACING = 3


@dataclass(frozen=True)
class RunCheckpoint:
    """``reference``: as a recipe names it. ``step``: None where neither trainer nor name tells."""

    reference: str
    step: int | None


@dataclass(frozen=True)
class TrainingRun:
    """``checkpoints``: by step. ``notes``: what was skipped, and why."""

    checkpoints: tuple[RunCheckpoint, ...]
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self.checkpoints if checkpoint.step is not None]


def is_pattern(reference: str) -> bool:
    """Whether a reference stands for all that matches it; a name that is there is that name."""
    return _MAGIC.search(reference) is not None and "://" not in reference and not os.path.lexists(reference)


def training_run(references: Sequence[str]) -> TrainingRun:
    """The checkpoints that a folder of checkpoints, a pattern, or a list of folders stands for.

    Raises:
        InputError: there are none, two are of one step, or the step of some cannot be told.
    """
    where = references[0] if len(references) == 1 else f"{references[0]}, ..."
    notes: list[str] = []
    candidates = [name for reference in references for name in _candidates(reference, len(references) > 1, notes)]
    if not candidates:
        told = f"; {notes[0]}" if notes else ""
        raise InputNotFoundError(
            f"no checkpoints of a training run are there{told}",
            where=where,
            hint="give the folder that holds the checkpoints, a pattern such as 'run/checkpoint-*', or their names",
        )
    checkpoints = [RunCheckpoint(name, _step(name)) for name in candidates]
    unknown = [checkpoint.reference for checkpoint in checkpoints if checkpoint.step is None]
    if unknown and (len(unknown) < len(checkpoints) or len(references) == 1) and len(checkpoints) > 1:
        raise InputError(
            f"its step cannot be told: it has no {TRAINER_STATE} and no number in its name",
            where=unknown[0],
            hint="rename it, or leave it out",
        )
    if unknown:
        if len(checkpoints) > 1:
            notes.append("no checkpoint tells its step; they are taken in the order given")
        return TrainingRun(tuple(checkpoints), tuple(notes))
    checkpoints.sort(key=lambda checkpoint: checkpoint.step or 0)
    _refuse_doubles(checkpoints, where)
    return TrainingRun(tuple(checkpoints), tuple(notes))


def check_spacing(steps: Sequence[int], where: str) -> None:
    """Refuse steps that lie at one distance but for a hole in it. A last one that lies nearer is no hole.

    Raises:
        InputError: a step is missing.
    """
    if len(steps) < _FEWEST_FOR_SPACING:
        return
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    usual, count = Counter(gaps).most_common(1)[0]
    if count == 1:
        if len(gaps) > 2 or gaps[-1] == min(gaps):
            return  # at no one distance, or with a last one that the end of the training made
        usual = min(gaps)
    missing = [
        earlier + usual * number
        for earlier, gap in zip(steps, gaps, strict=False)
        if gap > usual and gap % usual == 0
        for number in range(1, gap // usual)
    ]
    if missing:
        named = ", ".join(map(str, missing[:_MOST_NAMED])) + (", ..." if len(missing) > _MOST_NAMED else "")
        raise InputError(
            f"checkpoints lie {usual} steps apart, and {'step' if len(missing) == 1 else 'steps'} {named}"
            f" {'is' if len(missing) == 1 else 'are'} missing",
            where=where,
            hint="name the checkpoints one by one to average those that are there",
        )


def _candidates(reference: str, one_of_several: bool, notes: list[str]) -> Iterator[str]:
    if is_pattern(reference):
        pattern = Path(reference).expanduser()
        matches = Path(pattern.anchor or ".").glob(str(pattern.relative_to(pattern.anchor)))
        yield from _whole(sorted(map(str, matches)), notes)
        return
    if store_scheme(reference) is not None:
        yield from [reference] if one_of_several else _in_store(reference, notes)
        return
    path = Path(reference).expanduser()
    if not path.exists():
        raise InputNotFoundError("no such file or folder", where=reference, hint="check the path")
    if one_of_several or path.is_file():
        if _TEMPORARY.search(path.name):
            notes.append(f"{reference} is skipped: by its name it is still being written")
        else:
            yield reference
        return
    try:
        inside = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=reference) from error
    kept = [
        str(Path(reference) / name)
        for name in inside
        if (path / name).is_dir() and (_CHECKPOINT.search(name) or (path / name / TRAINER_STATE).is_file())
    ]
    prefix = "./" if reference.startswith("./") else ""
    yield from _whole([name if name.startswith(("/", ".", "~")) else prefix + name for name in kept], notes)


def _in_store(reference: str, notes: list[str]) -> Iterator[str]:
    """The checkpoints in a place of a store, by the names of the objects there; the place itself where it is one."""
    store = ObjectStore(reference)
    objects = store.list(depth=2)
    if _are_weights([*objects]):
        yield store.address
        return
    folders: dict[str, list[str]] = {}
    for object_name in objects:
        folder, slash, name = object_name.partition("/")
        if slash:
            folders.setdefault(folder, []).append(name)
    for folder, names in folders.items():
        if not _CHECKPOINT.search(folder) and TRAINER_STATE not in names:
            continue
        if _TEMPORARY.search(folder):
            notes.append(f"{store.where(folder)} is skipped: by its name it is still being written")
        elif not _are_weights(names):
            notes.append(f"{store.where(folder)} is skipped: it holds no weights (yet)")
        else:
            yield store.where(folder)


def _are_weights(names: Sequence[str]) -> bool:
    """Whether objects, by their names in a folder, are those of a checkpoint; ``""`` is the folder itself."""
    distributed = any(place + METADATA_FILE in names for place in MODEL_PLACES)
    return names == [""] or distributed or select_weights(name for name in names if "/" not in name) is not None


def _whole(names: Iterable[str], notes: list[str]) -> Iterator[str]:
    """Those that may hold a whole checkpoint; the others are told."""
    for name in names:
        path = Path(name).expanduser()
        if _TEMPORARY.search(path.name):
            notes.append(f"{name} is skipped: by its name it is still being written")
        elif path.is_dir():
            if holds_weights(path):
                yield name
            else:
                notes.append(f"{name} is skipped: it holds no weights (yet)")
        elif path.name.endswith((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)):
            yield name


def holds_weights(folder: Path) -> bool:
    """Whether a folder has files of weights, whole or not."""
    try:
        names = [entry.name for entry in folder.iterdir()]
        return select_weights(names) is not None or distributed_place(folder, names) is not None
    except OSError:
        return False


def _step(reference: str) -> int | None:
    step = _recorded(reference).get("global_step")
    if isinstance(step, int) and not isinstance(step, bool) and step >= 0:
        return step
    name = Path(reference).name
    for suffix in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES):
        name = name.removesuffix(suffix)
    words = _STEP.findall(name) or re.findall(r"\d+", name)
    return int(words[-1]) if words else None


def _recorded(reference: str) -> Mapping[str, object]:
    """What the trainer noted beside a checkpoint, if it did."""
    if store_scheme(reference) is not None:
        store = ObjectStore(reference)
        try:
            size = min(store.status(TRAINER_STATE).size, LARGEST_INDEX)
        except InputNotFoundError:
            return {}
        return parse_object(store.read(TRAINER_STATE, 0, size), store.where(TRAINER_STATE), strict=False)
    path = Path(reference).expanduser() / TRAINER_STATE
    return read_object(path, str(path), strict=False, limit=LARGEST_INDEX) if path.is_file() else {}


def _refuse_doubles(checkpoints: Sequence[RunCheckpoint], where: str) -> None:
    for earlier, later in pairwise(checkpoints):
        if earlier.step == later.step:
            raise InputError(
                f"two checkpoints are of step {later.step}: {shown(earlier.reference)} and {shown(later.reference)}",
                where=where,
                hint="leave one of them out",
            )
