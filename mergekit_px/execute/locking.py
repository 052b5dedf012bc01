"""Locks: what the inputs of a plan are, by commit and by hash, and whether they still are that."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergekit_px._version import __version__
from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.replacement import replacement
from mergekit_px.execute.events import Progress, Report
from mergekit_px.hub.repository import ResolvedRepo
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.lock import Lock, Sha256, locked_artefacts, locked_inputs, parse_lock, sha256_but_of_weights
from mergekit_px.plan.model import Plan
from mergekit_px.plan.options import PlanOptions
from mergekit_px.recipe.loaded import LoadedRecipe


def lock_entries(plan: Plan, sha256: Sha256) -> dict[str, Any]:
    """The part of a lock file that is about how a result is made: inputs, artefacts, versions, the plan's hash."""
    inputs = locked_inputs(plan.inputs, sha256, plan.lock)
    return {
        "pxmerge_lock": 1,
        "plan_hash": plan.hash,
        "seed": plan.seed,
        "inputs": {name: entry.model_dump() for name, entry in inputs.items()},
        "artefacts": {name: entry.model_dump() for name, entry in locked_artefacts(plan.artefacts).items()},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what computes a result."""
    return {
        "pxmerge": __version__,
        "torch": version("torch"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
    }


def lock_recipe(
    loaded: LoadedRecipe, path: Path, before: Lock | None, upgrade: Sequence[str], *, allow_pickle: bool = False
) -> Lock:
    """Write the lock of a recipe. Files of this machine are read whole, and small ones of the Hub fetched.

    Args:
        before: the lock that was there.
        upgrade: the inputs that may move; all, if empty.

    Raises:
        RecipeError, InputError, PlanError: the recipe cannot be planned, or an input moved that may not.
        WriteError: the disk refuses.
    """
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"lock": None}))
    kept = before.freed(upgrade) if before is not None and upgrade else None
    plan = build_plan(loaded, PlanOptions(allow_pickle=allow_pickle, lock=kept, mode="overwrite"))
    document = lock_entries(plan, _any_sha256)
    made = parse_lock(document, path)
    if kept is not None:
        kept.check(plan.inputs, plan.artefacts, _any_sha256)
    with replacement(path) as file:
        file.write((json.dumps(document, indent=2) + "\n").encode())
    return made


def check_locked(plan: Plan, progress: Report | None = None) -> None:
    """Hold the inputs' files on this machine against the lock of a plan, if it has one.

    Raises ``InputError`` naming what moved.
    """
    if plan.lock is None:
        return

    def sha256(label: str, checkpoint: Checkpoint, name: str, repo: ResolvedRepo | None) -> str | None:
        if repo is not None:  # the run compares with what the Hub lists, as it reads
            return sha256_but_of_weights(label, checkpoint, name, repo)
        if progress is not None:
            progress(Progress(f"checking {name} of {label.partition('#')[0]}", 0, 0, 0, len(plan.items), label))
        return _any_sha256(label, checkpoint, name, repo)

    plan.lock.check(plan.inputs, plan.artefacts, sha256)


def _any_sha256(label: str, checkpoint: Checkpoint, name: str, repo: ResolvedRepo | None) -> str | None:
    listed = sha256_but_of_weights(label, checkpoint, name, repo)
    if listed is not None:
        return listed
    if checkpoint.directory is not None:
        file = checkpoint.files.get(name)
        return file_sha256(checkpoint.directory / name, expected=None if file is None else file.identity)
    if repo is None:
        return None
    from mergekit_px.hub.files import download

    return file_sha256(download(repo, name))
