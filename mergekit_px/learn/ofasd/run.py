"""From models and data to a file of coefficients, a recipe that applies it, and a report with its controls.

<output>/coefficients.safetensors    the coefficients
<output>/recipe.yaml                 applies them
<output>/buffers/                    running statistics that were estimated anew, where the model has batch norms
<output>/report.json                 settings, hashes, trace, scores on test data
<output>/.ofasd/                     states of an unfinished run
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.errors import DivergedError, UsageError
from mergekit_px.learn.artefact import write_json
from mergekit_px.learn.data import Examples, split_rows
from mergekit_px.learn.data_files import data_sha256, load_data_and_labels
from mergekit_px.learn.folder import working_folder
from mergekit_px.learn.labels import read_labels
from mergekit_px.learn.models import LearningModel, find_checkpoint, load_model
from mergekit_px.learn.ofasd.blend import Blend, check_sources, find_sites, parameters_of
from mergekit_px.learn.ofasd.blocks import make_blocks
from mergekit_px.learn.ofasd.ensemble import Ensemble, ensemble
from mergekit_px.learn.ofasd.learner import Course, Learner, Tell
from mergekit_px.learn.ofasd.output import write_result
from mergekit_px.learn.ofasd.scores import Bench, teacher_scores, warnings_about
from mergekit_px.learn.ofasd.settings import OfasdOptions, Settings
from mergekit_px.learn.sources import find_source, require_same_tokens, source_fingerprint, stored_source

UNFINISHED = ".ofasd"
REPORT_FILE = "report.json"

_HASH_VERSION = 1


@dataclass(frozen=True)
class LearnedCoefficients:
    """A finished run: its folder, and the report as plain data."""

    output: Path
    report: Mapping[str, Any]


def learn_coefficients(
    options: OfasdOptions, say: Callable[[str], None] = lambda line: None, tell: Tell = lambda step, loss: None
) -> LearnedCoefficients:
    """Learn coefficients and write them, with a recipe that applies them and a report.

    Args:
        say: gets a line for each stage.
        tell: gets number and loss of each step.

    Raises:
        UsageError, InputError, PlanError: what is asked cannot be done.
        DivergedError: a loss was not finite; the best coefficients before it are written.
        KeyboardInterrupt: passed on; mode ``resume`` goes on from the last look at the validation data.
    """
    from mergekit_px.execute.lane import pick_device

    started = time.monotonic()
    device = pick_device(options.device)
    shares = _shares(options)
    base = find_checkpoint(options.base, allow_pickle=options.allow_pickle)
    data, labelled = load_data_and_labels(options.data, base, options.text, say)
    settings = options.settings.filled(labelled=labelled)
    control = _control(options, settings, base)
    sources = [find_source(one, base, allow_pickle=options.allow_pickle) for one in options.sources]
    check_sources(base, sources)
    require_same_tokens(base, sources)
    plan_hash = _plan_hash(options, settings, base, sources, device)
    with working_folder(options.output, UNFINISHED, options.mode, {"plan_hash": plan_hash}) as work:
        model = load_model(base, options.model, allow_code=options.allow_code)
        module = model.module.to(device).eval()
        sites = find_sites(model)
        for site in sites:
            if site.is_parameter:
                site.target.requires_grad_()
        dtype = sites[0].base.dtype
        data, reading = read_labels(module, data, device, dtype, labelled=labelled)
        if control is not None:
            control, _ = read_labels(module, control, device, dtype)
        parameters, buffers = parameters_of(sites)
        blend = Blend(sites, make_blocks(parameters, buffers, settings), sources, stream=options.stream)
        try:
            teacher = None
            if settings.objective == "distill":
                say(f"predictions of {len(sources)} sources on {len(data)} examples")
                teacher = ensemble(blend, module, data, shares, settings, device)
            rows = split_rows(len(data), {"validation": settings.validation, "test": settings.test}, settings.seed,
                              data.where)  # fmt: skip
            parts = _parts(data, control, rows, teacher, settings)
            run = _Run(options, settings, model, blend, parts, shares, device, work, plan_hash, say, tell)
            report = run.report(teacher, rows["test"], labelled=labelled)
        finally:
            blend.close()
        report["labels"] = reading.kind if labelled else None
        report["inputs"] = _inputs(options, base, sources)
        report["seconds"] = round(time.monotonic() - started, 3)
        report = json.loads(json.dumps(report))  # plain data, as it will be read back
        write_json(options.output / REPORT_FILE, report)
        for state in work.glob("*.safetensors"):
            state.unlink()
    return LearnedCoefficients(options.output, report)


@dataclass
class _Run:
    """The coefficients that were asked for and the isotropic ones beside them."""

    options: OfasdOptions
    settings: Settings
    model: LearningModel
    blend: Blend
    parts: Mapping[str, Examples]
    shares: Sequence[float]
    device: torch.device
    work: Path
    plan_hash: str
    say: Callable[[str], None]
    tell: Tell

    def report(self, teacher: Ensemble | None, test: Tensor, *, labelled: bool) -> dict[str, Any]:
        """Learn, write the result, and score it beside its controls."""
        learner = self._learner(self.blend)
        course = self._learned(learner, "anisotropic", learner)
        bench = Bench(learner, labelled=labelled, has_control="control" in self.parts)
        count = len(self.shares)
        equal = torch.full_like(course.values, 1 / count)
        scores = {"base": bench.score(torch.zeros_like(equal)), "average": bench.score(equal)}
        if self.options.counts is not None:
            scores["weighted average"] = bench.score(torch.tensor(self.shares).double()[:, None].expand_as(equal))
        if self.options.compare and self.settings.granularity != "model":
            scores["isotropic"] = self._isotropic(bench, learner)
        scores["learned"] = bench.score(course.best)
        write_result(self.options, self.model, learner, course)  # the model is settled at the best coefficients
        of_teacher = None
        if teacher is not None:
            of_teacher = teacher_scores(teacher, test, self.parts["test"], self.options.sources, labelled=labelled)
        blocks = self.blend.blocks
        return {
            "settings": asdict(self.settings),
            "sources": list(self.options.sources),
            "shares": list(self.shares),
            "examples": {part: len(one) for part, one in self.parts.items()},
            "steps": course.step,
            "best_step": course.best_step,
            "best_validation_score": course.best_score,
            "trace": [list(entry) for entry in course.trace],
            "test": scores,
            "teacher": of_teacher,
            "warnings": warnings_about(scores, of_teacher),
            "coefficients": {
                name: course.best[:, column].tolist()
                for column, name in enumerate(blocks.names)
                if self.settings.granularity != "random"
            },
        }

    def _learner(self, blend: Blend) -> Learner:
        columns = len(blend.blocks.names)
        initial = torch.tensor(self.shares, dtype=torch.float64)[:, None].repeat(1, columns)
        if self.settings.initial is not None:
            initial[:, torch.tensor(blend.blocks.learned)] = self.settings.initial
        return Learner(blend, self.model.module, self.parts, initial, self.settings, self.device)

    def _isotropic(self, bench: Bench, asked_for: Learner) -> dict[str, float]:
        parameters, buffers = parameters_of(self.blend.sites)
        settings = replace(self.settings, granularity="model", groups=(), random_groups=1)
        learner = self._learner(self.blend.with_blocks(make_blocks(parameters, buffers, settings)))
        course = self._learned(learner, "isotropic", asked_for)
        return bench.of(learner).score(course.best)

    def _learned(self, learner: Learner, name: str, asked_for: Learner) -> Course:
        """What came of a learner; where it diverges, the best that was asked for so far is written."""
        self.say(f"learning {int(sum(learner.blend.blocks.learned)) * len(self.shares)} {name} coefficients")
        try:
            return learner.run(self.work / f"{name}.safetensors", self.plan_hash, self.tell)
        except DivergedError as error:
            asked_for.settle(asked_for.course.best)
            write_result(self.options, self.model, asked_for, asked_for.course)
            where = "" if learner is asked_for else f" of the {name} coefficients"
            kept = f"the coefficients of step {asked_for.course.best_step}, the best before, are kept"
            raise DivergedError(
                f"{error.what}{where}; {kept}",
                where=str(self.options.output),
                hint="lower the learning rate and start over with --overwrite",
            ) from error


def _control(options: OfasdOptions, settings: Settings, base: Checkpoint) -> Examples | None:
    if (settings.objective == "negation") != (options.control is not None):
        raise UsageError("the objective negation and control data go together")
    if options.control is None:
        return None
    control, labelled = load_data_and_labels(options.control, base, options.text)
    if not labelled:
        raise UsageError("the control data needs labels", where=options.control)
    return control


def _shares(options: OfasdOptions) -> list[float]:
    count = len(options.sources)
    if count == 0:
        raise UsageError("at least one source is needed")
    if options.counts is None:
        return [1 / count] * count
    if len(options.counts) != count:
        raise UsageError(f"{len(options.counts)} counts of examples for {count} sources")
    total = sum(options.counts)
    if min(options.counts) < 0 or not 0 < total < float("inf"):
        raise UsageError("counts of examples are not negative, and one at least is above 0")
    return [one / total for one in options.counts]


def _parts(
    data: Examples,
    control: Examples | None,
    rows: Mapping[str, Tensor],
    teacher: Ensemble | None,
    settings: Settings,
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


def _plan_hash(
    options: OfasdOptions, settings: Settings, base: Checkpoint, sources: Sequence[Checkpoint], device: torch.device
) -> str:
    """Names all that the coefficients depend on, so that a run goes on only with the same."""
    document = {
        "version": _HASH_VERSION,
        "settings": asdict(settings),
        "models": [source_fingerprint(one) for one in (base, *sources)],
        "text": asdict(options.text),
        "counts": None if options.counts is None else list(options.counts),
        "files": _file_hashes(options),
        "device": device.type,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _file_hashes(options: OfasdOptions) -> dict[str, str]:
    """sha256 of the data and of the code that makes the model."""
    named = [options.data, options.control, options.model and options.model.rpartition(":")[0]]
    return {path: data_sha256(path) for path in sorted(filter(None, named)) if Path(path).expanduser().exists()}


def _inputs(options: OfasdOptions, base: Checkpoint, sources: Sequence[Checkpoint]) -> dict[str, Any]:
    """sha256 of every file that was read, by input."""
    found: dict[str, Any] = {"files": _file_hashes(options)}
    names = [options.base, *options.sources]
    for name, checkpoint in zip(names, (base, *sources), strict=True):
        stored = stored_source(checkpoint)
        if stored.directory is not None:
            found[name] = {file: file_sha256(stored.directory / file) for file in stored.files}
    return found
