"""From models and data to a file of coefficients, a recipe that applies it, and a report with its controls.

<output>/coefficients.safetensors    the coefficients
<output>/recipe.yaml                 applies them
<output>/buffers/                    running statistics that were estimated anew, where the model has batch norms
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_px.artefacts.coefficients import COEFFICIENTS_FILE, CoefficientTable, write_table
from mergekit_px.checkpoint.whole import write_tensors
from mergekit_px.errors import DivergedError, UsageError
from mergekit_px.learn.data import Examples, split_rows
from mergekit_px.learn.data_files import load_data_and_labels
from mergekit_px.learn.labels import Reading, read_labels
from mergekit_px.learn.life import Run
from mergekit_px.learn.memory import COMPUTED, floating, numbers, plan_memory, stored_bytes
from mergekit_px.learn.models import LearningModel
from mergekit_px.learn.ofasd.batch_norm import batch_norms
from mergekit_px.learn.ofasd.blend import Blend, check_sources, find_sites, parameters_of
from mergekit_px.learn.ofasd.blocks import make_blocks
from mergekit_px.learn.ofasd.ensemble import Ensemble, ensemble
from mergekit_px.learn.ofasd.learner import Learner
from mergekit_px.learn.ofasd.scores import Bench, teacher_scores, warnings_about
from mergekit_px.learn.ofasd.settings import OfasdReport, OfasdSettings
from mergekit_px.learn.output import write_text
from mergekit_px.learn.sources import require_same_tokens
from mergekit_px.learn.training import Progress


def fit(run: Run[OfasdSettings]) -> OfasdReport:
    """Learn coefficients and write them, with a recipe that applies them.

    Raises:
        UsageError, InputError, PlanError: what is asked cannot be done.
        DivergedError: a loss was not finite; the best coefficients before it are written.
    """
    shares = _shares(run.settings)
    base, sources, device = run.checkpoint("base"), run.checkpoints("sources"), run.device
    resident = 0 if run.settings.stream else stored_bytes(base) + sum(map(stored_bytes, sources))
    needed = {"weights": COMPUTED * numbers(floating(base)), "base and sources": resident}
    plan_memory(run, floating(base), needed, {"use --stream": bool(resident)})
    data, labelled = load_data_and_labels(run.settings.data, base, run.settings.text, run.note)
    settings = run.settings = run.settings.filled(labelled=labelled)
    control = _control(run)
    check_sources(base, sources)
    require_same_tokens(base, sources)
    model = run.model()
    module = model.module
    sites = find_sites(model)
    for site in sites:
        if site.is_parameter:
            site.target.requires_grad_()
    dtype = sites[0].target.dtype
    data, reading = read_labels(module, data, device, dtype, labelled=labelled)
    if control is not None:
        control, _ = read_labels(module, control, device, dtype)
    parameters, buffers = parameters_of(sites)
    blend = Blend(sites, make_blocks(parameters, buffers, settings), base, sources, stream=settings.stream)
    try:
        teacher = None
        if settings.objective == "distill":
            run.note(f"predictions of {len(sources)} sources on {len(data)} examples")
            teacher = ensemble(blend, module, data, shares, settings, device)
        kept = {"validation": settings.validation, "test": settings.test}
        rows = split_rows(len(data), kept, settings.seed, data.where)
        parts = _parts(data, control, rows, teacher, settings)
        return _Fit(run, model, blend, parts, shares).report(teacher, rows["test"], reading, labelled=labelled)
    finally:
        blend.close()


@dataclass
class _Fit:
    """The coefficients that were asked for and the isotropic ones beside them."""

    run: Run[OfasdSettings]
    model: LearningModel
    blend: Blend
    parts: Mapping[str, Examples]
    shares: Sequence[float]

    def report(self, teacher: Ensemble | None, test: Tensor, reading: Reading, *, labelled: bool) -> OfasdReport:
        """Learn, write the result, and score it beside its controls."""
        settings = self.run.settings
        learner = self._learner(self.blend)
        progress = self._learned(learner, "anisotropic", learner)
        bench = Bench(learner, labelled=labelled, has_control="control" in self.parts)
        equal = torch.full_like(learner.best, 1 / len(self.shares))
        scores = {}
        if settings.controls != "none":
            scores = {"base": bench.score(torch.zeros_like(equal)), "average": bench.score(equal)}
            if settings.counts:
                scores["weighted average"] = bench.score(torch.tensor(self.shares).double()[:, None].expand_as(equal))
        if settings.controls == "all" and settings.granularity != "model":
            scores["isotropic"] = self._isotropic(bench, learner)
        scores["learned"] = bench.score(learner.best)
        write_result(self.run, self.model, learner)  # the model is settled at the best coefficients
        of_teacher = None
        if teacher is not None:
            of_teacher = teacher_scores(teacher, test, self.parts["test"], settings.sources, labelled=labelled)
        blocks = self.blend.blocks
        return OfasdReport(
            sources=list(settings.sources),
            shares=list(self.shares),
            labels=reading.kind if labelled else None,
            examples={part: len(one) for part, one in self.parts.items()},
            steps=progress.step,
            best_step=progress.best_step,
            best_validation_score=progress.best_score,
            trace=progress.ranks,
            test=scores,
            teacher=of_teacher,
            warnings=warnings_about(scores, of_teacher),
            coefficients={
                name: learner.best[:, column].tolist()
                for column, name in enumerate(blocks.names)
                if settings.granularity != "random"
            },
            recipe=str(self.run.output / RECIPE_FILE),
        )

    def _learner(self, blend: Blend) -> Learner:
        settings = self.run.settings
        initial = torch.tensor(self.shares, dtype=torch.float64)[:, None].repeat(1, len(blend.blocks.names))
        if settings.initial is not None:
            initial[:, torch.tensor(blend.blocks.learned)] = settings.initial
        return Learner(blend, self.model.module, self.parts, initial, settings, self.run.device)

    def _isotropic(self, bench: Bench, asked_for: Learner) -> dict[str, float]:
        parameters, buffers = parameters_of(self.blend.sites)
        whole = {"granularity": "model", "groups": (), "random_groups": 1}
        blocks = make_blocks(parameters, buffers, self.run.settings.model_copy(update=whole))
        learner = self._learner(self.blend.with_blocks(blocks))
        self._learned(learner, "isotropic", asked_for)
        return bench.of(learner).score(learner.best)

    def _learned(self, learner: Learner, name: str, asked_for: Learner) -> Progress:
        """What came of a learner; where it diverges, the best that was asked for so far is written."""
        run = self.run
        run.note(f"learning {int(sum(learner.blend.blocks.learned)) * len(self.shares)} {name} coefficients")
        try:
            return learner.run(run.work / f"{name}.safetensors", run.identity, run.tell)
        except DivergedError as error:
            asked_for.settle(asked_for.best)
            write_result(run, self.model, asked_for)
            where = "" if learner is asked_for else f" of the {name} coefficients"
            kept = f"the coefficients of step {asked_for.training.progress.best_step}, the best before, are kept"
            raise DivergedError(
                f"{error.what}{where}; {kept}",
                where=str(run.output),
                hint="lower the learning rate and start over with --overwrite",
            ) from error


def _control(run: Run[OfasdSettings]) -> Examples | None:
    settings, place = run.settings, run.settings.control_data
    if (settings.objective == "negation") != (place is not None):
        raise UsageError("the objective negation and control data go together")
    if place is None:
        return None
    control, labelled = load_data_and_labels(place, run.checkpoint("base"), settings.text)
    if not labelled:
        raise UsageError("the control data needs labels", where=place)
    return control


def _shares(settings: OfasdSettings) -> list[float]:
    count, counts = len(settings.sources), settings.counts
    if count == 0:
        raise UsageError("at least one source is needed")
    if not counts:
        return [1 / count] * count
    if len(counts) != count:
        raise UsageError(f"{len(counts)} counts of examples for {count} sources")
    total = sum(counts)
    if min(counts) < 0 or not 0 < total < float("inf"):
        raise UsageError("counts of examples are not negative, and one at least is above 0")
    return [one / total for one in counts]


def _parts(
    data: Examples,
    control: Examples | None,
    rows: Mapping[str, Tensor],
    teacher: Ensemble | None,
    settings: OfasdSettings,
) -> dict[str, Examples]:
    """``train``, ``validation`` and ``test`` of the data, with what the teacher says, and of the control data."""
    if teacher is not None:
        data = Examples({**data.arrays, **teacher.arrays}, data.where)
    parts = {name: data.take(numbers) for name, numbers in rows.items()}
    if control is not None:
        shares = {"control_validation": settings.validation, "control_test": settings.test}
        drawn = split_rows(len(control), shares, settings.seed, control.where)
        drawn["control"] = drawn.pop("train")
        parts.update({name: control.take(numbers) for name, numbers in drawn.items()})
    return parts


RECIPE_FILE = "recipe.yaml"
BUFFERS = "buffers"


def write_result(run: Run[OfasdSettings], model: LearningModel, learner: Learner) -> None:
    """Write the best coefficients of a learner, and the recipe that applies them; the model is settled at them.

    Raises:
        WriteError: the disk refuses.
    """
    blocks = learner.blend.blocks
    values = tuple(tuple(row) for row in learner.best.tolist())
    table = CoefficientTable(tuple(run.settings.sources), blocks.names, blocks.tensors, blocks.seed, values)
    write_table(table, run.stage / COEFFICIENTS_FILE)
    estimated = _running_statistics(model) if learner.settings.batch_norm == "reestimate" else []
    if estimated:
        _write_buffers(run, model, estimated)
    write_text(run.stage / RECIPE_FILE, _recipe(run, learner, estimated))


def _running_statistics(model: LearningModel) -> list[str]:
    """The names in the checkpoint of the running means and variances."""
    inner = {
        f"{name}.{kind}" if name else kind
        for name in batch_norms(model.module)
        for kind in ("running_mean", "running_var")
    }
    return [name for name, own in model.names.items() if own in inner]


def _write_buffers(run: Run[OfasdSettings], model: LearningModel, names: list[str]) -> None:
    tensors = model.tensors()
    folder = run.stage / BUFFERS
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", {name: tensors[name] for name in names}, {"format": "pt"})


def _recipe(run: Run[OfasdSettings], learner: Learner, estimated: list[str]) -> str:
    """The merge as a recipe, with the inputs as they were named and the coefficients beside it."""
    import yaml

    sources = {f"source{number}": reference for number, reference in enumerate(run.settings.sources)}
    split = any(count > 1 for _, count in learner.blend.blocks.tensors.values())
    step: dict[str, Any] = {
        "method": "anisotropic_groups" if split else "anisotropic",
        "base": "base",
        "sources": list(sources),
        "params": {"coefficients": COEFFICIENTS_FILE},
    }
    models = {"base": run.settings.base, **sources}
    if estimated:
        models[BUFFERS] = str(run.output / BUFFERS)
        step["rules"] = [{"match": name, "take": BUFFERS} for name in estimated]
    return yaml.safe_dump({"pxmerge": 1, "models": models, "merge": step}, sort_keys=False, allow_unicode=True)
