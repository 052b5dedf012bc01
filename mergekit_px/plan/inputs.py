"""From model references to opened checkpoints: local folders by their headers, Hub repositories pinned to a commit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mergekit_px.adapters.binder import BindOptions
from mergekit_px.checkpoint.open import Checkpoint, component_folder, open_checkpoint
from mergekit_px.checkpoint.ranged import exists, names_in, place_of
from mergekit_px.checkpoint.reader import MemoryReader, TensorReader, open_reader
from mergekit_px.checkpoint.selection import ADAPTER_FILE, Selection, select_weights
from mergekit_px.checkpoint.task_vector import base_fingerprint, is_task_vector
from mergekit_px.errors import InputError, InputNotFoundError, RecipeError
from mergekit_px.hub.reference import parse_reference
from mergekit_px.recipe.model import ModelInput
from mergekit_px.small_files import read_small_file

if TYPE_CHECKING:
    from mergekit_px.adapters.adapter import Adapter
    from mergekit_px.hub.fetch import Progress
    from mergekit_px.hub.resolve import ResolvedRepo

_MODEL_FILES = ("model.", "model-", "pytorch_model.", "pytorch_model-")
"""What the weights of a full model are called where an adapter lies beside them."""


@dataclass(frozen=True)
class ResolvedInput:
    """One input of a recipe, with its headers read and nothing else.

    ``repo`` is None for local files; for Hub inputs that are not on this machine yet ``checkpoint.directory`` is None.
    """

    name: str
    reference: str
    checkpoint: Checkpoint
    repo: ResolvedRepo | None = None
    state: Mapping[str, Any] | None = None
    """The tensors themselves, for merges in memory."""
    adapters: tuple[Adapter, ...] = ()
    """Adapters on top of the model, applied in order."""
    adapter_repos: tuple[ResolvedRepo | None, ...] = ()
    """Where each of them is on the Hub."""
    adapter_only: bool = False
    """The input is an adapter without a model: ``checkpoint`` holds its own tensors, and ``adapters`` is it."""
    bind_options: BindOptions = field(default_factory=BindOptions)
    """What the recipe says of its adapters."""
    notes: tuple[str, ...] = ()
    """What was settled that could have been meant otherwise."""

    @property
    def source(self) -> str:
        """The repository on the Hub without its revision, or the reference to a path."""
        repo = self.repo if not self.adapter_only else self.adapter_repos[0]
        return self.reference if repo is None else repo.repo

    @cached_property
    def is_task_vector(self) -> bool:
        return self.adapter_only or is_task_vector(self.checkpoint)

    @property
    def base_fingerprint(self) -> str | None:
        return base_fingerprint(self.checkpoint)

    @property
    def config(self) -> Mapping[str, Any] | None:
        return self.checkpoint.config

    def open_reader(self) -> TensorReader:
        """What reads its tensors: from memory, or from its files. Raises ``InputError`` where they are elsewhere."""
        return MemoryReader(self.state) if self.state is not None else open_reader(self.checkpoint)

    def identity(self) -> Any:
        """What must be equal for two plans to be of the same inputs."""
        files = [[file.name, file.size, file.header_sha256] for file in self.checkpoint.files.values()]
        adapters = [
            [json.dumps(dict(adapter.config.values), sort_keys=True, default=str), file_identity(adapter.checkpoint)]
            for adapter in self.adapters
        ]
        return {
            "commit": self.repo.commit if self.repo else None,
            "files": files,
            "adapters": adapters,
            "bind_options": asdict(self.bind_options),
        }

    def declared_bases(self) -> tuple[str, ...]:
        """The base models that the input's own card names."""
        if self.adapter_only:
            name = self.adapters[0].base_model_name
            return (name,) if name else ()
        if self.repo is not None:
            return self.repo.base_models
        directory = self.checkpoint.directory
        return _card_bases(directory / "README.md") if directory is not None else ()


def open_input(reference: str, *, allow_pickle: bool = False) -> ResolvedInput:
    """A model by its headers: a folder, a file, or a Hub repository, of which nothing else is downloaded.

    Raises:
        InputError: missing, unreachable or malformed.
    """
    hub_reference = parse_reference(reference)
    if hub_reference is None:
        return ResolvedInput(reference, reference, open_checkpoint(reference, allow_pickle=allow_pickle))
    from mergekit_px.hub.resolve import remote_checkpoint, resolve

    repo = resolve(hub_reference)
    return ResolvedInput(reference, reference, remote_checkpoint(repo), repo)


def fetch_input(
    source: ResolvedInput, progress: Progress | None = None, *, verify_cached: bool = True
) -> ResolvedInput:
    """The same model with its bytes on this machine.

    Args:
        progress: gets bytes done and bytes in all.
        verify_cached: see `mergekit_px.hub.fetch.fetch`.

    Raises:
        InputError: the Hub says no, or cannot be reached.
    """
    if source.repo is None or source.checkpoint.directory is not None:
        return source
    from mergekit_px.hub.fetch import fetch

    folder = fetch(source.repo, progress=progress, verify_cached=verify_cached)
    return replace(source, checkpoint=open_checkpoint(folder, label=source.reference))


def fetch_checkpoint(reference: str, *, allow_pickle: bool = False, progress: Progress | None = None) -> Checkpoint:
    """A model with its bytes on this machine. Raises ``InputError``."""
    place, _ = fetch_reference(reference, allow_pickle=allow_pickle, progress=progress)
    return open_checkpoint(place, label=reference, allow_pickle=allow_pickle)


def fetch_adapter(reference: str, *, allow_pickle: bool = False) -> tuple[Adapter, ResolvedRepo | None]:
    """An adapter, which is small and fetched whole, and its repository where it is on the Hub.

    Raises:
        InputError: missing, unreachable or malformed; AdapterError among them.
    """
    from mergekit_px.adapters.open import open_adapter

    place, repo = fetch_reference(reference, allow_pickle=allow_pickle)
    return open_adapter(place_of(str(place), whole=True), label=reference, allow_pickle=allow_pickle), repo


def fetch_reference(
    reference: str, *, allow_pickle: bool = False, progress: Progress | None = None
) -> tuple[str | Path, ResolvedRepo | None]:
    """What is on the Hub as a folder of this machine, with its repository; all else as it was written."""
    hub_reference = parse_reference(reference)
    if hub_reference is None:
        return reference, None
    from mergekit_px.hub.fetch import fetch
    from mergekit_px.hub.resolve import resolve

    repo = resolve(hub_reference)
    return fetch(repo, allow_pickle=allow_pickle, progress=progress), repo


def resolve_input(name: str, request: ModelInput, *, allow_pickle: bool, where: str) -> ResolvedInput:
    """Open one input: a path on this machine, or a Hub repository pinned to a commit.

    Raises:
        InputError: missing, unreachable or malformed; ``where`` goes in front.
        RecipeError: options of adapters where there is none.
    """
    request, component = _of_component(request)
    options = BindOptions(**{choice.name: getattr(request, choice.name) for choice in fields(BindOptions)})
    listed = [request.adapter] if isinstance(request.adapter, str) else request.adapter or []
    if request.model is None or (not listed and is_adapter(request.model, allow_pickle)):
        if request.model is not None:
            listed = [request.model]
        if len(listed) != 1:
            raise RecipeError(f"input '{name}' needs a model, or exactly one adapter", where=where)
        return _adapter_input(name, listed[0], allow_pickle, where, options)
    hub_reference = parse_reference(request.model)
    about_adapters = options if hub_reference is None and not component else replace(options, component=None)
    if not listed and about_adapters != BindOptions():
        given = next(choice.name for choice in fields(options) if getattr(options, choice.name) != choice.default)
        raise RecipeError(
            f"'{given}' is about adapters, and input '{name}' has none", where=where, hint="name one with 'adapter'"
        )
    if listed and is_adapter(request.model, allow_pickle):
        raise RecipeError(
            f"input '{name}': the model '{request.model}' is an adapter itself",
            where=where,
            hint="give the base model, and this among its adapters",
        )
    opened = [_named_adapter(name, reference, allow_pickle, where) for reference in listed]
    adapters, adapter_repos = tuple(adapter for adapter, _ in opened), tuple(repo for _, repo in opened)
    if hub_reference is None:
        path = place_of(request.model)
        if not exists(path):
            raise InputNotFoundError(f"input '{name}': no such file or folder '{request.model}'", where=where)
        checkpoint = open_checkpoint(path, label=request.model, allow_pickle=allow_pickle)
        from mergekit_px.adapters.single_file import is_adapter_file

        if not listed and is_adapter_file(checkpoint.tensors):
            return _adapter_input(name, request.model, allow_pickle, where, options)
        both = _declares_adapter(request.model) and not path.is_file()
        notes = (*checkpoint.notes, *([_both_note(name, request.model)] if both else []))
        repo = None
    else:
        from mergekit_px.hub.resolve import remote_checkpoint, resolve

        repo = resolve(hub_reference)
        if request.component is not None:
            part = repo.within(request.component)
            if not part.files and not listed:
                raise InputNotFoundError(f"input '{name}': no component {request.component} is there", where=str(repo))
            repo = part if part.files else repo
        checkpoint, notes = remote_checkpoint(repo), ()
    notes = (*notes, *(remark for adapter in adapters for remark in _remarks(adapter)))
    return ResolvedInput(
        name,
        request.model,
        checkpoint,
        repo,
        adapters=adapters,
        adapter_repos=adapter_repos,
        bind_options=options,
        notes=notes,
    )


def _of_component(request: ModelInput) -> tuple[ModelInput, bool]:
    """The input as the component's own folder, where its model is a pipeline; and whether it is."""
    if request.component is None or request.model is None or parse_reference(request.model) is not None:
        return request, False
    folder = component_folder(place_of(request.model), request.component, request.model)
    return (request, False) if folder is None else (request.model_copy(update={"model": str(folder)}), True)


def _adapter_input(name: str, reference: str, allow_pickle: bool, where: str, options: BindOptions) -> ResolvedInput:
    adapter, repo = _named_adapter(name, reference, allow_pickle, where)
    path = place_of(reference)
    beside = _model_beside(path) if parse_reference(reference) is None and path.is_dir() else None
    notes = _remarks(adapter)
    if beside is not None and beside.pickled and not allow_pickle:
        notes.append(
            f"'{name}' holds an adapter and the PyTorch pickle {beside.index or beside.names[0]}: the adapter is"
            " taken, and with --allow-pickle the model would be"
        )
    return ResolvedInput(
        name,
        reference,
        adapter.checkpoint,
        adapters=(adapter,),
        adapter_repos=(repo,),
        adapter_only=True,
        bind_options=options,
        notes=tuple(notes),
    )


def _remarks(adapter: Adapter) -> list[str]:
    from mergekit_px.adapters.remarks import remarks

    return remarks(adapter)


def _declares_adapter(reference: str) -> bool:
    return (place_of(reference) / "adapter_config.json").is_file()


def is_adapter(reference: str, allow_pickle: bool) -> bool:
    """Whether a folder is an adapter and no model: where it holds both, the model counts, as for its own library."""
    path = place_of(reference)
    if exists(path) and not path.is_dir() and path.name.startswith("adapter_model."):
        return (path.parent / "adapter_config.json").is_file()
    if not _declares_adapter(reference):
        return False
    chosen = _model_beside(path)
    return chosen is None or (chosen.pickled and not allow_pickle)


def _model_beside(folder: Path) -> Selection | None:
    """The weights of a full model in the folder of an adapter."""
    return select_weights(name for name in names_in(folder) if name.startswith(_MODEL_FILES))


def _both_note(name: str, reference: str) -> str:
    return (
        f"'{name}' holds a model and an adapter: the model is merged; for the adapter give "
        f"{Path(reference) / ADAPTER_FILE}, or name it with 'adapter' on top of the model"
    )


def _named_adapter(name: str, reference: str, allow_pickle: bool, where: str) -> tuple[Adapter, ResolvedRepo | None]:
    if parse_reference(reference) is None and not place_of(reference).exists():
        raise InputNotFoundError(f"input '{name}': no such adapter '{reference}'", where=where)
    return fetch_adapter(reference, allow_pickle=allow_pickle)


def file_identity(checkpoint: Checkpoint) -> str:
    """One hash over the names, sizes and headers of a checkpoint's files."""
    digest = hashlib.sha256()
    for file in checkpoint.files.values():
        digest.update(f"{file.name}\0{file.size}\0{file.header_sha256}\n".encode())
    return digest.hexdigest()


def _card_bases(card: Path) -> tuple[str, ...]:
    try:
        text = read_small_file(card, folder=card.parent).decode("utf-8")
    except (InputError, UnicodeDecodeError):
        return ()
    if not text.startswith("---"):
        return ()
    front, found, _ = text[3:].partition("\n---")
    if not found:
        return ()
    try:
        data = yaml.safe_load(front)
    except (yaml.YAMLError, ValueError, RecursionError):
        return ()
    bases = data.get("base_model") if isinstance(data, dict) else None
    if isinstance(bases, str):
        return (bases,)
    return tuple(base for base in bases if isinstance(base, str)) if isinstance(bases, list) else ()
