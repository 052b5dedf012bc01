"""``align``: a task vector of one model for another of the same architecture, or nearly."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from mergekit_px.errors import UsageError
from mergekit_px.learn.align.roles import Place, check_places
from mergekit_px.learn.declare import (
    DATA_HELP,
    Base,
    Code,
    Controls,
    Input,
    LearnerSettings,
    Note,
    OneOrSeveral,
    Option,
    Part,
    Rate,
    Report,
    Seed,
    Table,
    TextSettings,
    TrainingSettings,
)

if TYPE_CHECKING:
    from mergekit_px.pictures.curves import Curves
    from mergekit_px.pictures.heat_map import HeatMap

Unit = Literal["heads", "mlp", "residual"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
_FIRST = 3
"""Names that a line tells of a list."""


class AlignSettings(TrainingSettings):
    """How a task vector is aligned."""

    route: Literal["orthogonal", "theseus", "gradfix", "permutation"] = "orthogonal"
    """Rotations learned from labels; least-squares maps between activations; only elements whose sign lowers the loss;
    or permutations of heads, hidden units and channels, found from the weights of both bases, without data."""
    parametrisation: Annotated[Literal["soft", "cayley", "polar"], Option(flag="--param")] = "soft"
    """Free matrices with a penalty, exactly orthogonal ones, or projected in each step."""
    sided: Literal["one", "two"] = "one"
    """One matrix on both sides of a change, or one on each."""
    sites: Literal["attention", "all"] = "attention"
    """Which linear layers are rotated: the square projections of attention, or every one."""
    scale: Finite = 1.0
    """Factor of the transported task vector."""
    orthogonality: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the penalty of soft matrices."""
    project: bool = False
    """Make soft matrices orthogonal when they are learned."""
    majority: Annotated[bool, Option(negative="--mean-gradient")] = True
    """gradfix: signs by a vote of examples, or by their mean."""
    sham: Literal["gauss", "rotated"] = "gauss"
    """The random task vector beside the real one: equal norms, or equal spectra too."""
    controls: Controls = "all"
    """What the result is compared with: nothing, what trains nothing, or all."""
    scales: tuple[Finite, ...] = tuple(step / 4 for step in range(9))
    """Factors that the report tries."""
    permute: Annotated[tuple[Unit, ...], Option(metavar="WHAT...")] = ("heads", "mlp", "residual")
    """permutation: which units change places."""
    match: Literal["spectrum", "product"] = "spectrum"
    """permutation: heads by singular values of their projections, or by inner products (Git Re-Basin)."""
    inside: Literal["joint", "separate"] = "joint"
    """permutation: one order of the channels of a head, or another for its values."""
    rounds: Annotated[int, Field(ge=1)] = 100
    """permutation: at most, until all is stable."""
    heads: Annotated[int | None, Field(ge=1), Option(unset="as config.json says")] = None
    """Attention heads."""
    kv_heads: Annotated[int | None, Field(ge=1), Option(unset="as config or shapes say")] = None
    """Key and value heads."""
    positions: Literal["auto", "additive", "rotary"] = "auto"
    """How it knows positions: added to its inputs (or not at all), or rotary."""
    places: Annotated[tuple[str, ...], Option(flag="--place", metavar="ROLE=NAME...")] = ()
    """permutation: what tensors are, by the ends of their names, as query=to_q; roles: docs/learn-align.md."""
    learning_rate: Rate = 3e-3
    """Of the matrices."""
    tune_rate: Rate = 5e-4
    """Learning rate of the fine-tunes beside it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of AdamW."""
    steps: Annotated[int, Field(ge=0)] = 150
    """Of training, each time."""
    batch: Annotated[int, Field(ge=1)] = 64
    """Examples in a step."""
    evaluate_every: Annotated[int, Field(ge=1)] = 10
    """Steps between two validations."""
    validation: Part = 0.2
    """What selects: a share of the data, or a file."""
    test: Part = 0.3
    """What the report is about: a share of the data, or a file."""
    seed: Seed = 0
    """Of the split, the order and the sham."""

    @property
    def roles(self) -> tuple[Place, ...]:
        """Roles of tensors whose names are not known. Raises ``UsageError`` for a word that names none."""
        found = []
        for word in self.places:
            role, equals, pattern = word.partition("=")
            if not equals:
                raise UsageError(f"{word!r} names no role", hint="write --place ROLE=NAME, as in --place query=to_q")
            found.append((role, pattern))
        check_places(found)
        return tuple(found)


class AlignTask(LearnerSettings, TextSettings, AlignSettings):
    """What is transported from where to where."""

    base: Base
    """The model that receives."""
    source_base: Annotated[str | None, Input("model"), Option(metavar="MODEL")] = None
    """The model that the fine-tune began with; needed unless a task vector is given, and to compare both bases."""
    source_model: Annotated[OneOrSeveral, Input("source", of="source_base"), Option(metavar="MODEL...")] = ()
    """The fine-tune whose change is transported, of several tasks the sum of the changes; or:"""
    task_vector: Annotated[OneOrSeveral, Input("model"), Option(metavar="FILE...")] = ()
    """The change itself, as `pxmerge subtract` writes it, or those that are added."""
    data: Annotated[OneOrSeveral, Input("data"), Option(metavar="FILE...")] = Field(
        default=(),
        description=f"{DATA_HELP}: a few labelled examples of the task, or of each task;"
        " needed unless nothing is learned from them.",
    )
    task_heads: Annotated[tuple[str, ...], Option(metavar="PATTERN...")] = ()
    """Tensors that each task keeps as its fine-tune has them, as 'classifier.*'."""
    maps: Annotated[str | None, Input("file"), Option(metavar="FILE")] = None
    """What a former run transported with, or its folder; nothing is learned."""
    source_code: Code = None
    """What makes the source, where --model makes the target and the source is another."""

    def check(self) -> None:
        """Raise ``UsageError`` for settings that contradict one another."""
        if bool(self.source_model) == bool(self.task_vector):
            raise UsageError("either a source model or a task vector is transported", hint="give one of them")
        compared = self.maps is None and self.route in ("theseus", "permutation")
        if (self.source_model or compared) and self.source_base is None:
            raise UsageError("the source base is needed: the model that the fine-tune began with")
        if not self.data and self.route != "permutation" and self.maps is None:
            raise UsageError(
                f"the route {self.route} needs labelled examples",
                hint="give them with --data; --route permutation needs none",
            )
        if not self.data and isinstance(self.test, str):
            raise UsageError("test data goes with --data: the controls are trained on it")
        if self.task_heads:
            self._check_task_heads()
        if self.project and self.parametrisation != "soft":
            raise UsageError(f"{self.parametrisation} matrices are orthogonal already", hint="project goes with soft")
        if not self.permute:
            raise UsageError("nothing is to be permuted", hint="name some of heads, mlp, residual")
        if self.heads is not None and self.kv_heads is not None and self.heads % self.kv_heads:
            raise UsageError(f"{self.heads} heads cannot share {self.kv_heads} key and value heads evenly")
        _ = self.roles

    def _check_task_heads(self) -> None:
        if len(self.source_model) < 2 or len(self.data) != len(self.source_model):
            what = "heads of tasks need several source models and a file of data for each"
            raise UsageError(what, where="--task-heads", hint="give --source-model A B ... --data A B ...")
        if self.route not in ("orthogonal", "gradfix") or self.maps is not None:
            raise UsageError("heads of tasks are for the routes orthogonal and gradfix", where="--task-heads")
        if isinstance(self.validation, str) or isinstance(self.test, str):
            raise UsageError("with heads of tasks validation and test are shares", where="--task-heads")


class AlignReport(Report):
    """The result and its controls; what was not asked for is None."""

    examples: dict[str, int]
    left_out: list[str]
    norm: dict[str, float]
    test: dict[str, float]
    not_scored: dict[str, str]
    scales: list[dict[str, float]]
    tasks: list[dict[str, float]] = Field(default_factory=list)
    """The same scores of what trains nothing, of each task with its own head."""
    trace: list[tuple[int, float | None, float]]
    labels: str | None = None
    steps: int = 0
    best_step: int = 0
    rotations: dict[str, Any] | None = None
    permutations: dict[str, Any] | None = None
    reused: str | None = None

    def shown(self) -> Iterable[Table | Note]:
        scores = self.test
        if scores:
            yield Table(("on test data", "accuracy"), [(name, f"{accuracy:.1f}") for name, accuracy in scores.items()])
        if self.rotations is not None:
            yield from _about_rotations(self.rotations)
        if self.permutations is not None:
            yield from _about_permutations(self.permutations)
        if not scores:
            yield Note(f"not scored, since there is no --data: {', '.join(self.not_scored)}")
        elif scores["aligned"] <= max((scores[name] for name in ("naive", "sham") if name in scores), default=-1.0):
            what = "alignment gains nothing over the task vector as it is, or over a random one of the same norms"
            yield Note(what, warning=True)
        if self.left_out:
            yield Note(f"{len(self.left_out)} tensors of the task vector have no place in the target")
        if scores:
            yield Note(f"{self.examples['test']} test examples")

    def pictures(self, folder: Path) -> Iterable[HeatMap | Curves | Table | None]:
        from mergekit_px.learn.pictures import by_layer, traces
        from mergekit_px.pictures.curves import curves

        if self.rotations is not None:
            found = self.rotations["distances_from_identity"].items()
            distances = {name.replace(".weight", "", 1): (distance,) for name, distance in found}
            yield from by_layer("distance of the rotation from the identity", distances)
        yield from traces(self.trace, self.best_step)
        names = [name for name in (self.scales[0] if self.scales else ()) if name != "scale"]
        lines = {name: [(row["scale"], row[name]) for row in self.scales] for name in names}
        chosen = (float(self.settings["scale"]), "used") if lines else None
        yield curves("accuracy on the validation data, %", "scale of the task vector", lines, marked=chosen)


def _about_rotations(found: dict[str, Any]) -> Iterable[Note]:
    yield Note(
        f"{found['matrices']} matrices, orthogonal to {found['orthogonality_error']:.2g}, mean distance"
        f" from the identity {found['mean_distance_from_identity']:.2g}"
    )
    if found["stay"]:
        named = ", ".join(found["stay"][:_FIRST]) + (", ..." if len(found["stay"]) > _FIRST else "")
        yield Note(f"{len(found['stay'])} matrices are added as they are: {named}")


def _about_permutations(found: dict[str, Any]) -> Iterable[Note]:
    likeness = found["similarity"]
    yield Note(
        f"{found['moved']:.0%} of all places have another unit than before; cosine of the weights"
        f" {likeness['before']:.3f}, then {likeness['after']:.3f}; rounds: {found['rounds']}"
    )
    if not found["stable"]:
        yield Note("the matching had not settled when it was stopped; give it more --rounds", warning=True)
    for block, reason in found["left_alone"].items():
        yield Note(f"{block.rstrip('.') or 'the model'} keeps its order: {reason}")
