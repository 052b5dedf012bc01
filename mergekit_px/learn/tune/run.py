"""From a file of components and data to a tuned model, an artefact and a report.

<output>/components.safetensors    the components with their values tuned
<output>/model/                    the model that they make
"""

from __future__ import annotations

import torch
from torch import nn

from mergekit_px.checkpoint.task_vector import BASE_KEY, COMPONENTS_KIND, KIND_KEY
from mergekit_px.checkpoint.tensor_file import write_tensors
from mergekit_px.errors import DivergedError, InputError
from mergekit_px.learn.life import Run
from mergekit_px.learn.output import write_model
from mergekit_px.learn.tune.components import read_components
from mergekit_px.learn.tune.settings import TuneReport, TuneSettings
from mergekit_px.learn.tune.substitution import TunedValues
from mergekit_px.learn.tune.training import Training, evaluate

ARTEFACT = "components.safetensors"
MODEL = "model"
_STATE = "state.safetensors"


def fit(run: Run[TuneSettings]) -> TuneReport:
    """Tune; a loss that is not finite ends it, and what was best until then is written.

    Raises:
        UsageError, InputError, PlanError: settings, files or a model that do not fit.
        DivergedError: the loss was not finite.
    """
    settings, device = run.settings, run.device
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
    model = run.model()
    parts, reading = run.labelled(model, parts)

    def scored(module: nn.Module) -> dict[str, dict[str, float]]:
        batch = 4 * settings.batch
        return {
            part: evaluate(module, held, batch, device, settings.precision, own_loss=reading.own_loss)
            for part, held in parts.items()
            if part != "train"
        }

    scores = {"base": scored(model.module)}
    values = TunedValues(model, components, top=settings.top, core=settings.core, match=settings.match)
    with torch.no_grad():
        scores["components"] = scored(values.substituted())
    training = Training(
        values,
        parts["train"],
        parts["validation"],
        settings,
        device=device,
        state=run.work / _STATE,
        identity=run.identity,
        own_loss=reading.own_loss,
    )
    progress = training.run(run.tell)
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
        stopped=progress.stopped,
        trace=[{"step": step, "loss": loss, "validation": score} for step, loss, score in progress.trace],
        scores=scores,
    )
    if progress.stopped is not None:
        run.report(report)
        raise DivergedError(
            f"{progress.stopped}; what was best on validation until then (step {progress.best_step}) is kept",
            where=str(run.output),
            hint="start over with a lower --learning-rate and --overwrite",
        )
    return report
