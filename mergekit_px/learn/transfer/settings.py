"""``transfer``: a plan carried out; what is given here goes before what the plan says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mergekit_px.learn.declare import Aside, Input, LearnerSettings, MemorySettings, Note, Option, Report, Table

if TYPE_CHECKING:
    from mergekit_px.learn.transfer.load import LoadedTransferPlan
    from mergekit_px.pictures.curves import Curves
    from mergekit_px.pictures.heat_map import HeatMap


class TransferSettings(LearnerSettings, MemorySettings):
    """A plan names models, data and which tensors are paired."""

    plan: Annotated[str, Input("file"), Option(metavar="PLAN", by_place=True)]
    """A plan: models, data, and which tensors are paired."""
    assignments: Annotated[tuple[str, ...], Option(flag="--set", metavar="KEY=VALUE...")] = ()
    """Set keys of the plan, as in --set seeds=3."""
    seed: Annotated[int | None, Field(ge=0), Option(unset="the plan's")] = None
    """The first seed."""
    seeds: Annotated[int | None, Field(ge=1), Option(unset="the plan's")] = None
    """Repeat under so many seeds."""
    threads: Annotated[int | None, Field(ge=1), Aside(), Option(panel="Run")] = None
    """Threads of one operation; 1 gives the same bytes every time."""

    def load(self) -> LoadedTransferPlan:
        """The plan. Raises ``RecipeError``."""
        from mergekit_px.learn.transfer.load import load_transfer_plan

        return load_transfer_plan(self.plan, overrides=self.assignments)

    def place(self, default: str | None) -> str | None:
        """The output that was asked for, else the plan's."""
        return self.output or self.load().plan.output


class TransferReport(Report):
    """The metric with transfer and under each control, paired over seeds."""

    note: str
    seeds: list[int]
    telling_t: float | None
    transfers: dict[str, Any]

    def shown(self) -> Iterable[Table | Note]:
        from mergekit_px.learn.transfer.table import explanation, table_rows

        document = self.model_dump(mode="json")
        titles, *rows = table_rows(document)
        yield Table(titles, rows, texts=len(titles))
        yield Note(explanation(document))

    def pictures(self, folder: Path) -> Iterable[HeatMap | Curves | Table | None]:
        from mergekit_px.pictures.curves import curves

        for name, transfer in self.transfers.items():
            yield curves(f"loss on the training data: {name}, first seed", "step", transfer["loss"])
