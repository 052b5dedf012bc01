"""Class prototypes on merged adapters: ACMap's centroid prototype mapping (CVPR 2025, arXiv 2412.18219).

prototypes    the table: one vector to a class, what it was measured under, and how far it moves
class_means   sums of features by class
arrays        data files, read an array at a time
sources       features under each merged adapter: from a file, or from a model
backbone      a model with the tensors of an adapter in it
readout       which output of a model the feature is
pending       the passes of an interrupted mapping
mapping       a task's prototypes into the state
drift         prototypes measured again on old data
classify      the nearest prototype by cosine
export        prototypes as the weights of a linear head, and merged adapters as files
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_px.learn.declare import learner

if TYPE_CHECKING:
    from mergekit_px.learn.acmap.settings import ClassifyReport, ClassifySettings, MapReport, MapSettings
    from mergekit_px.learn.life import Run


@learner("MapSettings", "MapReport", name="acmap map", form="state")
def map_(run: Run[MapSettings]) -> MapReport:
    """Add a task's class prototypes to the state, and move those of earlier tasks to the newest merged adapter.

    A prototype is the mean feature of a class under the merged adapter of its task; it is stored once. When a later
    adapter is merged, each earlier task's prototypes are moved by how far the mean feature of the new task's data
    moved between the two merged adapters (centroid prototype mapping, arXiv 2412.18219). No old data are needed.

    Features come from a file (features under the merged adapter of this task, features_1, features_2, ... under
    those of 1, 2, ... tasks, and labels) or from data and a model, which is run once for each of those adapters. The
    same file again changes nothing; after an interruption the same command goes on.

    Examples:
      pxmerge acmap map --state acmap.safetensors --features task2.npz
      pxmerge acmap map --state acmap.safetensors --data task2.npz --base ./vit
      pxmerge acmap map --state acmap.safetensors --data task2.npz --model vit.py:make --allow-code
      pxmerge acmap map --state acmap.safetensors --features task2.npz -o prototypes.safetensors
    """
    from mergekit_px.learn.acmap.export import require_new
    from mergekit_px.learn.acmap.mapping import MapOptions, map_task
    from mergekit_px.learn.acmap.settings import MapReport
    from mergekit_px.learn.acmap.sources import plan_features

    settings = run.settings
    output = None if settings.output is None else Path(settings.output)
    if output is not None:
        require_new(output, overwrite=settings.overwrite or settings.resume)
    options = MapOptions(
        state=Path(settings.state),
        features=settings.features,
        data=settings.data,
        task=settings.task,
        classes=settings.classes,
        oracle=settings.oracle,
        concatenate=settings.concatenate,
        model=settings.options(),
        resume=settings.resume,
        output=output,
    )
    plan_features(run)
    found = map_task(options, run.tell)
    return MapReport(**{name: value for name, value in found.items() if name != "versions"})


@learner("ClassifySettings", "ClassifyReport", name="acmap classify", form="state")
def classify_(run: Run[ClassifySettings]) -> ClassifyReport:
    """Classify examples by the nearest prototype: the largest cosine with f(x; A_t), over all classes so far.

    Without -o a line of JSON is printed for each example. With labels the accuracy by task and overall is shown.
    Features come from a file, or from data and the model that the prototypes were made with.

    Examples:
      pxmerge acmap classify --state acmap.safetensors --features test.npz
      pxmerge acmap classify --state acmap.safetensors --data test.npz --base ./vit -o predictions.npz
      pxmerge acmap classify --state acmap.safetensors --features test.npz --json | jq .accuracy
    """
    from mergekit_px.learn.acmap.classify import ClassifyOptions, write_predictions
    from mergekit_px.learn.acmap.classify import classify as classified
    from mergekit_px.learn.acmap.export import require_new
    from mergekit_px.learn.acmap.settings import ClassifyReport
    from mergekit_px.learn.acmap.sources import plan_features

    settings = run.settings
    if settings.output is not None:
        require_new(Path(settings.output), overwrite=settings.overwrite, suffix=".npz")
    options = ClassifyOptions(
        state=Path(settings.state),
        features=settings.features,
        data=settings.data,
        concatenate=settings.concatenate,
        mapped=settings.mapping,
        model=settings.options(),
    )
    plan_features(run)
    found = classified(options, run.tell)
    if settings.output is not None:
        write_predictions(found, Path(settings.output))
    lines = list(found.lines()) if settings.output is None else None
    return ClassifyReport(output=settings.output, predictions=lines, **found.report)
