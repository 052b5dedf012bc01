"""One merge by the jobs of an array: each writes some of the output's files, and the last step puts them in place.

<output>/.pxmerge/array/3-of-8/    what job 3 wrote: an output of its own, with its journal and its lock file

Which files are whose follows from the plan alone. The first job writes what lies beside the weights too.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_px.checkpoint.destination import (
    DIRECTORY_LOCK,
    LOCK_FILE,
    RECIPE_FILE,
    STAGE_FOLDER,
    STATE_FOLDER,
    Mode,
    check_mode,
    check_replaceable,
    output_state,
    published_names,
    recorded_files,
    recorded_lock,
    require_folder,
)
from mergekit_px.checkpoint.index import is_inside
from mergekit_px.checkpoint.layout import OutputLayout
from mergekit_px.checkpoint.lock import DirectoryLock
from mergekit_px.checkpoint.publish import PublishedFile, SideFile, put_in_place
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.replacement import replacement
from mergekit_px.checkpoint.writer import CheckpointWriter
from mergekit_px.errors import InputError, OutputError, UsageError, WriteError
from mergekit_px.execute.events import Report, RunResult
from mergekit_px.execute.provenance import CARD_FILE, InputHashes, card, lock_file
from mergekit_px.execute.run import (
    Reporter,
    bytes_read,
    execute,
    fetch_inputs,
    peak_memory,
    plan_checkpoints,
    settled_files,
)
from mergekit_px.execute.warnings import gathered_warnings
from mergekit_px.plan.model import Plan
from mergekit_px.plan.texts import recipe_text

if TYPE_CHECKING:
    import torch

_FOLDER = "array"
_PART = re.compile(r"(\d+)-of-(\d+)")


def parse_part(text: str) -> tuple[int, int]:
    """``3/8`` as two numbers. Raises ``UsageError``."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(f"--part: '{text[:40]}' is no part", hint="write 3/8 for the third of eight")
    return number, count


def partition(layout: OutputLayout, count: int) -> list[list[str]]:
    """The files of each part, in order; about equally many bytes. Some have none where there are few files."""
    shares: list[list[str]] = [[] for _ in range(count)]
    done = 0
    for shard in layout.shards:
        # By where the middle of the file lies; the first file is always the first part's.
        shares[min(count - 1, (2 * done + shard.size) * count // (2 * layout.size)) if done else 0].append(shard.file)
        done += shard.size
    return shares


def run_part(
    plan: Plan,
    number: int,
    count: int,
    *,
    progress: Report | None = None,
    fresh: bool = True,
    totals: Sequence[Sequence[torch.Tensor]] | None = None,
) -> RunResult | None:
    """Write the files of one part, or go on with it; None where it has none. The plan is that of the whole merge.

    Args:
        fresh: whether ``mode="overwrite"`` begins the part anew too, and not only replaces an older output.
        totals: of the sweeps over the whole model, where they are known; else they are made here.

    Raises what :func:`run_plan` raises.
    """
    if plan.output is None:
        raise UsageError("a merge in memory has no parts")
    if plan.store is not None:
        raise UsageError(
            "the parts of an array are put together in a folder", where=plan.store, hint="give a folder with -o"
        )
    require_folder(plan.output)
    overwrite = plan.options.mode == "overwrite"
    check_mode(plan.output, "overwrite" if overwrite else "new", plan.hash)
    shares = partition(plan.layout, count)
    if not shares[number - 1]:
        return None
    folder = array_folder(plan.output) / f"{number}-of-{count}"
    finished = recorded_lock(folder)
    anew = overwrite and fresh
    if finished and not anew:
        if finished.get("plan_hash") != plan.hash:
            raise OutputError(
                f"part {number} of {count} there is of another plan: the recipe, the inputs or the options changed",
                where=str(plan.output),
                hint="start over with --overwrite",
            )
        files = {name: entry["sha256"] for name, entry in finished["files"].items()}
        return RunResult(folder, files, 0, 0, 0, peak_memory(), plan.notes, up_to_date=True)
    plan = fetch_inputs(plan, progress)
    layout = _layout_of(plan.layout, shares[number - 1])
    busy = [place for place, share in enumerate(shares, 1) if share]
    own = replace(plan, items=tuple(item for item in plan.items if item.tensors[0].name in layout.location))
    reporter = Reporter([own], progress)
    with ExitStack() as stack:
        readers = {
            label: stack.enter_context(closing(open_reader(checkpoint)))
            for label, checkpoint in plan_checkpoints(plan).items()
        }
        mode: Mode = "overwrite" if anew else "resume"
        writer = stack.enter_context(
            CheckpointWriter(folder, layout, plan.hash, mode=mode, direct=plan.budget.past_cache)
        )
        hashes = InputHashes(
            plan.inputs,
            local=plan.options.hash_inputs,
            records={writer.inputs_file: writer.finished_bytes > 0},
            bytes_read=partial(bytes_read, readers),
            share=(1 + busy.index(number), len(busy)),
        )
        stack.callback(hashes.stop)
        beside: dict[str, SideFile] = contents_beside(plan) if number == 1 else {}

        def lock(published: Mapping[str, PublishedFile]) -> bytes:
            document = json.loads(lock_file(plan, hashes.result(), published))
            return json.dumps({**document, "parts": shares}).encode()

        beside[LOCK_FILE] = lock
        warnings = stack.enter_context(gathered_warnings())
        execute(plan, readers, writer, partial(reporter.advance, 0), items=own.items, totals=totals)
        reporter.phase("publishing")
        published = writer.publish(beside)
    reporter.phase("done")
    return RunResult(
        output=folder,
        files={name: file.sha256 for name, file in published.files.items()},
        seconds=reporter.seconds,
        bytes_read=own.bytes_read,
        bytes_written=sum(shard.size for shard in layout.shards),
        peak_memory=peak_memory(),
        notes=plan.notes,
        warnings=warnings.lines(),
    )


def array_folder(output: Path) -> Path:
    """Where the parts of an output are."""
    return output / STATE_FOLDER / _FOLDER


def part_counts(output: Path) -> list[int]:
    """Of how many parts those are that lie there; several where they do not fit together."""
    home = array_folder(output)
    found = [match for path in (home.iterdir() if home.is_dir() else ()) if (match := _PART.fullmatch(path.name))]
    return sorted({int(match[2]) for match in found})


def publish_parts(output: Path, *, overwrite: bool = False) -> list[str]:
    """Put the files of all parts in place, once all are there; the names of the output's files.

    Raises:
        InputError: there are no parts.
        OutputError: parts are missing, or are not of one merge; the output holds something else.
    """
    home = array_folder(output)
    where = str(output)
    counts = part_counts(output)
    if not counts:
        raise InputError("no parts of a merge are there", where=where, hint="make them by pxmerge run --part 1/8")
    if len(counts) > 1:
        raise OutputError(
            f"parts of {' and of '.join(map(str, counts))} are there, which do not fit together",
            where=where,
            hint=f"remove those that are not meant from {home}",
        )
    count = counts[0]
    locks = {number: recorded_lock(home / f"{number}-of-{count}") for number in range(1, count + 1)}
    locks = {number: lock for number, lock in locks.items() if isinstance(lock.get("parts"), list)}
    shares = next(iter(locks.values()))["parts"] if locks else [[""]] * count
    missing = [str(number) for number, share in enumerate(shares, 1) if share and number not in locks]
    if missing:
        plural = len(missing) > 1
        raise OutputError(
            f"part{'s' if plural else ''} {', '.join(missing)} of {count} {'are' if plural else 'is'} not finished",
            where=where,
            hint=f"run them as the others were, with --part {missing[0]}/{count}",
        )
    check_alike(locks, where)
    if not overwrite and output_state(output).occupied and not published_names(output):
        raise OutputError("the output folder is not empty", where=where, hint="allow it with --overwrite")
    if overwrite:
        check_replaceable(output)
    try:
        lock_held = DirectoryLock.take(output / STATE_FOLDER / DIRECTORY_LOCK, where)
        try:
            return _put_together(output, home, count, locks)
        finally:
            lock_held.release(remove=True)
    except OSError as error:
        raise WriteError(f"the disk refused: {error.strerror or error}", where=where) from error


def joint_lock(locks: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, tuple[int, Any]]]:
    """The lock file of the whole from those of its parts; each file of the output, with its part and its entry."""
    first = locks[1]
    shards = {file for share in first["parts"] for file in share}
    listed: dict[str, tuple[int, Any]] = {}
    for number in locks:
        listed |= {name: (number, entry) for name, entry in locks[number]["files"].items() if name in shards}
    listed |= {name: (1, entry) for name, entry in first["files"].items() if name not in shards}
    document = {key: value for key, value in first.items() if key != "parts"}
    document["inputs"] = _with_hashes(document["inputs"], [lock["inputs"] for lock in locks.values()])
    document["files"] = {name: entry for name, (_, entry) in listed.items()}
    return document, listed


def _put_together(output: Path, home: Path, count: int, locks: Mapping[int, Mapping[str, Any]]) -> list[str]:
    document, listed = joint_lock(locks)
    staged: dict[str, Path] = {}
    for name, (number, entry) in listed.items():
        source = home / f"{number}-of-{count}" / name
        if not is_inside(name) or (source.exists() and source.stat().st_size != entry["size"]):
            raise OutputError(f"{name} of part {number} is not as it was written", where=str(output))
        if source.exists():
            staged[name] = source
        elif not (output / name).exists():  # a publication that was cut short has moved it
            raise OutputError(f"{name} of part {number} is gone", where=str(output), hint="run that part again")
    stage = output / STATE_FOLDER / STAGE_FOLDER / LOCK_FILE
    with replacement(stage) as file:
        file.write((json.dumps(document, indent=2) + "\n").encode())
    replaces = [] if published_names(output) else recorded_files(output)
    put_in_place(output, {**staged, LOCK_FILE: stage}, replaces)
    shutil.rmtree(output / STATE_FOLDER / STAGE_FOLDER, ignore_errors=True)
    shutil.rmtree(home, ignore_errors=True)
    (output / STATE_FOLDER / "publishing").unlink(missing_ok=True)
    return [*listed, LOCK_FILE]


def check_alike(locks: Mapping[int, Mapping[str, Any]], where: str) -> None:
    """Raise ``OutputError`` for parts of another plan, or made with other versions."""
    first, reference = next(iter(locks.items()))
    for number, lock in locks.items():
        for key, what in (("plan_hash", "another plan"), ("versions", "other versions")):
            if lock.get(key) != reference.get(key):
                raise OutputError(
                    f"part {number} was made with {what} than part {first}",
                    where=where,
                    hint=f"run part {number} again with --overwrite",
                )


def _with_hashes(inputs: Any, others: Sequence[Any]) -> Any:
    """The inputs of a lock file, where each hash that some part has computed is filled in."""
    if isinstance(inputs, dict):
        return {key: _with_hashes(value, [other[key] for other in others]) for key, value in inputs.items()}
    if isinstance(inputs, list):
        return [_with_hashes(value, [other[place] for other in others]) for place, value in enumerate(inputs)]
    return next((other for other in others if other is not None), None)


def _layout_of(layout: OutputLayout, files: Sequence[str]) -> OutputLayout:
    places = [place for place, shard in enumerate(layout.shards) if shard.file in files]
    renumbered = {place: number for number, place in enumerate(places)}
    location = {
        name: (renumbered[place], offset, nbytes)
        for name, (place, offset, nbytes) in layout.location.items()
        if place in renumbered
    }
    return OutputLayout(tuple(layout.shards[place] for place in places), {}, location)


def contents_beside(plan: Plan) -> dict[str, SideFile]:
    """What lies beside the weights of an output, but for its lock file."""
    return {
        **settled_files(plan),
        CARD_FILE: card(plan),
        RECIPE_FILE: recipe_text(plan.published),
        **plan.layout.indices,
    }
