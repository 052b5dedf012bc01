"""The inputs that a lock file pins: Hub repositories at their commits, every file by its size and sha256.

A lock is made of a plan's inputs, and a plan is held against a lock: a reference to the Hub means the locked commit,
whatever its branch has become, and files on this machine must be what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_px.checkpoint.contents import CONFIG_FILE, Checkpoint, CheckpointFile
from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.index import LARGEST_INDEX
from mergekit_px.checkpoint.json_text import read_object, shown
from mergekit_px.errors import InputError, InputNotFoundError, MalformedCheckpointError, PlanError
from mergekit_px.hub.reference import parse_reference
from mergekit_px.hub.repository import ResolvedRepo
from mergekit_px.plan.artefacts import Artefact
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.recipe.dump import dump_recipe
from mergekit_px.recipe.loaded import LoadedRecipe
from mergekit_px.recipe.model import ModelInput, Recipe

_DESCRIPTIONS = (CONFIG_FILE, "adapter_config.json")
"""Of a model or an adapter; other files beside the weights are its side files."""
_DEFAULT_BRANCH = "main"
_NAMED = 3  # of the things that moved

Sha256 = Callable[[str, Checkpoint, str, ResolvedRepo | None], str | None]
"""(input, or ``input#number`` of its adapter; its checkpoint; a file; its repository) -> hex, or None if unknown."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class LockedFile(_Entry):
    """A file as it was."""

    size: int
    header_sha256: str | None = None
    sha256: str | None = None


class LockedSource(_Entry):
    """A model or an adapter as it was.

    Attributes:
        reference: the repository, or the path as the recipe wrote it.
        revision: the branch or tag that was asked for.
        commit: what that was; None for files of this machine.
        files: the weights.
        side_files: what lies beside them; a commit pins these without a list. None where nothing is known of them.
    """

    reference: str
    revision: str | None = None
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    files: dict[str, LockedFile]
    side_files: dict[str, LockedFile] | None = None

    def __str__(self) -> str:
        if self.commit is None:
            return f"'{shown(self.reference)}' on this machine"
        return f"{shown(self.reference)} at {self.commit}"


class LockedInput(LockedSource):
    """An input, with the adapters on top of it."""

    adapters: list[LockedSource] = []
    adapter_options: dict[str, Any] | None = None


class LockedArtefact(_Entry):
    """A small file that a parameter names."""

    kind: str
    size: int
    sha256: str


class Lock(_Entry):
    """What a lock file says of the inputs.

    Attributes:
        path: of the file.
        free: inputs that it does not pin, though it lists them.
    """

    pxmerge_lock: Literal[1]
    plan_hash: str
    inputs: dict[str, LockedInput]
    artefacts: dict[str, LockedArtefact] = {}
    path: Path = Field(default=Path(), exclude=True)
    free: frozenset[str] = Field(default=frozenset(), exclude=True)

    def freed(self, names: Iterable[str]) -> Lock:
        """The lock with some inputs left to move."""
        return self.model_copy(update={"free": frozenset(names)})

    def pinned(self, loaded: LoadedRecipe) -> LoadedRecipe:
        """The recipe with every reference to the Hub at the locked commit.

        Raises ``PlanError`` for a reference to something else than was locked.
        """
        models = {name: self._pinned(name, request) for name, request in loaded.recipe.models.items()}
        return rewritten(loaded, loaded.recipe.model_copy(update={"models": models}))

    def pin(self, name: str, reference: str, adapter: int | None = None) -> str:
        """The reference of an input, or of one of its adapters, at the locked commit."""
        locked = self.inputs.get(name)
        hub = parse_reference(reference)
        if locked is None or hub is None or name in self.free:
            return reference
        entry: LockedSource = locked
        if adapter is not None:
            if adapter >= len(locked.adapters):
                raise self._other(f"input '{name}' had {len(locked.adapters)} adapters when it was locked")
            entry = locked.adapters[adapter]
        if entry.commit is None:
            raise self._other(f"input '{name}' is {hub} on the Hub in the recipe, and was {entry} when it was locked")
        if hub.repo != entry.reference:
            raise self._other(f"input '{name}' is {hub} in the recipe, and was {entry} when it was locked")
        if (hub.revision or _DEFAULT_BRANCH) not in (entry.revision or _DEFAULT_BRANCH, entry.commit):
            asked = "" if entry.revision is None else f" ({entry.revision})"
            raise self._other(f"input '{name}' is {hub} in the recipe, and was {entry}{asked} when it was locked")
        return f"{entry.reference}@{entry.commit}"

    def check(
        self,
        inputs: Mapping[str, ResolvedInput],
        artefacts: Iterable[Artefact],
        sha256: Sha256,
    ) -> None:
        """Hold all inputs of a merge against the lock; hashes that are unknown are not compared.

        Raises:
            PlanError: the lock is of other inputs.
            InputError: something moved.
        """
        artefacts = tuple(artefacts)
        references = [artefact.reference for artefact in artefacts]
        for what, known, here in (("input", self.inputs, inputs), ("artefact", self.artefacts, references)):
            if missing := [name for name in here if name not in known]:
                raise self._other(f"it has no {what} {_list(missing)}, which the recipe has")
            if surplus := [name for name in known if name not in here]:
                raise self._other(f"it has the {what} {_list(surplus)}, which the recipe does not use")
        for name in inputs:
            entry = self.inputs[name]
            for source in () if name in self.free else (entry, *entry.adapters):
                if source.commit is None and any(file.sha256 is None for file in source.files.values()):
                    raise InputError(
                        f"it holds no hashes of '{name}', so what moved cannot be told",
                        where=str(self.path),
                        hint="`pxmerge lock` the recipe, or merge without --no-hash-inputs",
                    )
        self.compare(inputs, artefacts, sha256)

    def compare(
        self, inputs: Mapping[str, ResolvedInput], artefacts: Iterable[Artefact] = (), sha256: Sha256 | None = None
    ) -> None:
        """Hold those against the lock that it has. Raises ``InputError`` where something moved."""
        now = locked_inputs(
            {name: source for name, source in inputs.items() if name in self.inputs}, sha256 or sha256_but_of_weights
        )
        files = {name: file for name, file in locked_artefacts(artefacts).items() if name in self.artefacts}
        if moved := self.differences(now, files):
            more = f", and {len(moved) - _NAMED} more" if len(moved) > _NAMED else ""
            raise InputError(
                f"not what was locked: {'; '.join(moved[:_NAMED])}{more}",
                where=str(self.path),
                hint="bring back what it was, or `pxmerge lock` it as it is (--upgrade NAME for one input)",
            )

    def _pinned(self, name: str, request: ModelInput) -> ModelInput:
        model = None if request.model is None else self.pin(name, request.model)
        listed = [request.adapter] if isinstance(request.adapter, str) else request.adapter or []
        adapters = [self.pin(name, reference, number) for number, reference in enumerate(listed)]
        adapter = adapters[0] if isinstance(request.adapter, str) else adapters or request.adapter
        return request.model_copy(update={"model": model, "adapter": adapter})

    def moved_to(self, other: Lock) -> list[str]:
        """What is otherwise in another lock of the same recipe, as sentences without a full stop."""
        both = {name: entry for name, entry in other.inputs.items() if name in self.inputs}
        files = {name: entry for name, entry in other.artefacts.items() if name in self.artefacts}
        came = [f"'{shown(name)}' is new" for name in (*other.inputs, *other.artefacts) if name not in {*both, *files}]
        old = [name for name in (*self.inputs, *self.artefacts) if name not in {*both, *files}]
        went = [f"'{shown(name)}' is not used any more" for name in old]
        return self.freed(()).differences(both, files) + came + went

    def differences(self, inputs: Mapping[str, LockedInput], artefacts: Mapping[str, LockedArtefact]) -> list[str]:
        """What moved of inputs and artefacts that it has, as sentences without a full stop."""
        moved = [
            difference
            for name, entry in inputs.items()
            if name not in self.free
            for difference in self._differences(name, self.inputs[name], entry)
        ]
        changed = [name for name, file in artefacts.items() if file != self.artefacts[name]]
        return moved + [f"the {artefacts[name].kind} {shown(name)} changed" for name in changed]

    def _differences(self, name: str, then: LockedInput, now: LockedInput) -> Iterator[str]:
        if len(then.adapters) != len(now.adapters):
            yield f"'{name}' had {len(then.adapters)} adapters and has {len(now.adapters)}"
            return
        yield from _differences(f"'{name}'", then, now)
        for number, (before, after) in enumerate(zip(then.adapters, now.adapters, strict=True), 1):
            which = f" {number}" if len(then.adapters) > 1 else ""
            yield from _differences(f"adapter{which} of '{name}'", before, after)

    def _other(self, what: str) -> PlanError:
        return PlanError(
            what, where=str(self.path), hint="is it the lock of another recipe? `pxmerge lock` makes it anew"
        )


def read_lock(path: Path) -> Lock:
    """A lock file. Raises ``InputNotFoundError``; ``MalformedCheckpointError`` for a file that is no lock."""
    try:
        document = read_object(path, limit=LARGEST_INDEX)
    except InputNotFoundError:
        raise InputNotFoundError("no such lock file", where=str(path), hint="`pxmerge lock RECIPE` makes it") from None
    return parse_lock(document, path)


def parse_lock(document: Mapping[str, Any], path: Path) -> Lock:
    """What was read of a lock file. Raises ``MalformedCheckpointError``."""
    try:
        known = {
            name: document[name] for name in Lock.model_fields if name in document and name not in ("path", "free")
        }
        return Lock.model_validate({**known, "path": path})
    except ValidationError as error:
        first = error.errors()[0]
        place = shown(".".join(map(str, first["loc"])))
        raise MalformedCheckpointError(f"no lock of a merge: {place}: {first['msg']}", where=str(path)) from None


def recipe_lock(loaded: LoadedRecipe) -> Lock | None:
    """The lock that a recipe names, beside its file. Raises as :func:`read_lock` does."""
    if loaded.recipe.lock is None:
        return None
    beside = Path() if loaded.path is None else loaded.path.parent
    return read_lock(beside / Path(loaded.recipe.lock).expanduser())


def locked_inputs(
    inputs: Mapping[str, ResolvedInput], sha256: Sha256, lock: Lock | None = None
) -> dict[str, LockedInput]:
    """What a lock says of inputs; of a lock that they were pinned by, it keeps which branch was asked for."""
    found: dict[str, LockedInput] = {}
    for name, source in inputs.items():
        known = None if lock is None or name in lock.free else lock.inputs.get(name)
        own = source.repo if not source.adapter_only else source.adapter_repos[0]
        entry = _locked(name, source.reference, source.checkpoint, own, sha256)
        adapters = []
        for number, (adapter, repo) in enumerate(zip(source.adapters, source.adapter_repos, strict=True)):
            before = None if known is None else known.adapters[number]
            adapters.append(
                _asked(_locked(f"{name}#{number}", adapter.label, adapter.checkpoint, repo, sha256), before)
            )
        found[name] = LockedInput(
            **dict(_asked(entry, known)),
            adapters=adapters,
            adapter_options=asdict(source.bind_options) if source.adapters else None,
        )
    return found


def locked_artefacts(artefacts: Iterable[Artefact]) -> dict[str, LockedArtefact]:
    """What a lock says of the small files that parameters name."""
    return {
        artefact.reference: LockedArtefact(kind=artefact.kind, size=artefact.size, sha256=artefact.sha256)
        for artefact in artefacts
    }


def sha256_but_of_weights(label: str, checkpoint: Checkpoint, name: str, repo: ResolvedRepo | None) -> str | None:
    """What the Hub lists, and the hashes of small files; of weights of this machine nothing is known unread."""
    if repo is not None:
        return repo.files[name].sha256 if name in repo.files else None
    if name in checkpoint.files or checkpoint.directory is None:
        return None
    return file_sha256(checkpoint.directory / name)


def published_recipe(loaded: LoadedRecipe, completed: Recipe, inputs: Mapping[str, ResolvedInput]) -> LoadedRecipe:
    """The recipe that goes with the result: what is on the Hub at its commit, and nothing left to a card to name."""
    given = loaded.recipe
    if any(name not in given.models for name in inputs):
        given = completed
    models = dict(given.models)
    for name, source in inputs.items():
        request = models[name]
        if source.adapter_only and request.adapter is None:
            models[name] = request.model_copy(update={"model": _at_commit(request.model, source.adapter_repos[0])})
            continue
        adapter: Any = request.adapter
        if isinstance(adapter, str):
            adapter = _at_commit(adapter, source.adapter_repos[0])
        elif adapter is not None:
            adapter = [_at_commit(*each) for each in zip(adapter, source.adapter_repos, strict=True)]
        model = _at_commit(request.model, source.repo)
        models[name] = request.model_copy(update={"model": model, "adapter": adapter})
    if not any(source.repo or any(source.adapter_repos) for source in inputs.values()):
        models = dict(loaded.recipe.models)
        given = loaded.recipe
    return rewritten(loaded, given.model_copy(update={"models": models, "lock": None}))


def _at_commit(reference: str | None, repo: ResolvedRepo | None) -> str | None:
    return reference if repo is None else f"{repo.repo}@{repo.commit}"


def rewritten(loaded: LoadedRecipe, recipe: Recipe) -> LoadedRecipe:
    """A loaded recipe that was changed: its text is written anew, under the comments that it began with."""
    if recipe == loaded.recipe:
        return loaded
    comments: list[str] = []
    for line in loaded.source.splitlines():
        if not line.startswith("#"):
            break
        comments.append(f"{line}\n")
    return replace(loaded, recipe=recipe, source="".join(comments) + dump_recipe(recipe), dialect="pxmerge")


def _locked(
    label: str, reference: str, checkpoint: Checkpoint, repo: ResolvedRepo | None, sha256: Sha256
) -> LockedSource:
    def weights(file: CheckpointFile) -> LockedFile:
        digest = sha256(label, checkpoint, file.name, repo)
        return LockedFile(size=file.size, header_sha256=file.header_sha256, sha256=digest)

    files = {file.name: weights(file) for file in checkpoint.files.values()}
    if repo is not None:
        return LockedSource(reference=repo.repo, revision=repo.revision, commit=repo.commit, files=files)
    beside: dict[str, LockedFile] = {}
    if checkpoint.directory is not None:
        for name in dict.fromkeys((*_DESCRIPTIONS, *checkpoint.side_files)):
            path = checkpoint.directory / name
            if path.is_file():
                digest = sha256(label, checkpoint, name, None)
                beside[name] = LockedFile(size=path.stat().st_size, sha256=digest)
    return LockedSource(reference=reference, files=files, side_files=beside)


def _asked(entry: LockedSource, before: LockedSource | None) -> LockedSource:
    return (
        entry
        if before is None or before.commit != entry.commit
        else entry.model_copy(update={"revision": before.revision})
    )


def _differences(name: str, then: LockedSource, now: LockedSource) -> Iterator[str]:
    """What became of a source, as sentences without a full stop."""
    if then.commit != now.commit:
        yield f"{name} was {then} and is {now}"
        return
    for before, after in ((then.files, now.files), (then.side_files, now.side_files)):
        if before is None or after is None:
            continue
        for file, entry in before.items():
            if file not in after:
                yield f"{shown(file)} of {name} is gone"
            elif entry.size != after[file].size:
                yield f"{shown(file)} of {name} had {entry.size:,} bytes and has {after[file].size:,}"
            elif _unequal(entry.header_sha256, after[file].header_sha256) or _unequal(entry.sha256, after[file].sha256):
                yield f"{shown(file)} of {name} changed"
        yield from (f"{shown(file)} of {name} is new" for file in after if file not in before)


def _unequal(then: str | None, now: str | None) -> bool:
    return then is not None and now is not None and then != now


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"'{shown(name)}'" for name in names)
