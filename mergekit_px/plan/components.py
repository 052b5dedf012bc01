"""Models in several folders: whether the parts of two are the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.json_text import parse_json, shown
from mergekit_px.errors import InputError, PlanError
from mergekit_px.plan.tokenizers import Tokenizers, refuse_pointers, side_file, tokenizer_folders

if TYPE_CHECKING:
    from mergekit_px.plan.inputs import ResolvedInput
    from mergekit_px.recipe.model import Step

_TRAINED_TO = ("prediction_type", "beta_schedule", "num_train_timesteps", "rescale_betas_zero_snr", "shift")
"""Entries of a scheduler's config that the weights of a denoiser were fitted to."""


def check_components(steps: Iterable[Step], inputs: Mapping[str, ResolvedInput], *, strict: bool = False) -> list[str]:
    """Refuse to merge models whose parts are not the same; notes about those that only some have, if that is allowed.

    Raises:
        PlanError: a component is missing in one, or of another class; a pipeline and a model that is none.
    """
    notes: list[str] = []
    tokenizers = Tokenizers()
    for step in steps:
        members = [name for name in (step.base, *step.source_names()) if name is not None and name in inputs]
        models = [inputs[name] for name in members if not inputs[name].is_task_vector]
        for other in models[1:]:
            _check_classes(models[0], other)
            _check_tokens(models[0], other, tokenizers)
            said = list(_schedules(models[0], other))
            if said and strict:
                raise PlanError(said[0], hint="merge models of one kind, or leave out --strict")
            notes.extend(said)
            if step.missing == "error":
                _check_folders(models[0], other)
            elif different := sorted(models[0].checkpoint.parts.keys() ^ other.checkpoint.parts.keys()):
                notes.append(f"{', '.join(different)} is only in one of '{models[0].name}' and '{other.name}'")
    return notes


def _check_folders(one: ResolvedInput, other: ResolvedInput) -> None:
    first, second = set(one.checkpoint.parts), set(other.checkpoint.parts)
    if first == second:
        return
    if not first or not second:
        whole, single = (one, other) if first else (other, one)
        raise PlanError(
            f"'{whole.name}' is a model in several folders ({_listed(whole.checkpoint)}), and '{single.name}' is not",
            where=whole.reference,
            hint="give the one that is meant: {model: ..., component: "
            f"{next(iter(filter(None, whole.checkpoint.parts)))}}}, or only models of this kind",
        )
    having, lacking = (one, other) if first - second else (other, one)
    missing = next(folder for folder in having.checkpoint.parts if folder not in lacking.checkpoint.parts)
    raise PlanError(
        f"'{lacking.name}' has no component {missing or 'in the folder itself'}, which '{having.name}' has",
        where=lacking.reference,
        hint="give a model that has it, keep what only the base has by `missing: base`, or merge one component alone: "
        "{model: ..., component: ...}",
    )


def _listed(checkpoint: Checkpoint) -> str:
    return ", ".join(folder or "the folder itself" for folder in checkpoint.parts)


def _check_classes(one: ResolvedInput, other: ResolvedInput) -> None:
    """Parts of pipelines, and single components of diffusers, are loaded by the class that their configs name."""
    first, second = one.checkpoint.configs, other.checkpoint.configs
    for folder in first.keys() & second.keys():
        classes = [class_name(configs[folder], of_diffusers=not folder) for configs in (first, second)]
        if None not in classes and classes[0] != classes[1]:
            raise PlanError(
                f"{folder or 'the component'} is {classes[0]} in '{one.name}' and {classes[1]} in '{other.name}', "
                "so they are not the same component",
                where=other.reference,
                hint="merge components of one class",
            )


def _check_tokens(one: ResolvedInput, other: ResolvedInput, tokenizers: Tokenizers) -> None:
    """The rows of a text encoder's embedding are merged by their place, so its tokens must be the same."""
    if not (one.checkpoint.parts and other.checkpoint.parts):
        return
    for source in (one, other):
        refuse_pointers(source)
    for folder in sorted({*tokenizer_folders(one)} & {*tokenizer_folders(other)}):
        if told := tokenizers.difference(one, other, folder):
            raise PlanError(
                f"{folder.removesuffix('/')} lists other tokens in '{one.name}' than in '{other.name}' ({told}), and"
                " rows of different tokens are not mixed",
                where=other.reference,
                hint="merge the other components by themselves ({model: ..., component: ...}), or pipelines of one"
                " vocabulary",
            )


def _schedules(one: ResolvedInput, other: ResolvedInput) -> Iterator[str]:
    """What denoisers were trained to predict stands in the config of the scheduler."""
    for name in _shared(one, other, ("scheduler_config.json",)):
        first, second = (_object(_read(source, name)) for source in (one, other))
        for key in _TRAINED_TO:
            if isinstance(first, dict) and isinstance(second, dict) and first.get(key) != second.get(key):
                yield (
                    f"{name} disagrees in {key}: {first.get(key)!r} in '{one.name}', {second.get(key)!r} in"
                    f" '{other.name}'; the weights of these models do not mean the same"
                )


def _shared(one: ResolvedInput, other: ResolvedInput, names: Sequence[str]) -> list[str]:
    """The files by such names in folders of models in several, in both."""
    if not (one.checkpoint.parts and other.checkpoint.parts):
        return []
    return [
        file
        for file in one.checkpoint.side_files
        if "/" in file and file.rpartition("/")[2] in names and file in other.checkpoint.side_files
    ]


def _read(source: ResolvedInput, name: str) -> bytes:
    return side_file(source, name) or b""


def _object(raw: bytes) -> Any:
    with contextlib.suppress(InputError):
        return parse_json(raw, "", strict=False)
    return raw


def class_name(config: Mapping[str, Any], *, of_diffusers: bool = False) -> str | None:
    """The class that loads a component, by its config.

    Args:
        of_diffusers: only one of that library, of which a config has the one class.
    """
    named = config.get("_class_name")
    listed = config.get("architectures")
    if named is None and not of_diffusers and isinstance(listed, list) and len(listed) == 1:
        named = listed[0]
    return shown(named) if isinstance(named, str) else None
