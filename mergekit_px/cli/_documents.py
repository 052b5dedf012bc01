"""What commands print with ``--json``: the classes that no other module makes, and which command prints which."""

from __future__ import annotations

import importlib
from typing import Any

from pydantic import BaseModel, Field, RootModel, create_model

from mergekit_px.declare.document import Document

_RUN, _PLAN = "RunDocument", "plan.report:PlanDocument"

DOCUMENTS: dict[str, tuple[str, ...]] = {
    "run": (_RUN, _PLAN, "PartDocument"),
    "plan": (_PLAN,),
    "lock": ("LockDocument",),
    "publish": ("PublishDocument",),
    "average": (
        _RUN,
        _PLAN,
        "RunsDocument",
        "PlansDocument",
        "MeanDocument",
    ),
    "tokens transplant": (_RUN, _PLAN),
    "add": (_RUN, _PLAN),
    "subtract": (_RUN, _PLAN),
    "negate": (_RUN, _PLAN),
    "scale": (_RUN, _PLAN),
    "analogy": (_RUN, _PLAN),
    "adapter apply": (_RUN, _PLAN),
    "adapter merge": (_RUN, _PLAN, "MergedAdapterDocument"),
    "adapter extract": ("ExtractedAdapterDocument",),
    "adapter convert": ("ConvertedAdapterDocument",),
    "adapter inspect": ("AdapterDocument",),
    "acmap merge": ("RunningMergeDocument",),
    "acmap export": ("ExportDocument",),
    "pairs": ("PairsDocument",),
    "data": ("ArraysDocument",),
    "moe build": (_RUN, _PLAN),
    "moe edit": (_RUN, _PLAN),
    "svd": (_RUN, _PLAN, "PoolDocument"),
    "advise": ("inspection.advice:Advice",),
    "inspect": ("inspection.describe:ModelDocument",),
    "compare": ("inspection.comparison:ComparisonDocument",),
    "report": ("inspection.merge_report:MergeReport", "learn.result:LearnedReport"),
    "verify": ("VerifyDocument",),
    "methods": ("MethodDocument", "MethodsDocument"),
    "doctor": ("DoctorDocument",),
    "pull": ("PullDocument",),
    "push": ("PushDocument",),
}
"""Command -> the classes of its documents: here, or in another module as ``module:Class``. A command that is made of
a merge method, and is not listed, prints what a merge does."""


def document_types(command: str, *, is_method: bool) -> list[type[BaseModel]]:
    """The classes of a command's documents; none for a command that has none, or whose documents have no class."""
    from mergekit_px.learn import load_learners

    learner = load_learners().get(command)
    if learner is not None:
        return [create_model(learner.report.__name__, __base__=learner.report, output=(str | None, ...))]
    return [_load(place) for place in DOCUMENTS.get(command, (_RUN, _PLAN) if is_method else ())]


def _load(place: str) -> type[BaseModel]:
    module, _, name = place.rpartition(":")
    loaded: type[BaseModel] = getattr(importlib.import_module(f"mergekit_px.{module or 'cli._documents'}"), name)
    return loaded


class RunDocument(Document):
    """A merge that is done; ``files``: name -> sha256."""

    output: str
    files: dict[str, str]
    tensors: int
    seconds: float
    bytes_read: int
    bytes_written: int
    peak_memory: int
    up_to_date: bool
    notes: list[str]
    warnings: list[str]
    pushed: str | None = None


class PartDocument(Document):
    """One part of a merge that had nothing to do."""

    part: int
    of: int
    files: dict[str, str]


class RunsDocument(Document):
    """Several merges that were done in one pass, by name."""

    outputs: dict[str, RunDocument]
    seconds: float
    bytes_read: int
    bytes_written: int
    peak_memory: int


class PlansDocument(Document):
    """The plans of several merges, by name."""

    outputs: dict[str, dict[str, Any]]


class MeanDocument(Document):
    """A running mean of checkpoints; ``output`` is where it was written as a model."""

    state: str
    weights: str
    steps: list[int]
    output: str | None


class LockDocument(Document):
    """A lock that was written; ``moved``: what is otherwise than in the lock before, as sentences."""

    lock: str
    inputs: list[str]
    moved: list[str]


class PublishDocument(Document):
    """The parts of a merge, put in place."""

    output: str
    files: list[str]


class PoolDocument(Document):
    """A result of ``svd`` that is no checkpoint."""

    output: str
    kind: str = Field(alias="as")
    notes: list[str]


class RebuiltDocument(Document):
    """Files by whether merging again gave the same bytes."""

    matching: list[str]
    different: list[str]
    notes: list[str]


class VerifyDocument(Document):
    """Files of a merge by whether they hold what its lock file lists."""

    directory: str
    intact: bool
    matching: list[str]
    changed: list[str]
    missing: list[str]
    extra: list[str]
    rebuilt: RebuiltDocument | None


class AdapterWeight(Document):
    """An adapter beside the one that it was merged into."""

    adapter: str
    weight: float
    cosine: float


class MergedModule(Document):
    """A module of a merged adapter; ``cosines`` of the adapters' updates with the merged one."""

    name: str
    rank: int
    captured_energy: float
    norm: float
    cosines: list[float]


class MergedAdapterDocument(Document):
    """A merged adapter."""

    output: str
    format: str
    method: str
    captured_energy: float
    base_model: str | None
    adapters: list[AdapterWeight]
    modules: list[MergedModule]


class ExtractedModule(Document):
    """A module of an adapter that was taken out of a fine-tune."""

    name: str
    rank: int
    captured_energy: float
    norm: float


class ExtractedAdapterDocument(Document):
    """An adapter that was taken out of a fine-tune; ``left_out``: what changed and is not in it."""

    output: str
    format: str
    captured_energy: float
    modules: list[ExtractedModule]
    saved_whole: list[str]
    left_out: list[str]


class ConvertedAdapterDocument(Document):
    """An adapter in another format."""

    output: str
    format: str
    source: str = Field(alias="from")
    modules: int


class AdapterModule(Document):
    """A module of an adapter; rank and scale of a LoRA."""

    name: str
    rank: int | None
    scale: float | None
    norm: float | None
    shapes: dict[str, list[int]]


class AdapterDocument(Document):
    """An adapter; ``fits``: the base that it was tried on, of which ``changes`` lists the tensors that change."""

    adapter: str
    kind: str
    base_model: str | None
    parameters: int
    targets: dict[str, int]
    ranks: dict[int, int]
    replaced: list[str]
    token_rows: dict[str, int]
    refusal: str | None
    fits: str | None
    changes: list[str] | None
    modules: list[AdapterModule]


class RunningMergeTask(Document):
    """A task of a running merge; ``merged``: whether its adapter is merged in."""

    adapter: str
    merged: bool


class RunningMergeDocument(Document):
    """The running mean of the adapters of many tasks."""

    output: str | None
    state: str | None
    mode: str
    limit: int | None
    trim_rate: float | None
    merged: int
    added: Any
    tasks: list[RunningMergeTask]


class ExportDocument(Document):
    """A head of prototypes, by its ``classes`` in order, or the merged adapter of that number."""

    output: str
    adapter: int | None = None
    classes: list[int] | None = None
    dimension: int | None = None


class PairedTensor(Document):
    """A tensor that a transfer can pair; ``matrix``: what it counts as."""

    name: str
    shape: list[int]
    matrix: list[int]
    rank: int


class PairsDocument(RootModel[dict[str, list[PairedTensor]]]):
    """The tensors that a transfer can pair, by the model."""


class ArrayForm(Document):
    """Type and shape of an array."""

    dtype: str
    shape: list[int]


class ArraysDocument(Document):
    """The arrays that were made of a data file."""

    output: str
    data: str
    data_sha256: str
    examples: int
    arrays: dict[str, ArrayForm]


class SourceCount(Document):
    """How many sources a method takes; ``most`` is None where there is no bound."""

    least: int
    most: int | None


class MethodDocument(Document):
    """A merge method; ``parameters``: name -> JSON Schema."""

    name: str
    summary: str
    documentation: str
    family: str
    takes: str
    access: str
    sources: SourceCount
    uses_weights: bool
    random: bool
    variants: dict[str, dict[str, Any]]
    paper: str | None
    origin: str
    parameters: dict[str, Any]


class MethodsDocument(RootModel[list[MethodDocument]]):
    """All merge methods."""


class PullDocument(Document):
    """A model that was downloaded."""

    output: str


class PushDocument(Document):
    """A model that was uploaded, and the address of its commit."""

    address: str


class Machine(Document):
    """The machine; ``memory`` in bytes."""

    system: str
    cores: int
    memory: int | None


class Device(Document):
    """A device; ``memory`` in bytes, of a GPU."""

    name: str
    what: str
    memory: int | None = None


class HubSettings(Document):
    """Whether there is a token, and the variables that are set."""

    token: bool
    settings: dict[str, str]


class DoctorDocument(Document):
    """What this machine and this environment have; ``bandwidth`` in bytes per second."""

    versions: dict[str, str | None]
    machine: Machine
    devices: list[Device]
    bandwidth: dict[str, float] | None
    hub: HubSettings
    extras: dict[str, bool]
