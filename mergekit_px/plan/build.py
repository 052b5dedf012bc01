"""From a recipe to a plan: every decision, and every refusal that needs no weight to be read."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_px.artefacts.row_mixtures import read_row_mixtures
from mergekit_px.checkpoint.destination import FILE_SUFFIX, check_apart, destination, real_path
from mergekit_px.checkpoint.dtypes import DType, parse_dtype
from mergekit_px.checkpoint.layout import parse_size, plan_layout
from mergekit_px.checkpoint.object_store import ObjectStore, written_address
from mergekit_px.checkpoint.remembered import user_cache
from mergekit_px.checkpoint.task_vector import task_vector_metadata
from mergekit_px.errors import DiskSpaceError, OutputError, PlanError, RecipeError, UsageError
from mergekit_px.methods.declare import ArtefactFile
from mergekit_px.plan.agreement import differing_files, disagreements
from mergekit_px.plan.bases import complete_bases
from mergekit_px.plan.budget import plan_budget
from mergekit_px.plan.components import check_components
from mergekit_px.plan.donors import Beside, beside_weights, config_donor, describing_metadata, file_stems, header_donor
from mergekit_px.plan.encoded import encoded_items
from mergekit_px.plan.expressions import Expressions
from mergekit_px.plan.fingerprints import base_fingerprint, check_base_fingerprints
from mergekit_px.plan.inputs import ResolvedInput, resolve_input
from mergekit_px.plan.lock import published_recipe, recipe_lock, sha256_but_of_weights
from mergekit_px.plan.model import Dropped, Plan, WorkItem
from mergekit_px.plan.names import wrapped
from mergekit_px.plan.nodes import Apply, Kind, Node, combined
from mergekit_px.plan.options import PlanOptions
from mergekit_px.plan.patterns import expanded
from mergekit_px.plan.sources import copied_values, equal_sources, known_content, overshoot
from mergekit_px.plan.texts import config_text, recipe_text
from mergekit_px.plan.tokenizers import Vocabularies
from mergekit_px.plan.views import plain_float8, refuse_quantised_by_config
from mergekit_px.plan.vocabulary import ChosenVocabulary
from mergekit_px.recipe.graph import references
from mergekit_px.recipe.loaded import LoadedRecipe
from mergekit_px.recipe.mergekit.differences import advice
from mergekit_px.recipe.model import Recipe

_ROW_MIXTURES = ArtefactFile("row mixtures", read_row_mixtures)


def build_plan(
    loaded: LoadedRecipe, options: PlanOptions | None = None, inputs: Mapping[str, ResolvedInput] | None = None
) -> Plan:
    """Decide everything about a merge. Headers are read, and a few bytes of a base that a task vector names.

    Args:
        loaded: the recipe.
        options: how it is to be done.
        inputs: opened inputs by name, where they are known already; others are resolved.

    Raises:
        RecipeError: the recipe is invalid.
        InputError: an input is missing, unreachable or malformed.
        PlanError: inputs that do not fit, an output that cannot be used, too little memory or disk.
    """
    if not isinstance(loaded, LoadedRecipe):
        what = f"a loaded recipe is planned, not {type(loaded).__name__}"
        raise UsageError(what, hint="plan_recipe takes files and mappings too")
    try:
        return _planned(loaded, options or PlanOptions(), inputs)
    except PlanError as error:
        if loaded.dialect == "mergekit" and error.hint is not None:
            error.hint = advice(error.hint, loaded.recipe.steps)
        raise


def _planned(loaded: LoadedRecipe, options: PlanOptions, inputs: Mapping[str, ResolvedInput] | None) -> Plan:
    loaded, patterns = expanded(loaded)
    lock = options.lock or recipe_lock(loaded)
    loaded = loaded if lock is None else lock.pinned(loaded)
    recipe = loaded.recipe
    target = recipe.output.from_ or next(reversed(recipe.steps), None)
    if target is None:
        raise PlanError("the recipe has no steps", where=loaded.where())
    needed = _reachable(recipe, target)
    known = dict(inputs or {})
    resolved = {
        name: known.get(name)
        or resolve_input(
            name, recipe.models[name], allow_pickle=options.allow_pickle, where=loaded.where("models", name)
        )
        for name in recipe.models
        if name in needed
    }
    if lock is not None:
        lock.compare(resolved)  # first: what else is said of an input that moved would hide why
    notes = [*loaded.differences, *patterns]
    if options.strict and loaded.idle:
        sentence, place = loaded.idle[0]
        raise RecipeError(sentence.rstrip("."), where=place, hint="take it out, or leave out --strict")
    recipe, added, said = complete_bases(
        recipe, {**known, **resolved}, needed, allow_pickle=options.allow_pickle, lock=lock
    )
    resolved.update({name: known.get(name, source) for name, source in added.items()})
    notes.extend(said)
    notes.extend(f"model '{name}' is not used" for name in loaded.recipe.models if name not in needed)
    notes.extend(f"step '{name}' is not used" for name in loaded.recipe.steps if name not in needed)

    config_from = config_donor(recipe, target, resolved, loaded)
    vocabularies = _vocabularies(recipe, target, resolved, config_from, loaded)
    expressions = Expressions(replace(loaded, recipe=recipe), resolved, vocabularies)
    if isinstance(vocabularies, ChosenVocabulary) and vocabularies.request.rows is not None:
        vocabularies.mixtures = expressions.artefacts.read(_ROW_MIXTURES, vocabularies.request.rows).content
    members = [recipe.steps[name] for name in recipe.steps if name in needed]
    notes.extend(check_components(members, resolved, strict=options.strict))
    namespace = expressions.namespace(target)
    kind = _kind(recipe, namespace)
    if recipe.output.kind == "task_vector" and kind == "weights":
        namespace, kind = _as_task_vector(recipe, target, namespace, expressions), "delta"
    dtype = _output_dtype(options.dtype or recipe.output.dtype)
    items, left_out = _items(namespace, kind, dtype)
    if not items:
        raise PlanError("the output would have no tensors", where=loaded.where("output"))
    vocabularies.check(items)
    output = None if _in_memory(resolved) else Path(options.output or recipe.output.path).expanduser()
    store = None if output is None else written_address(output)
    if store is not None:
        output = staging_folder(store)
        options = replace(options, require_room=False)
    file = None if output is None else destination(output).file
    described = header_donor(recipe, target, resolved, config_from) if kind == "weights" else None
    beside = Beside()
    if kind == "weights" and file is None:
        beside = beside_weights(recipe, target, config_from, resolved, items, dtype, expressions, strict=options.strict)
    notes.extend(expressions.notes + vocabularies.notes + list(beside.notes))
    notes.extend(note for source in resolved.values() for note in source.notes)
    refuse_quantised_by_config(items, resolved)
    notes.extend(plain_float8(items, resolved))
    notes.extend(wrapped([item.name for item in items]) if kind == "weights" else [])
    used = _used_inputs(items)
    taking_part = {name: resolved[name] for name in used}
    notes.extend(equal_sources(recipe, taking_part, known_content(taking_part)))
    notes.extend(overshoot(items))
    notes.extend(copied_values(expressions.uncomputed, resolved))
    notes.extend(disagreements(resolved, used, strict=options.strict))
    donors = {name for name in (beside.config_from, beside.tokenizer_from) if name is not None}
    notes.extend(differing_files(beside.side_files, donors, resolved, used, beside.config_from))
    check_base_fingerprints(items, resolved, options)
    headers = describing_metadata(
        None if described is None else resolved[described].checkpoint, [resolved[name].source for name in used]
    )
    metadata = {"format": "pt"}
    if kind == "delta":
        metadata |= task_vector_metadata(base_fingerprint(items, resolved))
    donor = resolved[beside.config_from].checkpoint if beside.config_from is not None else None
    stems, shard_size = file_stems(donor), options.shard_size or recipe.output.shard_size
    if output is not None and file is not None:
        _check_file(output, recipe, resolved)
        stems, shard_size = {"": file.removesuffix(FILE_SUFFIX)}, sys.maxsize
        if config_from is not None and kind == "weights":
            notes.append(f"one file holds the weights alone: config and side files of '{config_from}' are not written")
    if recipe.output.quantize is not None:
        where = loaded.where("output", "quantize")
        if kind == "delta" or output is None:
            raise PlanError("only a model that is written to the disk can be kept quantised", where=where)
        items, said_of_storage = encoded_items(items, beside.config_from or described, expressions, where)
        notes.append(said_of_storage)
    layout = plan_layout(
        [
            tensor if donor is None else replace(tensor, folder=donor.part_of(tensor.name))
            for item in items
            for tensor in item.tensors
        ],
        shard_size=parse_size(shard_size),
        stems=stems,
        metadata=metadata,
        more_metadata=headers,
    )
    items.sort(key=lambda item: layout.location[item.tensors[0].name][:2])
    taken = {name: resolved[name] for name in resolved if name in {*used, beside.config_from, beside.tokenizer_from}}
    if lock is not None:
        lock.check(taken, expressions.artefacts.all(), sha256_but_of_weights)
    plan = Plan(
        inputs=taken,
        items=tuple(items),
        artefacts=expressions.artefacts.all(),
        layout=layout,
        dropped=_dropped(items, resolved, expressions, left_out, used),
        notes=tuple(dict.fromkeys(notes)),
        config_notes=beside.config_notes,
        config=beside.config,
        part_configs=beside.part_configs,
        side_files=beside.side_files,
        left_behind=beside.left_behind,
        config_from=beside.config_from,
        tokenizer_from=beside.tokenizer_from,
        texts=beside.texts,
        output=output,
        store=store,
        kind=kind,
        seed=recipe.seed,
        steps=_step_summaries(recipe, needed),
        budget=plan_budget(items, memory=options.memory, threads=options.threads),
        device=options.device,
        loaded=loaded,
        published=published_recipe(loaded, recipe, taken),
        lock=lock,
        options=options,
    )
    if output is not None:
        if beside.config is not None:
            config_text(beside.config)
        recipe_text(plan.published)
        _require_unicode(output)
        check_output(plan, output)
    return plan


def staging_folder(address: str) -> Path:
    """Where the files of an output in a store are made. Raises ``UsageError`` for an address that cannot be one."""
    address = ObjectStore(address).address
    key = hashlib.sha256(address.encode()).hexdigest()[:16]
    folder = user_cache() / "outputs" / key / address.rpartition("/")[2]
    if folder.suffix == FILE_SUFFIX:
        raise OutputError("an output in a store is a folder, not one file", where=address, hint="give another with -o")
    return folder


def _require_unicode(output: Path) -> None:
    try:
        str(output).encode()
    except UnicodeEncodeError:
        raise OutputError("the name of the output is not UTF-8", where=str(output), hint="choose another") from None


def _check_file(output: Path, recipe: Recipe, inputs: Mapping[str, ResolvedInput]) -> None:
    if recipe.output.push is not None:
        raise OutputError("only a folder is uploaded", where=str(output), hint="give one with -o, or leave out --push")
    parts = next((source.checkpoint.parts for source in inputs.values() if source.checkpoint.parts), {})
    if parts:
        raise OutputError(
            f"a model in several folders ({', '.join(folder or 'its own' for folder in parts)}) cannot be one file",
            where=str(output),
            hint="give a folder with -o",
        )


def check_output(plan: Plan, output: Path) -> None:
    """Refuse an output that touches an input, is a file, or does not fit on the disk. What is in it is for the run.

    Raises:
        OutputError, DiskSpaceError
    """
    for source in plan.inputs.values():
        places = [Path(source.reference).expanduser(), *(Path(adapter.label) for adapter in source.adapters)]
        if source.repo is None and source.checkpoint.directory is not None and not places[0].exists():
            places.append(source.checkpoint.directory)
        check_apart(output, [place for place in places if place.exists()])
    check_apart(output, [artefact.path for artefact in plan.artefacts])
    if output.exists() and not output.is_dir() and destination(output).file is None:
        raise OutputError("the output is a file, not a folder", where=str(output), hint="give a folder with -o")
    if plan.options.require_room and plan.options.mode == "new":
        check_room(plan, output)


def check_room(plan: Plan, output: Path) -> None:
    """Raises DiskSpaceError where the whole output does not fit on the disk."""
    place = real_path(output)
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < plan.bytes_written:
        raise DiskSpaceError(f"{plan.bytes_written:,} bytes are to be written and {free:,} are free", where=str(output))


def _reachable(recipe: Recipe, target: str) -> set[str]:
    """The models and steps that a plan looks at."""
    output, tokenizer = recipe.output, recipe.tokenizer
    beside = [output.config_from, output.tokenizer_from]
    if tokenizer is not None:
        beside += [tokenizer.base, *(row.model for row in tokenizer.tokens.values())]
        beside += [tokenizer.from_] if tokenizer.from_ in recipe.models else []
    return _merged(recipe, [target, *(name for name in beside if name is not None)])


def _merged(recipe: Recipe, targets: Iterable[str]) -> set[str]:
    """The models and steps that some steps are made of."""
    found: set[str] = set()
    waiting = list(targets)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        step = recipe.steps.get(name)
        if step is None:
            continue
        waiting += [reference for _, reference in references(step, ())]
    return found


def _vocabularies(
    recipe: Recipe, target: str, inputs: Mapping[str, ResolvedInput], config_from: str | None, loaded: LoadedRecipe
) -> Vocabularies | ChosenVocabulary:
    request = recipe.tokenizer
    if request is None:
        return Vocabularies(inputs, recipe.output.tokenizer_from or config_from)
    merged = _merged(recipe, [target])
    members = [name for name, source in inputs.items() if name in merged and not source.is_task_vector]
    where = loaded.where("tokenizer")
    if not members:
        raise PlanError("a tokenizer is chosen, and only task vectors are merged", where=where)
    step = recipe.steps.get(target)
    base = request.base or (step.base if step is not None and step.base in members else None)
    if base is not None and base not in members:
        where = loaded.where("tokenizer", "base")
        raise PlanError(f"'{base}' is the base of the tokenizer, and is not merged", where=where)
    donor = request.from_ if request.from_ in inputs else base or config_from or members[0]
    return ChosenVocabulary(request, inputs, members, base, donor, recipe.seed, where)


def _used_inputs(items: Iterable[WorkItem]) -> list[str]:
    """The inputs whose tensors, or whose adapters' tensors, the items need, in order of first use."""
    used: dict[str, None] = {}
    for item in items:
        used.update((read.model, None) for read in item.reads)
        used.update((node.input, None) for node in item.adapted)
    return list(used)


def _in_memory(inputs: Mapping[str, ResolvedInput]) -> bool:
    return any(source.state is not None for source in inputs.values())


def _kind(recipe: Recipe, namespace: Mapping[str, Node]) -> Kind:
    """A task vector if every tensor that is computed is one; integers and the like do not count."""
    kinds = {node.kind for node in namespace.values() if node.dtype.arithmetic}
    if len(kinds) > 1:
        delta = next(name for name, node in namespace.items() if node.kind == "delta")
        weight = next(name for name, node in namespace.items() if node.kind == "weights" and node.dtype.arithmetic)
        raise PlanError(f"the output mixes task vectors ('{delta}') with full weights ('{weight}')")
    return kinds.pop() if kinds else "weights"


def _as_task_vector(
    recipe: Recipe, target: str, namespace: Mapping[str, Node], expressions: Expressions
) -> dict[str, Node]:
    step = recipe.steps.get(target)
    if step is None or step.base is None:
        raise PlanError(f"a task vector is the difference to a base, and '{target}' has none")
    base = expressions.namespace(step.base)
    result: dict[str, Node] = {}
    for name, node in namespace.items():
        if not node.dtype.arithmetic:
            result[name] = node
            continue
        if name not in base or base[name].shape != node.shape:
            raise PlanError(f"'{name}' is not in the base '{step.base}' in the same shape, so it has no difference")
        result[name] = replace(combined(target, (node, base[name]), (1.0, -1.0)), kind="delta")
    return result


def _output_dtype(text: str | None) -> DType | None:
    if text is None:
        return None
    dtype = parse_dtype(text)
    if not dtype.arithmetic:
        raise UsageError(f"merged weights cannot be stored as {text}")
    return dtype


def _items(namespace: Mapping[str, Node], kind: Kind, dtype: DType | None) -> tuple[list[WorkItem], dict[str, str]]:
    """Work items and the names left out (with the reason) of a namespace."""
    items: list[WorkItem] = []
    left_out: dict[str, str] = {}
    wide = parse_dtype("F32")
    for name, node in namespace.items():
        if not node.dtype.arithmetic:
            if kind == "delta":
                left_out[name] = f"{node.dtype.name} tensors have no difference"
                continue
            stored = node.dtype
        elif dtype is not None:
            stored = dtype
        elif kind == "delta" and isinstance(node, Apply):
            stored = node.dtype if node.dtype.bits > wide.bits else wide
        else:
            stored = node.dtype
        items.append(WorkItem(name, stored, node.shape, node))
    return items, left_out


def _dropped(
    items: Iterable[WorkItem],
    inputs: Mapping[str, ResolvedInput],
    expressions: Expressions,
    left_out: Mapping[str, str],
    used: Sequence[str],
) -> tuple[Dropped, ...]:
    """Every tensor of every used input that no output tensor is made of, with the reason."""
    read: set[tuple[str, str]] = set()
    made: dict[str, WorkItem] = {}
    for item in items:
        made[item.name] = item
        read.update((leaf.input, leaf.tensor.name) for leaf in item.reads)
    dropped: list[Dropped] = []
    for name in used:
        if inputs[name].adapter_only or name in expressions.companions:
            continue
        for tensor in inputs[name].checkpoint.tensors:
            if (name, tensor) in read:
                continue
            if tensor in expressions.dropped_names:
                reason = expressions.dropped_names[tensor]
            elif tensor in left_out:
                reason = left_out[tensor]
            elif tensor in made:
                givers = ", ".join(dict.fromkeys(leaf.model for leaf in made[tensor].reads))
                reason = f"the output has it from {givers}"
            else:
                reason = "its layer is in no slice"
            dropped.append(Dropped(name, tensor, reason))
    return tuple(dropped)


def _step_summaries(recipe: Recipe, needed: set[str]) -> dict[str, Any]:
    return {
        name: step.model_dump(mode="json", exclude_defaults=True, by_alias=True)
        for name, step in recipe.steps.items()
        if name in needed or name.endswith("_centre")
    }
