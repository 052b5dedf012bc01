"""Whether an output folder holds the result of a plan already."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from mergekit_px._version import __version__
from mergekit_px.checkpoint.destination import destination, output_state, recorded_lock
from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.publish import SideFile
from mergekit_px.errors import InputError
from mergekit_px.plan.model import Plan


def claims_result(plan: Plan) -> bool:
    """Whether the lock file of the output names the plan; its inputs and files may have changed since."""
    return plan.output is not None and recorded_lock(plan.output).get("plan_hash") == plan.hash


def finished_files(plan: Plan, side_files: Mapping[str, SideFile]) -> dict[str, str] | None:
    """The files of the output, by sha256, if they are what this plan would give from the inputs as they are now.

    Every byte counts: the hashes of inputs, of what is copied or written beside the weights, and of the output's own
    files are those of the lock file. Hashes that were computed before of files that did not change are remembered.
    """
    if plan.output is None or output_state(plan.output).unfinished is not None:
        return None
    lock = recorded_lock(plan.output)
    try:
        if lock["plan_hash"] != plan.hash or lock["versions"]["pxmerge"] != __version__:
            return None
        for name, source in plan.inputs.items():
            entry = lock["inputs"][name]
            checkpoints = [(source.checkpoint, entry["files"])]
            checkpoints += [
                (adapter.checkpoint, listed["files"])
                for adapter, listed in zip(source.adapters, entry["adapters"], strict=True)
            ]
            for checkpoint, files in checkpoints:
                for file in checkpoint.files.values():
                    path = (checkpoint.directory or Path()) / file.name
                    if files[file.name]["sha256"] != file_sha256(path, expected=file.identity):
                        return None
        listed = {name: str(entry["sha256"]) for name, entry in lock["files"].items()}
        for name, content in side_files.items():
            if not callable(content) and listed[name] != _sha256(content):
                return None
        if any(file_sha256(destination(plan.output).folder / name) != sha256 for name, sha256 in listed.items()):
            return None
    except (InputError, LookupError, TypeError, ValueError, AttributeError):
        return None  # a file that is gone, or a lock file of another make
    return listed


def _sha256(content: bytes | Path) -> str:
    return file_sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
