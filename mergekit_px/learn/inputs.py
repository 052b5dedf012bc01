"""What a learner reads, by the fields of its settings that name it: opened once, and hashed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.errors import InputNotFoundError
from mergekit_px.learn.data_files import data_sha256
from mergekit_px.learn.declare import Input, InputRecord, RunSettings
from mergekit_px.learn.sources import find_source, source_fingerprint, stored_source
from mergekit_px.plan.inputs import fetch_checkpoint


@dataclass
class Inputs:
    """Attributes:
    checkpoints: those that a field names, in its order.
    records: what a report says of them; hashes of the files of models are added by `finished`.
    """

    checkpoints: dict[str, list[Checkpoint]] = field(default_factory=dict)
    records: dict[str, list[InputRecord]] = field(default_factory=dict)

    def prints(self) -> dict[str, list[str | None]]:
        """What names the content of each input, wherever it lies."""
        return {name: [one.fingerprint or one.sha256 for one in records] for name, records in self.records.items()}

    def places(self) -> list[Path]:
        """Files and folders of this machine that are read."""
        stored = [stored_source(one).directory for group in self.checkpoints.values() for one in group]
        named = [Path(one.reference).expanduser() for group in self.records.values() for one in group]
        return [*(place for place in stored if place is not None), *(place for place in named if place.exists())]

    def finished(self) -> dict[str, list[InputRecord]]:
        """The records with the sha256 of every file of the models."""
        for name, checkpoints in self.checkpoints.items():
            for record, checkpoint in zip(self.records[name], checkpoints, strict=True):
                stored = stored_source(checkpoint)
                if stored.directory is not None:
                    record.files = {file: file_sha256(stored.directory / file) for file in stored.files}
        return self.records


def open_inputs(settings: RunSettings) -> Inputs:
    """Open what settings name, by headers, models before their sources.

    Raises:
        InputError: missing, unreachable or malformed.
        AdapterError: a source that is an adapter of another model.
    """
    inputs = Inputs()
    marks = settings.marked(Input)
    for name, mark in sorted(marks.items(), key=lambda item: item[1].kind == "source"):
        references = _references(getattr(settings, name))
        if mark.kind in ("model", "source"):
            found = []
            for reference in references:
                base = inputs.checkpoints.get(mark.of, [None])[0] if mark.kind == "source" else None
                allow = settings.allow_pickle
                found.append(
                    fetch_checkpoint(reference, allow_pickle=allow)
                    if base is None
                    else find_source(reference, base, allow_pickle=allow)
                )
            inputs.checkpoints[name] = found
            prints = [source_fingerprint(one) for one in found]
            inputs.records[name] = [
                InputRecord(reference=reference, fingerprint=one)
                for reference, one in zip(references, prints, strict=True)
            ]
        else:
            inputs.records[name] = [file_record(reference, mark.kind) for reference in references]
    return inputs


def _references(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [one for one in value if isinstance(one, str)] if isinstance(value, (list, tuple)) else []


def file_record(reference: str, kind: str) -> InputRecord:
    """Of data, code or another file. Code that is missing is found out where it is run."""
    if kind == "code":
        file = Path(reference.rpartition(":")[0]).expanduser()
        return InputRecord(reference=reference, sha256=file_sha256(file) if file.is_file() else None)
    place = Path(reference).expanduser()
    if not place.exists():
        what = "no such data file" if kind == "data" else "no such file"
        raise InputNotFoundError(what, where=reference)
    if kind == "data":
        return InputRecord(reference=reference, sha256=data_sha256(reference))
    if place.is_file():
        return InputRecord(reference=reference, sha256=file_sha256(place))
    inside = (one for one in place.rglob("*") if one.is_file()) if kind == "tasks" else place.glob("*.safetensors")
    files = {one.relative_to(place).as_posix(): file_sha256(one) for one in sorted(inside)}
    return InputRecord(reference=reference, sha256=" ".join(files.values()), files=files)
