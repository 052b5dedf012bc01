"""From a model and data to a file of statistics, in one go or in several."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mergekit_px.checkpoint.task_vector import KIND_KEY
from mergekit_px.checkpoint.whole import write_tensors
from mergekit_px.errors import InputError
from mergekit_px.learn.data import Examples, drawn
from mergekit_px.learn.labels import read_labels
from mergekit_px.learn.life import Run
from mergekit_px.learn.memory import COMPUTED, floating, is_narrow, narrow_bytes, numbers, plan_memory
from mergekit_px.learn.models import LearningModel
from mergekit_px.learn.state import StateFile, under
from mergekit_px.learn.stats.experts import ExpertSums
from mergekit_px.learn.stats.fisher import FisherSums
from mergekit_px.learn.stats.gram import GramSums
from mergekit_px.learn.stats.settings import Kind, StatsReport, StatsSettings
from mergekit_px.learn.stats.sums import FINGERPRINT_KEY, STATISTICS_KIND, Tensors, add_up
from mergekit_px.methods.fisher import FISHER
from mergekit_px.methods.regmean import GRAM

_WORDS = {
    "fisher": "Fisher information, examples",
    "gram": "Gram matrices, examples",
    "experts": "Use of experts, examples",
}
_OWN_FORM = {"fisher", "gram"}
"""Statistics of tensors as the checkpoint has them."""

_AnySums = FisherSums | GramSums | ExpertSums


def fit(run: Run[StatsSettings]) -> StatsReport:
    """Measure a model and write its statistics.

    Raises:
        UsageError, InputError: settings, a model or data that do not fit.
        NonFiniteError: a statistic is not finite.
    """
    settings, checkpoint = run.settings, run.checkpoint("checkpoint")
    stored, fisher, gram = floating(checkpoint), "fisher" in settings.what, "gram" in settings.what
    kept = {
        "weights": narrow_bytes(checkpoint),
        "Fisher sums": COMPUTED * numbers(stored) if fisher else 0,
        "Gram sums": 2 * COMPUTED * sum(one.shape[1] ** 2 for one in stored if len(one.shape) == 2) if gram else 0,
    }
    ways = {
        "measure one of them at a time (--what)": fisher and gram,
        "store the model in bfloat16": not is_narrow(checkpoint),
    }
    plan_memory(run, floating(checkpoint), kept, ways)
    model = run.model("checkpoint", narrow=True)
    examples = drawn(run.data("data", "checkpoint"), settings.examples, settings.seed)
    examples, reading = read_labels(model.module, examples, run.device)
    if reading.kind == "values":
        raise InputError("labels are values, and statistics are taken for classes", where=examples.where)
    tensors = _measured(run, model, examples, StateFile(run.work / "sums.safetensors", run.identity))
    metadata = {KIND_KEY: STATISTICS_KIND, FINGERPRINT_KEY: run.fingerprint("checkpoint")}
    write_tensors(run.stage / run.output.name, tensors, metadata)
    return StatsReport(
        examples=len(examples),
        labels=reading.kind,
        fisher_trace=_total(tensors, FISHER.suffix),
        gram_trace={
            name.removesuffix(GRAM.suffix): float(tensor.diagonal().double().sum())
            for name, tensor in tensors.items()
            if name.endswith(GRAM.suffix)
        },
        without=sorted(set(checkpoint.tensors) - set(model.names)) if _OWN_FORM & set(settings.what) else [],
        unused_experts={
            name.removesuffix(".frequency"): unused
            for name, shares in tensors.items()
            if name.endswith(".frequency") and (unused := (shares == 0).nonzero().flatten().tolist())
        },
    )


def _measured(run: Run[StatsSettings], model: LearningModel, examples: Examples, state: StateFile) -> Tensors:
    """All statistics, by name with the suffix of their kind."""
    saved, info = state.load() if state.exists else ({}, {"batches": {}})
    batches: dict[str, int] = info["batches"]
    sums: dict[str, _AnySums] = {}
    for kind in dict.fromkeys(run.settings.what):
        fresh = _sums(kind, model, run)
        if kind in batches:
            fresh.restore(under(saved, f"{kind}."))
        sums[kind] = fresh

        def after(done: int, kind: Kind = kind) -> None:
            batches[kind] = done
            if state.due:
                parts = {f"{of}.{name}": one for of, part in sums.items() for name, one in part.state().items()}
                state.save(parts, {"batches": batches})

        def told(done: int, total: int, kind: Kind = kind) -> None:
            run.tell(_WORDS[kind], done, total)

        add_up(fresh, examples, told, first=batches.get(kind, 0), after=after)
    tensors: Tensors = {}
    for part in sums.values():
        if isinstance(part, FisherSums):
            tensors.update({name + FISHER.suffix: one for name, one in part.means(len(examples)).items()})
        elif isinstance(part, GramSums):
            tensors.update({name + GRAM.suffix: one for name, one in part.means().items()})
        else:
            tensors.update(part.means())
    if not tensors:
        raise InputError("the model has no linear layers whose weights are tensors of its checkpoint")
    return tensors


def _sums(kind: Kind, model: LearningModel, run: Run[StatsSettings]) -> _AnySums:
    settings, device = run.settings, run.device
    if kind == "fisher":
        return FisherSums(
            model, labels=settings.labels, seed=settings.seed, device=device, precision=settings.precision
        )
    make = ExpertSums if kind == "experts" else GramSums
    return make(model, batch=settings.batch, device=device, precision=settings.precision)


def _total(tensors: Mapping[str, Tensor], suffix: str) -> float:
    return sum(float(tensor.double().sum()) for name, tensor in tensors.items() if name.endswith(suffix))
