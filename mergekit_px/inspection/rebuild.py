"""Whether a merge gives the same bytes when it is done again from its recipe and its lock file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_px.checkpoint.destination import RECIPE_FILE, Destination, destination
from mergekit_px.errors import InputNotFoundError
from mergekit_px.execute.events import Report
from mergekit_px.execute.locking import versions
from mergekit_px.execute.provenance import CARD_FILE
from mergekit_px.execute.run import run_plan
from mergekit_px.inspection.verify import read_lock
from mergekit_px.plan.build import build_plan
from mergekit_px.plan.lock import parse_lock
from mergekit_px.plan.method_catalog import method_catalog
from mergekit_px.plan.model import Plan
from mergekit_px.plan.options import PlanOptions
from mergekit_px.recipe.load import load_recipe, parse_recipe
from mergekit_px.recipe.loaded import LoadedRecipe


@dataclass(frozen=True)
class Rebuilt:
    """File names by whether merging again gave the same bytes, and what may be the reason where it did not."""

    matching: tuple[str, ...]
    different: tuple[str, ...]
    notes: tuple[str, ...] = ()


def rebuild(directory: Path, *, allow_pickle: bool = False, progress: Report | None = None) -> Rebuilt:
    """Merge again into a temporary folder, and compare with what the lock file lists, but for the card.

    Raises:
        InputNotFoundError: no lock file, or no recipe.
        InputError: an input is gone, or is not what was locked.
        PlanError, RecipeError, RunError: as the merge itself.
    """
    place = destination(directory)
    document = read_lock(directory)
    with tempfile.TemporaryDirectory(prefix="pxmerge-") as folder:
        output = Path(folder) / (place.file or "merged")
        made = run_plan(plan_again(directory, output, allow_pickle=allow_pickle), progress=progress).files
    before = {name: entry["sha256"] for name, entry in document["files"].items()}
    names = [name for name in dict.fromkeys((*before, *made)) if name not in (CARD_FILE, place.lock_file)]
    different = tuple(name for name in names if before.get(name) != made.get(name))
    return Rebuilt(
        matching=tuple(name for name in names if name not in different),
        different=different,
        notes=tuple(_other_versions(document.get("versions"))),
    )


def plan_again(directory: Path, output: Path, *, allow_pickle: bool = False) -> Plan:
    """The plan of a finished merge, from its recipe and its lock file, for an output elsewhere.

    Raises as :func:`rebuild` does.
    """
    place = destination(directory)
    document = read_lock(directory)
    allowed = document.get("options")
    granted = allowed if isinstance(allowed, dict) else {}
    options = PlanOptions(
        output=output,
        allow_pickle=allow_pickle,
        allow_nonfinite=granted.get("allow_nonfinite") is True,
        allow_base_mismatch=granted.get("allow_base_mismatch") is True,
        require_room=output != directory,
        lock=parse_lock(document, place.folder / place.lock_file),
    )
    return build_plan(_recipe(place, document), options)


def _recipe(place: Destination, document: Mapping[str, Any]) -> LoadedRecipe:
    methods = method_catalog()
    if place.file is not None and isinstance(text := document.get("recipe"), str):
        path = place.folder / place.lock_file
        return parse_recipe(text, name=f"recipe in {path}", methods=methods, path=path)
    path = place.folder / RECIPE_FILE
    if place.file is not None or not path.is_file():
        raise InputNotFoundError(
            "there is no recipe to merge again from",
            where=str(path if place.file is None else place.folder / place.lock_file),
            hint="`pxmerge pull` brings it with a model that was pushed",
        )
    return load_recipe(path, methods=methods)


def _other_versions(before: object) -> list[str]:
    now = versions()
    then = before if isinstance(before, dict) else {}
    other = [f"{name} {then[name]} (here {now[name]})" for name in now if name in then and then[name] != now[name]]
    return [f"it was merged with {', '.join(other)}"] if other else []
