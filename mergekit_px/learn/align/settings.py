"""How a task vector is aligned."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mergekit_px.checkpoint.destination import Mode
from mergekit_px.errors import UsageError
from mergekit_px.learn.align.head_counts import Positions
from mergekit_px.learn.align.roles import Place, check_places
from mergekit_px.learn.precision import Precision
from mergekit_px.learn.text_data import NO_TEXT, TextOptions

Route = Literal["orthogonal", "theseus", "gradfix", "permutation"]
DEFAULT_SCALES = tuple(step / 4 for step in range(9))
PERMUTED = ("heads", "mlp", "residual")
Parametrisation = Literal["soft", "cayley", "polar"]


@dataclass(frozen=True)
class AlignSettings:
    """Every number that the result depends on, the data and models aside.

    Attributes:
        route: ``orthogonal``: rotations learned from labels; ``theseus``: Procrustes maps between activations;
            ``gradfix``: only elements whose sign lowers the loss; ``permutation``: heads, hidden units and channels in
            the order in which the weights of both bases are most alike.
        parametrisation: ``soft``: free matrices and a penalty; ``cayley``: exactly orthogonal; ``polar``: free steps,
            each followed by the nearest orthogonal matrix.
        sided: ``one`` matrix on both sides of a change, or ``two``, one on each.
        sites: ``attention``: the square projections of attention; ``all``: every linear layer.
        scale: factor of the transported task vector (lambda).
        orthogonality: factor of the penalty (beta), for ``soft``.
        project: replace soft matrices by the nearest orthogonal ones when they are learned.
        sham: the random task vector beside the real one: noise of the same norms, or with the same spectra too.
        controls: what the result is compared with: nothing, what trains nothing, or all.
        scales: factors that the report gives an accuracy for.
        majority: for ``gradfix``: signs by a vote of the examples instead of the mean gradient.
        learning_rate: of the rotations.
        tune_rate: of the few-shot fine-tunes that the result is compared with.
        precision: of forward and backward passes; matrices, maps and weights keep their dtype.
        permute: which units change places, any of `PERMUTED`.
        match: ``spectrum``: heads by the singular values of their projections (TransFusion); ``product``: by inner
            products, as everything else (Git Re-Basin).
        inside: ``joint``: one order of channels for query, key and value of a head; ``separate``: one for query and
            key, another for value.
        rounds: at most as many rounds of coordinate descent.
        heads, kv_heads: None for what ``config.json`` says.
        positions: how the model knows positions.
        places: roles of tensors whose names are not known, with patterns for the ends of their names.
    """

    route: Route = "orthogonal"
    parametrisation: Parametrisation = "soft"
    sided: Literal["one", "two"] = "one"
    sites: Literal["attention", "all"] = "attention"
    scale: float = 1.0
    orthogonality: float = 1.0
    project: bool = False
    sham: Literal["gauss", "rotated"] = "gauss"
    controls: Literal["none", "cheap", "all"] = "all"
    scales: tuple[float, ...] = DEFAULT_SCALES
    majority: bool = True
    learning_rate: float = 3e-3
    tune_rate: float = 5e-4
    weight_decay: float = 0.0
    precision: Precision = "float32"
    steps: int = 150
    batch: int = 64
    evaluate_every: int = 10
    validation: float = 0.2
    test: float = 0.3
    seed: int = 0
    permute: tuple[str, ...] = PERMUTED
    match: Literal["spectrum", "product"] = "spectrum"
    inside: Literal["joint", "separate"] = "joint"
    rounds: int = 100
    heads: int | None = None
    kv_heads: int | None = None
    positions: Positions = "auto"
    places: tuple[Place, ...] = ()

    def check(self) -> None:
        """Raise ``UsageError`` for numbers that cannot be meant."""
        for name, value in (("learning rate", self.learning_rate), ("rate of the fine-tunes", self.tune_rate)):
            if not 0 < value < math.inf:
                raise UsageError(f"the {name} must be a finite number above 0, not {value:g}")
        if self.project and self.parametrisation != "soft":
            raise UsageError(f"{self.parametrisation} matrices are orthogonal already", hint="project goes with soft")
        for scale in (self.scale, *self.scales):
            if not math.isfinite(scale):
                raise UsageError(f"a scale must be a finite number, not {scale}")
        unknown = sorted(set(self.permute) - set(PERMUTED))
        if unknown or not self.permute:
            what = f"{unknown[0]!r} cannot be permuted" if unknown else "nothing is to be permuted"
            raise UsageError(what, hint=f"name some of {', '.join(PERMUTED)}")
        for kind, count in (("heads", self.heads), ("key and value heads", self.kv_heads)):
            if count is not None and count < 1:
                raise UsageError(f"a model has at least one of its {kind}, not {count}")
        if self.heads is not None and self.kv_heads is not None and self.heads % self.kv_heads:
            raise UsageError(f"{self.heads} heads cannot share {self.kv_heads} key and value heads evenly")
        check_places(self.places)


@dataclass(frozen=True)
class AlignOptions:
    """What is transported from where to where.

    Attributes:
        target_base: the model that receives; path or Hub reference.
        data: labelled examples of the task: texts, images or arrays. May be left out where nothing is learned from them
            (route ``permutation``, or ``maps``); then nothing is scored.
        source_base: the model that the task vector was taken from; may be left out with ``task_vector``, unless
            both bases are compared.
        source_model: the fine-tune of the source base; or else:
        task_vector: a file of differences.
        text: how rows of text are read.
        test_data: examples for the scores of the report; None for a share of ``data``.
        maps: what a former run transported with, or its folder; applied instead of anything new.
        model: ``file.py:function`` of the target; None for the class that its config names.
        source_code: the same of the source, where it differs.
    """

    target_base: str
    data: str | None = None
    source_base: str | None = None
    source_model: str | None = None
    task_vector: str | None = None
    output: Path = Path("aligned")
    text: TextOptions = NO_TEXT
    test_data: str | None = None
    maps: str | None = None
    model: str | None = None
    source_code: str | None = None
    settings: AlignSettings = field(default_factory=AlignSettings)
    device: str = "auto"
    mode: Mode = "new"
    allow_code: bool = False
    allow_pickle: bool = False
