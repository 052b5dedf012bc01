"""``acmap map`` and ``acmap classify``: prototypes in the state that ``acmap merge`` keeps."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from mergekit_px.errors import UsageError
from mergekit_px.learn.declare import (
    Aside,
    Code,
    Input,
    Line,
    MemorySettings,
    Note,
    Option,
    Report,
    RunSettings,
    Table,
    TextSettings,
)

if TYPE_CHECKING:
    from mergekit_px.learn.acmap.backbone import ModelOptions


class FeatureSettings(RunSettings, TextSettings, MemorySettings):
    """A state, and features as they are, or data and the model that computes them."""

    state: Annotated[str, Option(metavar="FILE")]
    """The state that `acmap merge` keeps."""
    features: Annotated[str | None, Input("file"), Option(metavar="FILE")] = None
    """A .npz or .safetensors file: features, labels, ..."""
    data: Annotated[str | None, Input("data"), Option(metavar="FILE")] = None
    """Instead: arrays of the model's forward, and labels; texts, or a folder of images by class."""
    base: Annotated[str | None, Option(metavar="MODEL")] = None
    """With data: the frozen model without adapters."""
    model: Code = None
    """Makes the model, if config.json names no class; needs --allow-code."""
    feature: Annotated[
        str | None,
        Option(metavar="NAME", unset="the output, its last_hidden_state, or its pooler_output"),
    ] = None
    """The output or module that is the feature."""
    pool: Literal["first", "mean", "last"] = "first"
    """Of features for each token: which."""
    batch: Annotated[int, Field(ge=1)] = 64
    """Examples of one forward pass."""
    concatenate: bool = False
    """Features without any adapter too, beside the others."""
    output: Annotated[str | None, Aside(), Option(metavar="FILE", panel="Output")] = None
    """Write a file of what came out."""
    overwrite: Annotated[bool, Aside(), Option(panel="Output")] = False
    """Replace that file."""
    allow_base_mismatch: Annotated[bool, Option(panel="Run")] = False
    """Use another model than earlier tasks were mapped with."""

    def place(self, default: str | None) -> str | None:
        return self.output or default

    def check(self) -> None:
        """Raise ``UsageError`` where features are given, which need no model."""
        if self.features is not None and (given := self.base or self.model or self.feature):
            raise UsageError(f"--features needs no model, and {given} is given", hint="give the inputs by --data")

    def options(self) -> ModelOptions:
        """What is asked of the model."""
        from mergekit_px.learn.acmap.backbone import ModelOptions

        return ModelOptions(
            base=self.base,
            factory=self.model,
            feature=self.feature,
            pool=self.pool,
            batch=self.batch,
            device=self.device,
            allow_code=self.allow_code,
            allow_pickle=self.allow_pickle,
            allow_base_mismatch=self.allow_base_mismatch,
            text=self.text,
        )


class MapSettings(FeatureSettings):
    """One task, and where its features come from."""

    task: Annotated[int | None, Field(ge=1), Option(metavar="T", unset="the next one")] = None
    """Its number."""
    classes: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...] | None, Option(metavar="C...", unset="those of the labels")
    ] = None
    """Its classes, to be checked."""
    oracle: Annotated[tuple[str, ...], Option(metavar="FILE...")] = ()
    """Earlier tasks' examples, to measure the drift on."""
    output: Annotated[str | None, Aside(), Option(metavar="FILE", panel="Output")] = None
    """Write the prototypes here, and a report beside them."""
    resume: Annotated[bool, Aside(), Option(panel="Run")] = False
    """Take up the finished passes of an interrupted run."""

    def place(self, default: str | None) -> str | None:
        """The file of prototypes, else the state."""
        return self.output or self.state


class MapReport(Report):
    """How far every earlier task's prototypes moved, and how well that follows the drift of an oracle."""

    state: str
    task: int
    t: int
    L: int
    adapter: int
    classes: list[int]
    examples: int
    dimension: int
    shifts: dict[str, dict[str, float]]
    made_from: dict[str, Any]
    drift: dict[str, Any] | None
    was_mapped_already: bool

    def shown(self) -> Iterable[Table | Note]:
        if self.was_mapped_already:
            yield Note(f"task {self.task} was mapped from this file already; nothing changed")
        else:
            yield Note(
                f"task {self.task}: {len(self.classes)} classes, {self.examples} examples,"
                f" features of {self.dimension} numbers"
            )
        if self.L and self.task > self.L:
            yield Note(f"the merged adapter stays as it is after task {self.L}, so nothing has to be moved")
        drift = self.drift["tasks"] if self.drift else {}
        rows = []
        for number, shift in self.shifts.items():
            row: list[str | None] = [number, f"{shift['norm']:.4g}", f"{shift['relative']:.4f}"]
            if drift:
                found = drift.get(number)
                row += [None, None] if found is None else [f"{found[key]:.4f}" for key in ("before", "after")]
            rows.append(row)
        titles = ["task", "moved by", "relative", *(["drift before", "drift after"] if drift else [])]
        yield Table(titles, rows, texts=0)


class ClassifySettings(FeatureSettings):
    """What is classified, and by which table."""

    mapping: bool = True
    """Use the prototypes as they were moved, or as they were stored."""
    output: Annotated[str | None, Aside(), Option(metavar="FILE", unset="lines on stdout", panel="Output")] = None
    """Write predictions as .npz."""


class ClassifyReport(Report):
    """Accuracy where there are labels; predictions where they go to no file."""

    output: str | None
    state: str
    t: int
    L: int
    adapter: int
    examples: int
    classes: int
    mapped: bool
    concatenate: bool
    not_mapped: list[int] = Field(default_factory=list)
    accuracy: dict[str, Any] | None = None
    predictions: list[dict[str, Any]] | None = None

    def shown(self) -> Iterable[Table | Note | Line]:
        if self.not_mapped:
            waiting = ", ".join(map(str, self.not_mapped))
            yield Note(f"merged and not mapped, so left out: task {waiting}", warning=True)
        yield from (Line(json.dumps(one)) for one in self.predictions or ())
        if self.accuracy is None:
            return
        found = {**{f"task {task}": one for task, one in self.accuracy["tasks"].items()}}
        found["all"] = self.accuracy["overall"]
        if self.output is None:  # predictions have stdout to themselves
            yield Note("accuracy: " + ", ".join(f"{what} {percent:.2f} %" for what, percent in found.items()))
        else:
            yield Table(("classes of", "accuracy, %"), [(what, f"{percent:.2f}") for what, percent in found.items()])
