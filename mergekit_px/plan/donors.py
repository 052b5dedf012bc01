"""What goes with the weights: whose config, edited how, whose tokenizer and other side files, and what headers say."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from mergekit_px.checkpoint.contents import Checkpoint, StoredTensor
from mergekit_px.checkpoint.dtypes import DType
from mergekit_px.checkpoint.file_kind import LFS_POINTER
from mergekit_px.checkpoint.side_files import SideFiles, is_tokenizer_file
from mergekit_px.checkpoint.task_vector import MODEL_SPEC, description
from mergekit_px.errors import InputError, PlanError
from mergekit_px.plan import config as config_edits
from mergekit_px.plan.consistency import contradictions
from mergekit_px.plan.expert_choice import ChosenExperts
from mergekit_px.plan.expressions import Expressions
from mergekit_px.plan.inputs import ResolvedInput
from mergekit_px.plan.layers import is_embedding, stack_sizes
from mergekit_px.plan.mixtures import BuiltMixture
from mergekit_px.plan.model import WorkItem
from mergekit_px.plan.sections import follow_parts
from mergekit_px.plan.tied import is_head, is_vocabulary, original_of, stated_tie
from mergekit_px.plan.tokenizers import Vocabularies, adapter_tokenizer
from mergekit_px.plan.views import QUANTISATION_FILES, has_decoded, plain_config
from mergekit_px.plan.vocabulary import ChosenVocabulary
from mergekit_px.plan.vocabulary_texts import followed_ids, tokenizer_texts
from mergekit_px.recipe.loaded import LoadedRecipe
from mergekit_px.recipe.model import Recipe

_STEMS = ("diffusion_pytorch_model", "open_clip_model", "open_clip_pytorch_model")
"""Names that diffusers and OpenCLIP look for; everything else finds ``model``."""


@dataclass(frozen=True)
class Beside:
    """What is written beside the weights of a model, and whose it is; see the fields of a plan by these names."""

    config_from: str | None = None
    tokenizer_from: str | None = None
    config: Mapping[str, Any] | None = None
    part_configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    side_files: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, bytes] = field(default_factory=dict)
    left_behind: Mapping[str, str] = field(default_factory=dict)
    config_notes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """Those about the config among them."""


def beside_weights(
    recipe: Recipe,
    target: str,
    donor: str | None,
    inputs: Mapping[str, ResolvedInput],
    items: Sequence[WorkItem],
    dtype: DType | None,
    expressions: Expressions,
    *,
    strict: bool = False,
) -> Beside:
    """Decide what goes with the weights.

    Args:
        donor: the input whose config goes along, as far as it is known.
        strict: refuse a config that contradicts the weights, which is only said otherwise.

    Raises:
        PlanError: a config that does not fit the weights.
        InputError: a side file that is only a git-lfs pointer.
    """
    notes: list[str] = []
    fitting, vocabulary = donor, expressions.vocabularies
    if not isinstance(vocabulary, ChosenVocabulary):
        fitting = _fitting_donor(donor, recipe.output.config_from, inputs, items)
    if fitting != donor:
        notes.append(f"'{donor}' has ids for rows that are cut, so the tokenizer is that of '{fitting}' too")
    config, processors, config_notes = _output_config(recipe, target, fitting, inputs, items, dtype, expressions)
    made_plain = has_decoded(items) and recipe.output.quantize is None
    if config is not None and made_plain:
        config = plain_config(config)
    part_configs, said = _part_configs(fitting, inputs, items, dtype, keep=recipe.output.quantize is not None)
    config_notes += said
    tokenizer_from = recipe.output.tokenizer_from or fitting
    texts: dict[str, bytes] = {}
    if isinstance(vocabulary, ChosenVocabulary):
        tokenizer_from = vocabulary.donor
        texts = tokenizer_texts(inputs[tokenizer_from], vocabulary.start, vocabulary.new)
    if fitting is not None and config is not None and vocabulary is not None:
        config, more = followed_ids(config, inputs, fitting, tokenizer_from, vocabulary)
        texts |= more
    if config is not None:
        tokenizer = None
        if isinstance(vocabulary, Vocabularies) and tokenizer_from is not None:
            tokenizer = vocabulary.tokenizers.known(inputs[tokenizer_from])
        found = list(contradictions(config, items, None if tokenizer is None else tokenizer.tokens))
        if found and strict:
            raise PlanError(found[0], hint="mend the config, or give another as output.config_from")
        notes += found
    side_files = _donated_files(inputs, fitting, tokenizer_from) | processors
    if tokenizer_from is not None:
        brought, said = adapter_tokenizer(inputs[tokenizer_from], items)
        if brought:
            side_files = {name: giver for name, giver in side_files.items() if not is_tokenizer_file(name)} | brought
        notes.extend(said)
    left = {} if fitting is None else dict(inputs[fitting].checkpoint.left_behind)
    if made_plain:
        gone = [name for name in side_files if name.rpartition("/")[2] in QUANTISATION_FILES]
        left |= dict.fromkeys(gone, "it says how weights were quantised")
        side_files = {name: giver for name, giver in side_files.items() if name not in gone}
    return Beside(
        config_from=fitting,
        tokenizer_from=tokenizer_from,
        config=config,
        part_configs=part_configs,
        side_files=side_files,
        texts=texts,
        left_behind=left,
        config_notes=tuple(config_notes),
        notes=(*notes, *config_notes, *_side_file_notes(left, fitting)),
    )


def config_donor(recipe: Recipe, target: str, inputs: Mapping[str, ResolvedInput], loaded: LoadedRecipe) -> str | None:
    """The input whose config goes along: as asked, else the base, else the first source that has one."""
    if recipe.output.config_from is not None:
        donor = recipe.output.config_from
        if donor not in inputs:
            raise PlanError(
                f"config_from names '{donor}', which is no model", where=loaded.where("output", "config_from")
            )
        return donor
    models = _models(recipe, target, inputs)
    return next((name for name in models if inputs[name].checkpoint.configs), None)


def header_donor(recipe: Recipe, target: str, inputs: Mapping[str, ResolvedInput], donor: str | None) -> str | None:
    """The input whose headers describe the model: the config's donor, else the base or the first source."""
    return donor or next(_models(recipe, target, inputs), None)


def _models(recipe: Recipe, target: str, inputs: Mapping[str, ResolvedInput]) -> Iterator[str]:
    """The models that a step or input is made of, bases first."""
    queue = [target]
    seen: set[str] = set()
    while queue:
        name = queue.pop(0)
        if name in seen:
            continue
        seen.add(name)
        if name in inputs:
            if not inputs[name].is_task_vector:
                yield name
            continue
        step = recipe.steps[name]
        pieces = step.slices or []
        queue += [step.base] if step.base else []
        queue += step.source_names() + [source.model for piece in pieces for source in piece.sources]


def _fitting_donor(
    donor: str | None, asked: str | None, inputs: Mapping[str, ResolvedInput], items: Sequence[WorkItem]
) -> str | None:
    """The donor; where rows of its vocabulary are cut, the model whose vocabulary has the rows that are left.

    Raises:
        PlanError: the donor was asked for, and its vocabulary is cut; or no model fits.
    """
    known = inputs[donor].checkpoint.tensors if donor is not None else {}
    cut = next(
        (
            item
            for item in items
            if is_embedding(item.name) and is_vocabulary(item.name) and item.name in known
            if known[item.name].shape[0] > item.shape[0]
        ),
        None,
    )
    if cut is None or not (ids := _ids_beyond(inputs[donor or ""], cut.shape[0], known[cut.name].shape[0])):
        return donor
    fitting = [
        read.model
        for read in cut.reads
        if inputs[read.model].config is not None
        and inputs[read.model].checkpoint.tensors[cut.name].shape[0] == cut.shape[0]
    ]
    if asked is not None or not fitting:
        raise PlanError(
            f"'{cut.name}' keeps {cut.shape[0]} rows, and {ids} of '{donor}' lie beyond them",
            where=inputs[donor or ""].reference,
            hint=f"take config and tokenizer of '{fitting[0]}'" if fitting else "take embedding and head by a rule",
        )
    return fitting[0]


def _ids_beyond(source: ResolvedInput, rows: int, old: int) -> str:
    """What of a model gives out ids of rows that are cut."""
    config = source.config or {}
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    for part in parts:
        for key, value in part.items():
            ids = value if isinstance(value, list) else [value]
            if key.endswith("_token_id") and any(isinstance(each, int) and rows <= each < old for each in ids):
                return f"{key} {value} in the config"
    return "ids of the tokenizer" if any(is_tokenizer_file(name) for name in source.checkpoint.side_files) else ""


def _output_config(
    recipe: Recipe,
    target: str,
    donor: str | None,
    inputs: Mapping[str, ResolvedInput],
    items: Sequence[WorkItem],
    dtype: DType | None,
    expressions: Expressions,
) -> tuple[dict[str, Any] | None, dict[str, str], list[str]]:
    """The config, the files of processors that come along with parts of other models, and what to say."""
    if donor is None or inputs[donor].config is None:
        return None, {}, []
    config = copy.deepcopy(dict(inputs[donor].config or {}))
    notes = [_config_note(donor)]
    updates = expressions.config_updates.get(donor, {})
    if updates:
        config_edits.update(config, updates)
        notes.append(f"config: {', '.join(updates)} as the adapter of '{donor}' needs")
    if dtype is not None and dtype.torch_name is not None:
        config_edits.set_dtype(config, dtype.torch_name)
    processors, said = ({}, []) if recipe.output.config_from else follow_parts(config, donor, inputs, items)
    notes += said
    stored = inputs[donor].checkpoint.tensors
    own_head = any(
        item.name in expressions.untied or (is_head(item.name) and item.name not in stored) for item in items
    )
    copies = {name for pairs in expressions.tied.values() for name in pairs if is_head(name)}
    written = {item.name for item in items}
    if copies - written and config_edits.tie(config):
        notes.append("config: tie_word_embeddings -> true, as in all models that are merged")
    givers = {item.name: _giver(item) for item in items}
    apart = any(
        is_head(name) and (giver is None or givers.get(original_of(name, stored) or "", giver) != giver)
        for name, giver in givers.items()
    )
    if (own_head or (apart and stated_tie(config))) and config_edits.untie(config):
        notes.append("config: tie_word_embeddings -> false")
    notes += _follow_vocabulary(config, stored, items)
    layers = expressions.layer_sources.get(target)
    if layers is not None:
        notes += _restack(config, donor, layers, inputs, expressions)
    for mixture in _mixtures(recipe, target, expressions):
        config, said = mixture.followed(config)
        notes += said
    return config, processors, notes


def _giver(item: WorkItem) -> str | None:
    """The model of which a tensor is taken as it is."""
    models = {read.model for read in item.reads}
    return models.pop() if len(models) == 1 and not item.applied and not item.adapted else None


def _mixtures(recipe: Recipe, target: str, expressions: Expressions) -> list[BuiltMixture | ChosenExperts]:
    """What steps on the way from the first model to the output made of its experts, in order."""
    found: list[BuiltMixture | ChosenExperts] = []
    while target in recipe.steps:
        found = [*expressions.mixtures.get(target, ()), *found]
        step = recipe.steps[target]
        target = step.base or (step.slices[0].sources[0].model if step.slices else step.source_names()[0])
    return found


def _part_configs(
    donor: str | None,
    inputs: Mapping[str, ResolvedInput],
    items: Sequence[WorkItem],
    dtype: DType | None,
    *,
    keep: bool,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The configs of a model's folders that change with what is merged, by their paths; the others are copied."""
    checkpoint = inputs[donor].checkpoint if donor is not None else None
    if checkpoint is None or not checkpoint.parts:
        return {}, []
    changed: dict[str, dict[str, Any]] = {}
    notes = [] if "" in checkpoint.configs else [_config_note(donor or "")]
    for folder, stored in checkpoint.configs.items():
        if not folder:
            continue
        own = [item for item in items if checkpoint.part_of(item.name) == folder]
        config = copy.deepcopy(dict(stored))
        if dtype is not None and dtype.torch_name is not None:
            config_edits.set_dtype(config, dtype.torch_name, add=False)
        if has_decoded(own) and not keep:
            config = plain_config(config)
        notes += _follow_vocabulary(config, checkpoint.tensors, own)
        if config != stored:
            changed[f"{folder}/config.json"] = config
    return changed, notes


def _config_note(donor: str) -> str:
    return f"config and side files come from '{donor}'"


def _follow_vocabulary(
    config: dict[str, Any], stored: Mapping[str, StoredTensor], items: Sequence[WorkItem]
) -> list[str]:
    notes = []
    rows = {item.name: item.shape[0] for item in items if is_vocabulary(item.name) and len(item.shape) == 2}
    if len(set(rows.values())) > 1 and len({stored[name].shape[0] for name in rows if name in stored}) == 1:
        listed = ", ".join(f"'{name}' {count}" for name, count in rows.items())
        raise PlanError(
            f"embedding and head would have different numbers of rows: {listed}",
            hint="choose the tokenizer of the result by --set tokenizer.from=, or take both from one model by a rule",
        )
    for item in sorted(items, key=lambda item: is_head(item.name)):
        if is_vocabulary(item.name) and len(item.shape) == 2:
            known = stored.get(item.name)
            if known is not None and known.shape[0] != item.shape[0]:
                config_edits.set_vocabulary(config, known.shape[0], item.shape[0])
                notes.append(f"config: vocab_size follows {item.name}")
    return notes[:1]


def _restack(
    config: dict[str, Any],
    donor: str,
    layers: Sequence[Sequence[tuple[str, int]]],
    inputs: Mapping[str, ResolvedInput],
    expressions: Expressions,
) -> list[str]:
    """Per-layer entries follow the donor's own layer in each slice, else the first source's."""
    old = config_edits.layer_count(config)
    if old is None:
        old = max(stack_sizes(inputs[donor].checkpoint.tensors).values())
    origin = [next((layer for model, layer in pairs if model == donor), pairs[0][1]) for pairs in layers]
    if any(layer >= old for layer in origin):
        raise PlanError(
            f"the config of '{donor}' speaks of {old} layers, and layer {max(origin)} is stacked",
            hint="give the model with the most layers as output.config_from",
        )
    before = copy.deepcopy(config)
    notes = config_edits.restack(config, origin, old)
    config_edits.check_with_transformers(config, before)
    return notes


def _donated_files(
    inputs: Mapping[str, ResolvedInput], config_from: str | None, tokenizer_from: str | None
) -> dict[str, str]:
    """Side file -> the input that gives it. Raises ``InputError`` for one that is only a git-lfs pointer."""
    files: dict[str, str] = {}
    for donor, of_tokenizer in ((config_from, False), (tokenizer_from, True)):
        if donor is None:
            continue
        checkpoint = inputs[donor].checkpoint
        files.update({name: donor for name in checkpoint.side_files if is_tokenizer_file(name) is of_tokenizer})
        for name, reason in checkpoint.left_behind.items():
            if reason == LFS_POINTER.name and is_tokenizer_file(name) is of_tokenizer:
                raise InputError(f"this is {reason}", where=f"{checkpoint.label}/{name}", hint=LFS_POINTER.hint)
    return dict(sorted(files.items()))


def _side_file_notes(left: Mapping[str, str], donor: str | None) -> list[str]:
    """One line for each file that its owner may miss."""
    unexpected = SideFiles(left_behind=left).unexpected
    return [f"'{name}' of '{donor}' is not copied: {reason}" for name, reason in unexpected.items()]


def file_stems(donor: Checkpoint | None) -> dict[str, str]:
    """What the files of weights are called in each folder: as the donor's where its library looks for no other name."""
    parts = {} if donor is None else donor.parts or {"": donor}
    return {
        folder: next((stem for stem in _STEMS if any(name.startswith(stem) for name in part.files)), "model")
        for folder, part in parts.items()
    }


_MERGED_FROM = "modelspec.merged_from"
_FRAMEWORKS = ("pt", "tf", "flax", "mlx")
"""What libraries take for ``format``, which says how tensors of this file are laid out."""


def describing_metadata(donor: Checkpoint | None, sources: Iterable[str]) -> dict[str, dict[str, str]]:
    """The strings of each folder's headers; ``""`` where the model has no parts.

    Args:
        sources: the references of all models that are merged.
    """
    if donor is None:
        return {}
    return {folder: _kept(part.metadata, sources) for folder, part in (donor.parts or {"": donor}).items()}


def _kept(metadata: Mapping[str, str], sources: Iterable[str]) -> dict[str, str]:
    kept = description(metadata)
    if any(key.startswith(MODEL_SPEC) for key in kept):
        # Names, not paths: whoever gets the file is not on this machine.
        names = (PurePath(source).name.removesuffix(".safetensors") for source in sources)
        kept[_MERGED_FROM] = ",".join(dict.fromkeys(names))
    if metadata.get("format") in _FRAMEWORKS:
        kept["format"] = metadata["format"]
    return kept
