"""The lock file and the model card: what was merged, from which bytes, by which versions."""

from __future__ import annotations

import json
import platform
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mergekit_px._version import __version__
from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.publish import PublishedFile
from mergekit_px.execute.remembered import Remembered
from mergekit_px.hub.card import CardInput, CardMethod, model_card
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.model import Plan

if TYPE_CHECKING:
    from mergekit_px.methods.declare import Method

LOCK_FILE = "pxmerge.lock.json"
RECIPE_FILE = "pxmerge.yaml"
CARD_FILE = "README.md"
_SETTLED = 2.0  # seconds


class InputHashes:
    """sha256 of the input files, computed beside the run.

    Files of the Hub have theirs already, and those of files that did not change since an earlier run (same place,
    size and time) are remembered.
    """

    def __init__(self, inputs: Mapping[str, ResolvedInput], *, local: bool) -> None:
        self._inputs = inputs
        self._local = local
        self._store = Remembered("sha256")
        self._new: dict[str, str] = {}
        self._found: dict[tuple[str, str], str | None] = {}
        self._failure: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="pxmerge-input-hashes", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give up; what is missing stays unknown."""
        self._stopped = True

    def result(self) -> Mapping[tuple[str, str], str | None]:
        """(input, file) -> hex sha256, or None where it was not asked for. Raises what reading raised."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._found

    def _work(self) -> None:
        try:
            for name, source in self._inputs.items():
                for file in source.checkpoint.files:
                    if self._stopped:
                        return
                    self._found[name, file] = self._hash(source, file)
            if self._new:
                self._store.put(self._new)
        except BaseException as error:
            self._failure = error

    def _hash(self, source: ResolvedInput, file: str) -> str | None:
        if source.repo is not None:
            remote = source.repo.files.get(file)
            if remote is not None and remote.sha256 is not None:
                return remote.sha256
        directory = source.checkpoint.directory
        if directory is None or not self._local:
            return None
        path = (directory / file).resolve()
        status = path.stat()
        key = f"{path}:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"
        known = self._new.get(key) or self._store.get(key)
        if known is not None:
            return str(known)
        digest = file_sha256(directory / file)
        # A file that was changed just now could be changed again within the same tick of its clock.
        if time.time() - status.st_mtime > _SETTLED:
            self._new[key] = digest
        return digest


def lock_file(plan: Plan, hashes: Mapping[tuple[str, str], str | None], files: Mapping[str, PublishedFile]) -> bytes:
    """``pxmerge.lock.json``: inputs pinned by commit and file hash, versions, plan hash, every output file."""
    inputs: dict[str, Any] = {}
    for name, source in plan.inputs.items():
        inputs[name] = {
            "reference": source.reference if source.repo is None else source.repo.repo,
            "commit": source.repo.commit if source.repo is not None else None,
            "files": {
                file.name: {
                    "size": file.size,
                    "header_sha256": file.header_sha256,
                    "sha256": hashes.get((name, file.name)),
                }
                for file in source.checkpoint.files.values()
            },
            "adapters": [
                {
                    "reference": adapter.label,
                    "files": {
                        file.name: {"size": file.size, "header_sha256": file.header_sha256}
                        for file in adapter.checkpoint.files.values()
                    },
                }
                for adapter in source.adapters
            ],
            "adapter_options": asdict(source.bind_options) if source.adapters else None,
        }
    document = {
        "pxmerge_lock": 1,
        "plan_hash": plan.hash,
        "seed": plan.seed,
        "inputs": inputs,
        "versions": {
            "pxmerge": __version__,
            "torch": version("torch"),
            "numpy": version("numpy"),
            "python": platform.python_version(),
        },
        "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in files.items()},
    }
    return (json.dumps(document, indent=2) + "\n").encode()


def card(plan: Plan) -> bytes:
    """``README.md`` of the output."""
    from mergekit_px.methods import find_method
    from mergekit_px.recipe.dump import dump_recipe

    recipe = plan.loaded.recipe
    bases = {step.get("base") for step in plan.steps.values()}
    weights: dict[str, str] = {}
    for step in recipe.steps.values():
        if isinstance(step.sources, Mapping):
            weights.update({name: str(value) for name, value in step.sources.items() if value is not None})
    inputs = [
        CardInput(
            name=name,
            source=source.repo.repo if source.repo is not None else source.reference,
            commit=source.repo.commit if source.repo is not None else None,
            weight=weights.get(name),
            license=source.repo.license if source.repo is not None else None,
            is_base=name in bases,
        )
        for name, source in plan.inputs.items()
    ]
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
