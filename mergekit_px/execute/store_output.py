"""An output in an object store: each file of weights is merged on this machine, uploaded, and removed here.

<address>/.pxmerge/parts/3-of-8.json    what the third file is, of which plan and inputs; a run that broke off goes on
                                        from these
<address>/FILE                          weights as they are finished; side files, index, config and lock file at the end

A file is uploaded while the next is merged, so the disk here holds two files of weights at a time, and the store never
holds a lock file of what is not complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_px.checkpoint.destination import LOCK_FILE, STATE_FOLDER, recorded_lock
from mergekit_px.checkpoint.index import is_inside
from mergekit_px.checkpoint.json_text import parse_object, shown
from mergekit_px.checkpoint.object_store import ObjectStore, StoredObject
from mergekit_px.checkpoint.publish import SideFile, publication_order
from mergekit_px.errors import InputError, InputNotFoundError, OutputError, UsageError, WriteError
from mergekit_px.execute.array import check_alike, contents_beside, joint_lock, partition, run_part
from mergekit_px.execute.events import Progress, Report, RunResult
from mergekit_px.execute.run import peak_memory
from mergekit_px.plan.model import Plan

if TYPE_CHECKING:
    import torch

_PARTS = f"{STATE_FOLDER}/parts"
_BEGUN = f"{STATE_FOLDER}/begun.json"
_NAMED = 3


class StoreOutput:
    """What a plan's place in a store holds, and how its files get there.

    Raises ``InputError`` for a store that does not answer.
    """

    def __init__(self, plan: Plan) -> None:
        assert plan.store is not None
        self._plan = plan
        self._store = ObjectStore(plan.store)
        self.count = len(plan.layout.shards)
        self.shares = partition(plan.layout, self.count)

    def begin(self) -> None:
        """Make the place ready, as the mode of the run asks.

        Raises ``OutputError`` where it holds something else, or may not be written to.
        """
        mode, where = self._plan.options.mode, self._store.address
        there = self._list("")
        begun = self._list(STATE_FOLDER)
        if mode == "new" and begun:
            raise OutputError(
                "an unfinished run is there",
                where=where,
                hint="continue it with --resume or start over with --overwrite",
            )
        if mode == "new" and there:
            raise OutputError(
                "the output is not empty", where=where, hint="choose another or allow it with --overwrite"
            )
        if mode == "resume" and there and not begun:
            raise OutputError(
                "there is no unfinished run to resume, and the output is not empty",
                where=where,
                hint="it may be complete already; --overwrite starts over",
            )
        if mode == "resume" and begun and self._begun() != self._plan.hash:
            raise OutputError(
                "the unfinished run there has another plan: the recipe, the inputs or the options changed since",
                where=where,
                hint="go back to them, or start over with --overwrite",
            )
        if mode != "resume":
            shutil.rmtree(self._plan.output or Path(), ignore_errors=True)
        try:
            if mode == "overwrite":
                self._clear(there)
            self._store.put(_BEGUN, json.dumps({"plan": self._plan.hash}).encode())
        except InputError as error:
            raise OutputError(error.what, where=error.where, hint=error.hint) from error

    def finished(self) -> dict[int, dict[str, Any]]:
        """The parts that are in the store whole: number -> its record."""
        records: dict[int, dict[str, Any]] = {}
        objects = self._list("")
        for number, share in enumerate(self.shares, 1):
            record = self._record(number) if share else None
            if record is None or record["lock"].get("plan_hash") != self._plan.hash:
                continue
            listed = {file: objects.get(file) for file in share if "/" not in file}
            listed |= {file: self._status(file) for file in share if "/" in file}
            if all(found is not None and list(found) == record["objects"].get(file) for file, found in listed.items()):
                records[number] = record
        return records

    def part_plan(self) -> Plan:
        """The plan as its parts are merged on this machine."""
        return replace(self._plan, store=None, options=replace(self._plan.options, mode="new", require_room=False))

    def put(
        self, number: int, progress: Report | None = None, *, totals: Sequence[Sequence[torch.Tensor]] | None = None
    ) -> RunResult | None:
        """Merge one part, and upload it. Raises what ``merge`` and ``upload`` raise."""
        result = self.merge(number, progress, totals=totals)
        if result is not None:
            self.upload(number, result)
        return result

    def merge(
        self, number: int, progress: Report | None = None, *, totals: Sequence[Sequence[torch.Tensor]] | None = None
    ) -> RunResult | None:
        """Make one part on this machine; None where there is nothing in it. Raises what ``run_part`` raises."""
        return run_part(self.part_plan(), number, self.count, progress=progress, totals=totals)

    def upload(self, number: int, part: RunResult) -> None:
        """Bring a part into the store, note that it is there, and remove it here. Raises ``WriteError``."""
        lock = recorded_lock(part.output)
        with self._uploading():
            objects = {file: self._store.put_file(part.output / file, file) for file in self.shares[number - 1]}
            record = {"lock": dict(lock), "objects": objects}
            self._store.put(f"{_PARTS}/{number}-of-{self.count}.json", json.dumps(record).encode())
        shutil.rmtree(part.output, ignore_errors=True)

    def publish(self) -> dict[str, str]:
        """What lies beside the weights, and the lock file last; file -> sha256.

        Raises ``OutputError`` for parts that are missing, ``WriteError``.
        """
        where = self._store.address
        records = self.finished()
        missing = [str(number) for number, share in enumerate(self.shares, 1) if share and number not in records]
        if missing:
            raise OutputError(
                f"the files {', '.join(missing)} of {self.count} are not there", where=where, hint="--resume"
            )
        locks = {number: record["lock"] for number, record in records.items()}
        check_alike(locks, where)
        document, listed = joint_lock(locks)
        contents: dict[str, SideFile] = contents_beside(self._plan)
        contents[LOCK_FILE] = (json.dumps(document, indent=2) + "\n").encode()
        with self._uploading():
            for name in publication_order(contents, (), LOCK_FILE):
                data = _bytes(contents[name])
                if name in listed and hashlib.sha256(data).hexdigest() != listed[name][1]["sha256"]:
                    raise InputError(f"{shown(name)} changed since the run began", where=where, hint="run it again")
                self._store.put(name, data)
            for name in (*(f"{_PARTS}/{number}-of-{self.count}.json" for number in records), _BEGUN):
                self._store.remove(name)
        shutil.rmtree(self._plan.output or Path(), ignore_errors=True)
        return {name: str(entry["sha256"]) for name, (_, entry) in listed.items()}

    def _list(self, folder: str) -> dict[str, StoredObject]:
        try:
            return ObjectStore(f"{self._store.address}/{folder}").list()
        except InputNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise
            return {}

    def _status(self, name: str) -> StoredObject | None:
        try:
            return self._store.status(name)
        except InputNotFoundError:
            return None

    def _small(self, name: str) -> dict[str, Any]:
        status = self._status(name)
        return {} if status is None else parse_object(self._store.read(name, 0, status.size), self._store.where(name))

    def _begun(self) -> object:
        return self._small(_BEGUN).get("plan")

    def _record(self, number: int) -> dict[str, Any] | None:
        record = self._small(f"{_PARTS}/{number}-of-{self.count}.json")
        whole = isinstance(record.get("lock"), dict) and isinstance(record.get("objects"), dict)
        return record if whole else None

    def _clear(self, there: Mapping[str, StoredObject]) -> None:
        """Remove an older output, its lock file first, and refuse a place that holds anything else."""
        own = {LOCK_FILE, *(shard.file for shard in self._plan.layout.shards)}
        files = self._small(LOCK_FILE).get("files")
        own |= {name for name in files if is_inside(name)} if isinstance(files, dict) else set()
        foreign = [name for name in there if name not in own]
        if foreign:
            more = f" and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else ""
            raise OutputError(
                f"--overwrite replaces what its {LOCK_FILE} lists, and the place also holds"
                f" {', '.join(map(shown, foreign[:_NAMED]))}{more}",
                where=self._store.address,
                hint="choose another output, or move them away",
            )
        for name in sorted(there, key=lambda name: name != LOCK_FILE):
            self._store.remove(name)
        for folder in (_PARTS, STATE_FOLDER):
            for name in self._list(folder):
                self._store.remove(f"{folder}/{name}")

    @contextmanager
    def _uploading(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            raise WriteError(error.what, where=error.where, hint="mend that and continue with --resume") from error


def run_to_store(plan: Plan, *, progress: Report | None = None) -> RunResult:
    """Run a plan whose output is in a store; raises what ``run_plan`` raises."""
    if plan.output is None or plan.store is None:
        raise UsageError("a merge in memory has no output folder; use merge_state_dicts")
    started = time.perf_counter()
    output = StoreOutput(plan)
    output.begin()
    there = output.finished()
    total = plan.bytes_written
    before = 0

    def tell(state: Progress) -> None:
        if progress is not None:
            progress(replace(state, bytes_done=before + state.bytes_done, bytes_total=total))

    read = written = 0
    upload: Future[None] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="pxmerge-upload") as uploads:
        for number, share in enumerate(output.shares, 1):
            if share and number not in there:
                result = output.merge(number, tell)
                assert result is not None
                read, written = read + result.bytes_read, written + result.bytes_written
                if upload is not None:  # The disk holds one file that is made and one that is on its way.
                    upload.result()
                upload = uploads.submit(output.upload, number, result)
            before += sum(shard.size for shard in plan.layout.shards if shard.file in share)
        if upload is not None:
            tell(Progress("uploading", 0, 0, 0, 0, ""))
            upload.result()
    files = output.publish()
    return RunResult(plan.output, files, time.perf_counter() - started, read, written, peak_memory(), plan.notes)


def _bytes(content: SideFile) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, Path):
        return content.read_bytes()
    return content({})
