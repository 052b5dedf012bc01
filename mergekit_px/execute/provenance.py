"""The lock file and the model card: what was merged, from which bytes, by which versions."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_px._version import __version__
from mergekit_px.checkpoint.contents import Checkpoint, CheckpointFile
from mergekit_px.checkpoint.destination import destination
from mergekit_px.checkpoint.hashing import HashingStopped, file_sha256
from mergekit_px.checkpoint.held import Held, Taken
from mergekit_px.checkpoint.index import LARGEST_INDEX
from mergekit_px.checkpoint.json_text import read_object
from mergekit_px.checkpoint.publish import PublishedFile
from mergekit_px.checkpoint.ranged import address_of, check_unchanged, is_remote
from mergekit_px.checkpoint.replacement import replacement
from mergekit_px.errors import InputError
from mergekit_px.execute.locking import lock_entries
from mergekit_px.hub.card import CardArtefact, CardInput, CardMethod, model_card
from mergekit_px.hub.files import not_as_listed
from mergekit_px.hub.repository import ResolvedRepo
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.model import Plan
from mergekit_px.plan.texts import recipe_text

if TYPE_CHECKING:
    from mergekit_px.methods.declare import Method

CARD_FILE = "README.md"

_TOGETHER = 4
"""Files that are hashed at once at most; they wait for the run more than they compute."""

_BEHIND = 4 << 20
_PAUSE = 0.02  # seconds between looks at how far the run has read


class InputHashes:
    """The inputs' files as a run reads them: that they stay what they were, and their sha256, computed beside the run.

    A record is a file in the output's folder of an unfinished run. A run that goes on from it does so only over
    files that are the same as then: by what the system says of them, or else by their bytes.

    Args:
        inputs: opened, and on this machine.
        local: whether files that the Hub lists no hash for are hashed.
        records: where to note them -> whether the record of an earlier run must be there.
        bytes_read: of a file (its label and name), as far as the run has come; hashing follows, so that it finds the
            bytes in the system's memory and no file is read from the disk twice. None: do not wait.
        share: 3 of 8 hashes every eighth file, from the third on; the rest is for others.
        held: what the run reads past the page cache, by label and file; None where it reads through it.

    Raises:
        InputError: an input is not what the unfinished run began with.
    """

    def __init__(
        self,
        inputs: Mapping[str, ResolvedInput],
        *,
        local: bool,
        records: Mapping[Path, bool],
        bytes_read: Callable[[str, str], int | None] = lambda label, name: None,
        share: tuple[int, int] = (1, 1),
        held: Held | None = None,
    ) -> None:
        self._files = {
            (label, file.name): _Input(checkpoint, file, listed.get(file.name))
            for label, checkpoint, listed in _checkpoints(inputs)
            for file in checkpoint.files.values()
        }
        self._checkpoints = [checkpoint for _, checkpoint, _ in _checkpoints(inputs)]
        self._local = local
        self._records = tuple(records)
        self._bytes_read = bytes_read
        self._share = share
        self._held = held
        self._hashes: dict[tuple[str, str], str | None] = dict.fromkeys(self._files)
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._stopping = threading.Event()
        self._alone = threading.Event()
        """Set when the run has read all that it reads."""
        for record, resumed in records.items():
            if resumed:
                self._compare(_read_record(record))
        self._note()
        first, step = share
        wanted = [key for number, key in enumerate(self._files, step + 1 - first) if number % step == 0]
        self._queue = deque(sorted(wanted, key=self._place_in_checkpoint))
        self._threads = [
            threading.Thread(target=self._work, name=f"pxmerge-input-hashes-{number}", daemon=True)
            for number in range(max(1, min(_TOGETHER, len(self._queue))))
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Give up; what is missing stays unknown."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def result(self) -> Mapping[tuple[str, str], str | None]:
        """(input or ``input#number`` of its adapter, file) -> hex sha256, or None where it was not asked for.

        Raises:
            InputError: an input changed while it was read, or is not what the Hub lists; what reading raised.
        """
        self._alone.set()
        for thread in self._threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        check_unchanged(self._checkpoints)
        return self._hashes

    def _place_in_checkpoint(self, key: tuple[str, str]) -> tuple[bool, int]:
        """Files of several inputs are read side by side, so they are hashed so; those in stores wait for the end."""
        file = self._files[key]
        return is_remote(file.path), list(file.checkpoint.files).index(key[1])

    def _work(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    key = self._queue.popleft()
                except IndexError:
                    return
                file = self._files[key]
                if file.listed is not None or self._local:
                    # What is in a store is hashed as the run reads it: read beside it, it would come over twice.
                    while is_remote(file.path) and not (self._stopping.is_set() or self._alone.is_set()):
                        self._alone.wait(_PAUSE)
                    digest = self._sha256(key)
                    with self._lock:
                        self._hashes[key] = digest
                        self._note()
        except HashingStopped:
            pass
        except BaseException as error:
            self._failure = error

    def _sha256(self, key: tuple[str, str]) -> str:
        file, stopped = self._files[key], partial(self._is_stopped, key)
        if self._held is None:
            return file.sha256(stopped)
        self._held.follow(key)
        try:
            return file.sha256(stopped, partial(self._held.take, key))
        finally:
            self._held.leave(key)

    def _is_stopped(self, key: tuple[str, str], hashed: int) -> bool:
        """Whether to give up, after waiting until the run has read more of the file."""
        while not (self._stopping.is_set() or self._alone.is_set()):
            if self._held is not None and self._held.is_due(key, hashed):
                break
            read = self._bytes_read(*key)
            if read is None or hashed + _BEHIND <= read:
                break
            self._alone.wait(_PAUSE)
        return self._stopping.is_set()

    def _note(self) -> None:
        record = {
            f"{label}/{name}": {"identity": file.described.identity, "sha256": self._hashes.get((label, name))}
            for (label, name), file in self._files.items()
        }
        for path in self._records:
            with replacement(path) as out:
                out.write(json.dumps(record).encode())

    def _compare(self, begun: Mapping[str, Any]) -> None:
        for (label, name), file in self._files.items():
            entry = begun.get(f"{label}/{name}")
            if not isinstance(entry, dict) or file.described.identity is None:
                raise _other_input(label, name, file.path)
            if entry.get("identity") == list(file.described.identity):
                continue
            # A file that was copied back, or looked at from another machine, may still have the bytes it had.
            if entry.get("sha256") is None or file.sha256(lambda hashed: False) != entry["sha256"]:
                raise _other_input(label, name, file.path)


@dataclass(frozen=True)
class _Input:
    checkpoint: Checkpoint
    described: CheckpointFile
    listed: str | None
    """The sha256 that the Hub lists."""

    @property
    def path(self) -> Path:
        return (self.checkpoint.directory or Path()) / self.described.name

    def sha256(self, stopped: Callable[[int], bool], taken: Taken | None = None) -> str:
        digest = file_sha256(self.path, expected=self.described.identity, stopped=stopped, taken=taken)
        if self.listed is not None and digest != self.listed:
            raise not_as_listed(self.described.name, self.checkpoint.label)
        return digest


def _checkpoints(
    inputs: Mapping[str, ResolvedInput],
) -> Iterator[tuple[str, Checkpoint, Mapping[str, str | None]]]:
    """Name, checkpoint, and the hashes that the Hub lists of its files."""
    for name, source in inputs.items():
        listed = {} if source.repo is None else {file: entry.sha256 for file, entry in source.repo.files.items()}
        yield name, source.checkpoint, listed
        for number, adapter in enumerate(source.adapters):
            yield f"{name}#{number}", adapter.checkpoint, {}


def _read_record(path: Path) -> Mapping[str, Any]:
    try:
        return read_object(path, limit=LARGEST_INDEX)
    except InputError:
        return {}  # nothing is known of the inputs then, so none is the same


def _other_input(label: str, name: str, path: Path) -> InputError:
    return InputError(
        f"'{label}' is not what the unfinished run began with: {name} changed since",
        where=address_of(path),
        hint="start over with --overwrite",
    )


def lock_file(plan: Plan, hashes: Mapping[tuple[str, str], str | None], files: Mapping[str, PublishedFile]) -> bytes:
    """``pxmerge.lock.json``: inputs pinned by commit and file hash, versions, plan hash, every output file."""

    def sha256(label: str, checkpoint: Checkpoint, name: str, repo: ResolvedRepo | None) -> str | None:
        if name in checkpoint.files or checkpoint.directory is None:
            return hashes.get((label, name))
        return file_sha256(checkpoint.directory / name) if plan.options.hash_inputs else None

    document = {
        **lock_entries(plan, sha256),
        "options": {
            "allow_nonfinite": plan.options.allow_nonfinite,
            "allow_base_mismatch": plan.options.allow_base_mismatch,
        },
        "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in files.items()},
    }
    if plan.output is not None and destination(plan.output).file is not None:
        document["recipe"] = recipe_text(plan.published).decode()  # which has no file of its own there
    return (json.dumps(document, indent=2) + "\n").encode()


def card_inputs(plan: Plan) -> list[CardInput]:
    """What the card tells of the inputs, in the order of the plan."""
    recipe = plan.published.recipe
    bases = {step.get("base") for step in plan.steps.values()}
    weights: dict[str, str] = {}
    for step in recipe.steps.values():
        if isinstance(step.sources, Mapping):
            weights.update({name: str(value) for name, value in step.sources.items() if value is not None})
    return [
        CardInput(
            name=name,
            source=source.source,
            commit=source.repo.commit if source.repo is not None else None,
            weight=weights.get(name),
            license=source.repo.license if source.repo is not None else None,
            is_base=name in bases,
        )
        for name, source in plan.inputs.items()
    ]


def card(plan: Plan) -> bytes:
    """``README.md`` of the output."""
    from mergekit_px.methods import find_method
    from mergekit_px.recipe.dump import dump_recipe

    recipe = plan.published.recipe
    inputs = card_inputs(plan)
    used: dict[str, CardMethod] = {}
    for step_name, step in plan.steps.items():
        method = find_method(step["method"])
        label = method.name if len(plan.steps) == 1 else f"{step_name}: {method.name}"
        used[label] = CardMethod(
            name=label,
            summary=method.summary,
            paper=method.paper,
            parameters=_parameters(method, step),
            meanings={
                name: entry.get("description", "")
                for name, entry in method.params.model_json_schema().get("properties", {}).items()
            },
        )
    title = plan.output.name if plan.output is not None else "merge"
    text = model_card(
        title=title or "merge",
        inputs=inputs,
        methods=list(used.values()),
        artefacts=[CardArtefact(artefact.reference, artefact.kind, artefact.sha256) for artefact in plan.artefacts],
        recipe=dump_recipe(recipe),
        lock_hash=plan.hash,
        version=__version__,
        notes=list(plan.notes),
    )
    return text.encode()


def _parameters(method: Method, step: Mapping[str, Any]) -> dict[str, str]:
    """What every parameter of a step's method was, over all tensors that no rule changes it for."""
    given = {**method.presets.get(step.get("like", ""), {}), **step.get("params", {})}
    found: dict[str, str] = {}
    for name, field in method.params.model_fields.items():
        if name in given:
            value = given[name]
            several = isinstance(value, Mapping)
            found[name] = ", ".join(f"{key}: {one}" for key, one in value.items()) if several else str(value)
        elif not field.is_required() and field.default is not None:
            found[name] = f"{field.default} (default)"
    return found
