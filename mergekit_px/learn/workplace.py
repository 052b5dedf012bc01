"""The place that a learner writes into: its files are put in place together, what an unfinished run keeps is beside.

<state>/stage/       the files of the result, until all of them get their names
<state>/learned/     what an unfinished run goes on from
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mergekit_px.checkpoint.destination import (
    DIRECTORY_LOCK,
    FILE_SUFFIX,
    JOURNAL_FILE,
    PART_SUFFIX,
    PUBLISHING_FILE,
    STAGE_FOLDER,
    Destination,
    Mode,
    cannot_use,
    check_mode,
    destination,
    published_names,
    recorded_files,
    require_folder,
)
from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.journal import Journal, read_head
from mergekit_px.checkpoint.lock import DirectoryLock
from mergekit_px.checkpoint.publish import PublishedFile, folder_lock, put_in_place
from mergekit_px.errors import OutputError, WriteError

_LEARNED = "learned"


@dataclass
class Workplace:
    """An output that is being learned.

    Attributes:
        stage: where the files of the result are written.
        work: for what an unfinished run goes on from.
        begins_anew: an unfinished run was to be gone on with, and there was none.
    """

    output: Path
    place: Destination
    replaces: tuple[str, ...]
    begins_anew: bool = False
    published: bool = False

    @property
    def stage(self) -> Path:
        return self.place.state / STAGE_FOLDER

    @property
    def work(self) -> Path:
        return self.place.state / _LEARNED

    def staged(self) -> list[str]:
        """The files of the result, what says that it is complete last."""
        files = (path for path in self.stage.rglob("*") if path.is_file() and path.suffix != PART_SUFFIX)
        names = {path.relative_to(self.stage).as_posix() for path in files} - {self.place.lock_file}
        return sorted(names, key=lambda name: (name.endswith(".json"), name))

    def publish(self) -> None:
        """Give all files their names, an older output's removed first, and the lock file that lists them last.

        Raises:
            WriteError: the disk refuses.
        """
        try:
            names = self.staged()
            own = [name for name in names if self.place.file in (None, name)]
            files = {name: _published(self.stage / name) for name in own}
            (self.stage / self.place.lock_file).write_bytes(folder_lock(files))
            names.append(self.place.lock_file)
            put_in_place(self.output, {name: self.stage / name for name in names}, self.replaces)
        except OSError as error:
            raise WriteError(f"the disk refused: {error.strerror or error}", where=str(self.output)) from error
        self.published = True

    def begin(self, identity: str) -> None:
        """A new run; what an earlier one kept is gone. Raises ``OSError``."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self.stage, ignore_errors=True)
        Journal.create(self.place.state / JOURNAL_FILE, identity, replaces=sorted(self.replaces)).close()

    def withdraw(self) -> None:
        """Undo a publication that was cut short. Raises ``OSError``."""
        for name in published_names(self.output):
            final, staged = self.place.folder / name, self.stage / name
            if final.exists() and not staged.exists():
                staged.parent.mkdir(parents=True, exist_ok=True)
                final.replace(staged)
        (self.place.state / PUBLISHING_FILE).unlink(missing_ok=True)

    def kept(self) -> bool:
        """Whether there is anything that a run could go on from, or that only the state knows of."""
        work = (path for path in self.work.rglob("*") if path.is_file() and path.suffix != PART_SUFFIX)
        return bool(published_names(self.output)) or any(work)

    def discard(self) -> None:
        """Forget the run; the journal first, so that none is seen without its files. Raises ``OSError``."""
        (self.place.state / JOURNAL_FILE).unlink(missing_ok=True)
        (self.place.state / PUBLISHING_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self.stage, ignore_errors=True)


@contextmanager
def workplace(output: Path, mode: Mode, identity: str, *, is_file: bool, continues: bool) -> Iterator[Workplace]:
    """The locked place of a run; without anything to go on with, it leaves no trace.

    Args:
        is_file: the output is one .safetensors file, and what belongs beside it.
        continues: a finished output may be gone on with.

    Raises:
        OutputError: the output is not free, or holds an unfinished run of another plan.
        OutputLockedError: another process works there.
    """
    place = _place(output, is_file=is_file)
    if continues and (output / place.lock_file).exists() and not place.state.exists():
        if mode == "new":
            hint = "go on with --resume, or start over with --overwrite"
            raise OutputError("a finished run is there", where=str(output), hint=hint)
        mode = "overwrite"
    made = not place.folder.exists()
    try:
        if not place.state.exists():
            check_mode(output, mode, identity)  # before a lock leaves a trace in somebody's folder
        place.folder.mkdir(parents=True, exist_ok=True)
        lock = DirectoryLock.take(place.state / DIRECTORY_LOCK, str(output))
    except OSError as error:
        raise cannot_use(output, error) from error
    found = Workplace(output, place, ())
    try:
        try:
            unfinished = check_mode(output, mode, identity)
            if unfinished is None:
                if mode == "overwrite":
                    found.replaces = _older(output, place)
                found.begins_anew = mode == "resume"
                found.begin(identity)
            else:
                found.replaces = unfinished.replaces
                found.withdraw()
            found.stage.mkdir(parents=True, exist_ok=True)
            found.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_use(output, error) from error
        yield found
    finally:
        with suppress(OSError):
            if found.published or not found.kept():
                found.discard()
        lock.release(remove=not (place.state / JOURNAL_FILE).exists())
        for folder in (place.state, *((place.folder,) if made else ())):
            with suppress(OSError):  # not empty
                folder.rmdir()


def _place(output: Path, *, is_file: bool) -> Destination:
    if not is_file:
        require_folder(output)
    elif output.suffix != FILE_SUFFIX or output.is_dir():
        what = "it is a folder" if output.is_dir() else f"it is written as {FILE_SUFFIX}"
        raise OutputError(what, where=str(output), hint=f"name a file that ends in {FILE_SUFFIX}")
    return destination(output)


def _older(output: Path, place: Destination) -> tuple[str, ...]:
    """What a finished output, or a run that was killed while it published, left under final names."""
    older: tuple[str, ...] = ()
    with suppress(OutputError):
        head = read_head(place.state / JOURNAL_FILE)
        older = head.replaces if head is not None else ()
    return tuple(dict.fromkeys([*recorded_files(output), *published_names(output), *older]))


def _published(path: Path) -> PublishedFile:
    return PublishedFile(path.stat().st_size, file_sha256(path, remember=False))
