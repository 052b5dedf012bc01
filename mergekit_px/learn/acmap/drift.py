"""How far prototypes are from those that the old data would give today."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_px.errors import InputError
from mergekit_px.learn.acmap.prototypes import Prototypes
from mergekit_px.learn.acmap.sources import FeatureSource, Tell, class_means


def oracle_drift(table: Prototypes, sources: Sequence[FeatureSource], current: int, tell: Tell) -> dict[str, Any]:
    """``|p_oracle - p~_c| / |p_c|`` before (p~ = p) and after mapping: means over the classes of each task, and over
    all of the classes that were measured again.

    Args:
        sources: old data with their labels.
        current: the number of the merged adapter in use.

    Raises:
        InputError: no labels, classes that are in no mapped task or in two of the sources, or features of another
            width.
    """
    rows: list[Tensor] = []
    before: list[Tensor] = []
    after: list[Tensor] = []
    mapped = table.mapped()
    for source in sources:
        found = class_means(source, current, tell)
        owners = table.task_of(found.classes)
        if not bool((owners > 0).all()):
            unknown = int(found.classes[owners == 0][0])
            raise InputError(f"class {unknown} is in no task that has been mapped", where=source.where)
        means = found.means()
        if means.shape[1] != table.dimension:
            raise InputError(
                f"features of {means.shape[1]} numbers, the prototypes have {table.dimension}", where=source.where
            )
        places = torch.searchsorted(table.classes, found.classes)
        if rows and bool(torch.isin(places, torch.cat(rows)).any()):
            raise InputError("it has classes that another oracle has too", where=source.where)
        size = table.vectors[places].norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        rows.append(places)
        before.append((means - table.vectors[places]).norm(dim=1) / size)
        after.append((means - mapped[places]).norm(dim=1) / size)
    tasks, old, new = table.tasks[torch.cat(rows)], torch.cat(before), torch.cat(after)
    return {
        "before": float(old.mean()),
        "after": float(new.mean()),
        "tasks": {
            str(int(task)): {
                "classes": int((tasks == task).sum()),
                "before": float(old[tasks == task].mean()),
                "after": float(new[tasks == task].mean()),
            }
            for task in tasks.unique()
        },
    }
