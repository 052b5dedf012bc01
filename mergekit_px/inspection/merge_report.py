"""What a merge was: inputs, decisions, changes, warnings and speed, for the page and the JSON of ``pxmerge report``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergekit_px._version import __version__
from mergekit_px.checkpoint.destination import destination
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.declare.document import Document
from mergekit_px.errors import UsageError
from mergekit_px.execute.provenance import card_inputs
from mergekit_px.execute.run import fetch_inputs
from mergekit_px.inspection.changes import Changes, measure_changes
from mergekit_px.inspection.rebuild import plan_again
from mergekit_px.inspection.verify import verify
from mergekit_px.methods import find_method
from mergekit_px.plan.layers import Place, depth, place_of, stack_sizes
from mergekit_px.plan.model import Plan, WorkItem
from mergekit_px.plan.rules import matching

if TYPE_CHECKING:
    from mergekit_px.execute.events import RunResult
    from mergekit_px.recipe.model import Rule


class InputSummary(Document):
    """An input of the merge.

    Attributes:
        reference: the repository on the Hub, or the last part of a local path.
        commit: None for files of this machine.
        license: None where no card tells it.
        adapters: how many are on top of it.
    """

    name: str
    reference: str
    commit: str | None
    license: str | None
    is_base: bool
    adapters: int
    tensors: int
    parameters: int
    bytes: int


class MethodSummary(Document):
    """A merge method that was used."""

    name: str
    summary: str
    paper: str | None


class Decision(Document):
    """What was decided for a group of tensors.

    Attributes:
        action: ``merged``, or how else the tensors came into the output.
        methods: the steps and methods that make them, in their order, with their steps if there are several.
        source: the input that they are of, where nothing is merged.
        rules: the rules of the recipe that matched.
        parameters: of the methods, where they are not the defaults; a range where they differ over the group.
        weights: of the sources.
        modules: names of the modules, with their layers.
    """

    action: Literal["merged", "copied", "converted"]
    methods: list[str]
    source: str | None
    rules: list[str]
    parameters: dict[str, str]
    weights: dict[str, str]
    tensors: int
    elements: int
    modules: list[str]


class Speed(Document):
    """How the run went."""

    seconds: float
    bytes_read: int
    bytes_written: int
    peak_memory: int


class MergeReport(Document):
    """A merge from its inputs to its bytes.

    Attributes:
        title: the name of the output.
        speed: of the run that the report was asked of; None for a report on a finished merge.
        dropped: tensors of inputs that are not in the output, by reason.
    """

    pxmerge: str
    title: str
    kind: Literal["model", "task vector"]
    plan_hash: str
    seed: int
    inputs: list[InputSummary]
    methods: list[MethodSummary]
    decisions: list[Decision]
    dropped: dict[str, int]
    changes: Changes
    notes: list[str]
    warnings: list[str]
    speed: Speed | None


def report_on(
    directory: Path, *, allow_pickle: bool = False, progress: Callable[[int, int], None] = lambda done, total: None
) -> MergeReport:
    """The report of a finished merge, from its recipe, its lock file, and its inputs, which are read again.

    Raises:
        InputNotFoundError: no lock file, no recipe.
        InputError: an input is gone, or is not what was locked.
        PlanError, RecipeError: the recipe cannot be planned any more.
    """
    plan = fetch_inputs(plan_again(directory, directory, allow_pickle=allow_pickle))
    found = verify(directory)
    warnings = [f"{name} is not what was merged" for name in (*found.changed, *found.missing)]
    if plan.lock is not None and plan.lock.plan_hash != plan.hash:
        warnings.append("the plan is another than that of the lock file: recipe or options changed since")
    return merge_report(plan, directory, warnings=warnings, progress=progress)


def merge_report(
    plan: Plan,
    directory: Path,
    *,
    result: RunResult | None = None,
    warnings: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """The report of a merge whose plan is known, its inputs on this machine.

    Raises:
        InputError: a tensor that cannot be read.
        UsageError: the merge is of tensors in memory.
    """
    if any(source.state is not None for source in plan.inputs.values()):
        raise UsageError("a report is about a merge of files")
    reasons = [drop.reason for drop in plan.dropped]
    used = {node.method.name for item in plan.items for node in item.applied}
    return MergeReport(
        pxmerge=__version__,
        title=destination(directory).file or directory.resolve().name,
        kind="task vector" if plan.kind == "delta" else "model",
        plan_hash=plan.hash,
        seed=plan.seed,
        inputs=_inputs(plan),
        methods=[_method(name) for name in sorted(used)],
        decisions=_decisions(plan),
        dropped={reason: reasons.count(reason) for reason in dict.fromkeys(reasons)},
        changes=measure_changes(plan, open_checkpoint(directory), progress),
        notes=list(plan.notes),
        warnings=[*warnings, *(() if result is None else result.warnings)],
        speed=_speed(result),
    )


def _inputs(plan: Plan) -> list[InputSummary]:
    return [
        InputSummary(
            name=known.name,
            reference=known.shown,
            commit=known.commit,
            license=known.license,
            is_base=known.is_base,
            adapters=len(source.adapters),
            tensors=len(source.checkpoint.tensors),
            parameters=sum(tensor.elements for tensor in source.checkpoint.tensors.values()),
            bytes=source.checkpoint.nbytes,
        )
        for known, source in zip(card_inputs(plan), plan.inputs.values(), strict=True)
    ]


def _method(name: str) -> MethodSummary:
    method = find_method(name)
    return MethodSummary(name=name, summary=method.summary, paper=method.paper)


def _speed(result: RunResult | None) -> Speed | None:
    if result is None or result.up_to_date:
        return None
    return Speed(
        seconds=result.seconds,
        bytes_read=result.bytes_read,
        bytes_written=result.bytes_written,
        peak_memory=result.peak_memory,
    )


@dataclass
class _Group:
    """Tensors that were decided alike, but for values that vary over the layers."""

    items: list[WorkItem] = field(default_factory=list)
    parameters: dict[str, list[str]] = field(default_factory=dict)
    weights: dict[str, list[float]] = field(default_factory=dict)


def _decisions(plan: Plan) -> list[Decision]:
    sizes = stack_sizes(item.name for item in plan.items)
    groups: dict[tuple[Any, ...], _Group] = {}
    for item in plan.items:
        methods = tuple(
            node.method.name if len(plan.steps) == 1 else f"{node.step}: {node.method.name}" for node in item.applied
        )
        source = None if methods else ", ".join(dict.fromkeys(read.model for read in item.reads))
        key = (methods, source, item.action, tuple(_rules(plan, item, sizes)))
        group = groups.setdefault(key, _Group())
        group.items.append(item)
        for node in item.applied:
            step = f"{node.step}: " if len(plan.steps) > 1 else ""
            changed = node.params.model_dump(
                mode="json", exclude_defaults=True, exclude=set(node.method.artefact_fields())
            )
            for name, value in changed.items():
                group.parameters.setdefault(f"{step}{name}", []).append(_shown(value))
            names = list(plan.loaded.recipe.steps[node.step].sources) if node.step in plan.loaded.recipe.steps else []
            for place, weight in zip(node.source_indices, node.weights, strict=False):
                label = names[place] if place < len(names) else str(place)
                group.weights.setdefault(f"{step}{label}", []).append(weight)
    return [
        Decision(
            action="merged" if methods else {"copy": "copied", "convert": "converted", "merge": "converted"}[action],
            methods=[*methods],
            source=source,
            rules=[*rules],
            parameters={name: _spread(values) for name, values in group.parameters.items()},
            weights={name: _range(values) for name, values in group.weights.items()},
            tensors=len(group.items),
            elements=sum(item.elements for item in group.items),
            modules=_modules(group.items),
        )
        for (methods, source, action, rules), group in groups.items()
    ]


def _rules(plan: Plan, item: WorkItem, sizes: Mapping[str, int]) -> Iterator[str]:
    """The rules that matched a tensor of the output, but for those by depth where slices have depths of their own."""
    for step in plan.loaded.recipe.steps.values():
        rules = [rule for rule in step.rules if not (step.slices and rule.depth)]
        for index in matching(rules, item.name, depth(item.name, sizes)):
            yield _rule(rules[index])


def _rule(rule: Rule) -> str:
    return _shown(rule.model_dump(mode="json", exclude_defaults=True))


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_shown(part)}" for name, part in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _spread(values: Sequence[str]) -> str:
    different = list(dict.fromkeys(values))
    return different[0] if len(different) == 1 else f"{different[0]} to {different[-1]}"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _modules(items: Sequence[WorkItem]) -> list[str]:
    """``model.layers.0-31 mlp.up_proj`` for the tensors of such names."""
    layers: dict[tuple[str, str], list[int]] = {}
    for item in items:
        place: Place = place_of(item.name)
        known = layers.setdefault((place.stack, place.module), [])
        if place.layer is not None:
            known.append(place.layer)
    return [
        f"{stack}.{_numbers(numbers)} {module}" if numbers else module for (stack, module), numbers in layers.items()
    ]


def _numbers(numbers: Sequence[int]) -> str:
    """``0-3,7`` for the layers 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
