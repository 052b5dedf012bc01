"""From a file of components and data to a tuned model, an artefact and a report.

<output>/components.safetensors    the components with their values tuned
<output>/model/                    the model that they make
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from mergekit_px.checkpoint.task_vector import BASE_KEY, COMPONENTS_KIND, KIND_KEY
from mergekit_px.checkpoint.whole import write_tensors
from mergekit_px.errors import DivergedError, InputError
from mergekit_px.learn.data import Batch, Examples
from mergekit_px.learn.life import Run
from mergekit_px.learn.memory import floating, is_narrow, narrow_bytes, plan_memory
from mergekit_px.learn.objective import evaluate, loss_function
from mergekit_px.learn.output import write_model
from mergekit_px.learn.outputs import passes
from mergekit_px.learn.training import Schedule, Training, label_share, step_batches
from mergekit_px.learn.tune.components import read_components
from mergekit_px.learn.tune.settings import TuneReport, TuneSettings
from mergekit_px.learn.tune.substitution import TunedValues

ARTEFACT = "components.safetensors"
MODEL = "model"
_STATE = "state.safetensors"
_PASSES = 10
"""Over the data, where no number of steps is asked for: as many epochs as AXIS trains."""


def fit(run: Run[TuneSettings]) -> TuneReport:
    """Tune; a loss that is not finite ends it, and what was best until then is written.

    Raises:
        UsageError, InputError, PlanError: settings, files or a model that do not fit.
        DivergedError: the loss was not finite.
    """
    settings, device = run.settings, run.device
    base = run.checkpoint("base")
    pool = Path(settings.components).expanduser()
    size = sum(one.stat().st_size for one in (pool.glob("*.safetensors") if pool.is_dir() else [pool]))
    kept = {"weights": narrow_bytes(base), "components": 2 * size}
    plan_memory(
        run, floating(base), kept, {"store the base in bfloat16": not is_narrow(base), "pool fewer components": True}
    )
    components = read_components(settings.components)
    base_print = run.fingerprint("base")
    if components.base_fingerprint not in (None, base_print) and not settings.allow_base_mismatch:
        raise InputError(
            f"the components are of an update of another base than {settings.base}",
            where=components.where,
            hint="give the base that it was taken from, or --allow-base-mismatch",
        )
    parts = run.parts()
    if "validation" not in parts:
        raise InputError(
            "values are chosen on validation data, and none is left", where=settings.data, hint="--validation 0.2"
        )
    model = run.model(narrow=True)
    parts, reading = run.labelled(model, parts)

    def score(module: nn.Module, part: Examples) -> dict[str, float]:
        return evaluate(module, part, 4 * settings.batch, device, settings.precision, own_loss=reading.own_loss)

    def scored(module: nn.Module) -> dict[str, dict[str, float]]:
        return {part: score(module, held) for part, held in parts.items() if part != "train"}

    scores = {"base": scored(model.module)}
    values = TunedValues(model, components, top=settings.top, core=settings.core, match=settings.match)
    scores["components"] = scored(model.module)
    loss_of = loss_function("auto", allow_code=False, own_loss=reading.own_loss)

    def loss(part: Batch, whole: Batch) -> Tensor:
        with passes(device, settings.precision):
            return loss_of(model.module, part) * label_share(part, whole)

    epoch = max(1, len(parts["train"]) // (settings.batch * settings.accumulate))
    schedule = Schedule(
        settings.steps or _PASSES * epoch,
        settings.evaluate_every or epoch,
        settings.learning_rate,
        settings.weight_decay,
        settings.clip,
    )
    training = Training(
        {"values": values.values},
        [(step_batches(parts["train"], settings, "tune"), loss)],
        lambda: score(model.module, parts["validation"]),
        schedule,
        batch=settings.batch,
        device=device,
    )
    stopped = None
    try:
        training.run(run.work / _STATE, run.identity, run.tell)
    except DivergedError as error:
        stopped = error.what
    progress = training.progress
    write_tensors(run.stage / ARTEFACT, values.artefact(), {KIND_KEY: COMPONENTS_KIND, BASE_KEY: base_print})
    values.write()
    scores["tuned"] = scored(model.module)
    write_model(model, run.stage / MODEL, run.identity)
    report = TuneReport(
        labels=reading.kind,
        trained_values=values.values.numel(),
        examples={part: len(held) for part, held in parts.items()},
        steps=progress.step,
        selected_step=progress.best_step,
        stopped=stopped,
        trace=[{"step": step, "loss": loss, "validation": scores} for step, loss, scores in progress.trace[1:]],
        scores=scores,
        changes=values.changes(),
    )
    if stopped is not None:
        run.report(report)
        raise DivergedError(
            f"{stopped}; what was best on validation until then (step {progress.best_step}) is kept",
            where=str(run.output),
            hint="start over with a lower --learning-rate and --overwrite",
        )
    return report
