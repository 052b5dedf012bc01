"""Options that `acmap map` and `acmap classify` share: the state, and where features come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mergekit_px.cli._learning import AllowCode, Device, Factory, PassSize
from mergekit_px.cli._options import AllowPickle
from mergekit_px.errors import UsageError

if TYPE_CHECKING:
    from mergekit_px.learn.acmap.backbone import ModelOptions

StateFile = Annotated[Path, typer.Option("--state", metavar="FILE", help="The state that `acmap merge` keeps.")]


@dataclass(frozen=True, slots=True)
class FeatureOptions:
    """Features as they are, or data and the model that computes them."""

    features: Annotated[
        str | None,
        typer.Option("--features", metavar="FILE", help="A .npz or .safetensors file: features, labels, ..."),
    ] = None
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE", help="Instead: arrays of the model's forward, and labels."),
    ] = None
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="With --data: the frozen model without adapters.")
    ] = None
    factory: Factory = None
    allow_code: AllowCode = False
    feature: Annotated[
        str | None,
        typer.Option(
            "--feature",
            metavar="NAME",
            help="The output or module that is the feature.  [default: the output, its pooler_output, or its"
            " last_hidden_state]",
        ),
    ] = None
    pool: Annotated[
        Literal["first", "mean", "last"], typer.Option("--pool", help="Of features for each token: which.")
    ] = "first"
    batch: PassSize = 64
    device: Device = "auto"
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Use another model than earlier tasks were mapped with.")
    ] = False
    allow_pickle: AllowPickle = False

    def model(self) -> ModelOptions:
        """What is asked of the model. Raises ``UsageError`` where features are given, which need none."""
        if self.features is not None and (given := self.base or self.factory or self.feature):
            raise UsageError(f"--features needs no model, and {given} is given", hint="give the inputs by --data")
        from mergekit_px.learn.acmap.backbone import ModelOptions

        return ModelOptions(
            base=self.base,
            factory=self.factory,
            feature=self.feature,
            pool=self.pool,
            batch=self.batch,
            device=self.device,
            allow_code=self.allow_code,
            allow_pickle=self.allow_pickle,
            allow_base_mismatch=self.allow_base_mismatch,
        )
