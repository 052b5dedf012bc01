"""The files of a result."""

from __future__ import annotations

from typing import Any

from mergekit_px.artefacts.coefficients import COEFFICIENTS_FILE, CoefficientTable, write_table
from mergekit_px.checkpoint.whole import write_tensors
from mergekit_px.learn.life import Run
from mergekit_px.learn.models import LearningModel
from mergekit_px.learn.ofasd.batch_norm import batch_norms
from mergekit_px.learn.ofasd.learner import Learner
from mergekit_px.learn.ofasd.settings import OfasdSettings
from mergekit_px.learn.output import write_text

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
