"""What a transfer plan may say, as frozen pydantic models. Nothing is opened here and no tensor is known."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from mergekit_px.located.validate import Part, Wanted

Mode = Literal["joint", "frozen", "mutual", "self"]
Control = Literal["none", "sham", "dense"]
Form = Literal["rr", "rc", "cr", "cc"]
Rank = int | Literal["full"]


_PATH = Wanted("a folder, a file, or org/name on the Hub")
_NUMBER = Wanted("a number above 0")
_NOT_NEGATIVE = Wanted("a number of 0 or more")
_COUNT = Wanted("a whole number of 1 or more")
_SHARE = Wanted("a file, or a share between 0 and 1")
_YES_OR_NO = Wanted("true or false")
_RANK = Wanted("a whole number, full, or two of them for target and source, as [8, 16]")

_COLUMNS = Wanted("a mapping from roles to columns, as {text: body, label: topic}")

Count = Annotated[int, Field(ge=1), _COUNT]
Positive = Annotated[float, Field(gt=0), _NUMBER]
Schedule = Annotated[Literal["constant", "cosine"], Wanted("constant or cosine")]


class Data(Part):
    """Where a model's examples come from."""

    train: Annotated[str, Wanted("a data file, a folder of images, file.py:function, or digits")]
    """Texts (``.jsonl``, ``.csv``, ``.parquet``), a folder of images by class, arrays (``.npz``, ``.safetensors``), a
    function of yours, or ``digits``. Parts that are not named are split off by the seed."""
    validation: Annotated[str | float, _SHARE] = 0.1
    """A file, or a share of ``train``."""
    test: Annotated[str | float, _SHARE] = 0.2
    """A file, or a share of ``train``."""
    limit: Annotated[int | None, Field(ge=1), _COUNT] = None
    """Train on so many examples at most."""
    columns: Annotated[dict[str, str], _COLUMNS] = Field(default_factory=dict)
    """Of texts: which column is ``text``, ``label``, ``prompt``, ``completion`` or ``messages``."""
    max_length: Annotated[int | None, Field(ge=2), Wanted("a whole number of 2 or more")] = None
    """Cut texts to so many tokens."""
    tokenizer: Annotated[str | None, Wanted("a folder")] = None
    """Left out: the one beside the weights."""


class Optimizer(Part):
    """How a model learns. What is left out comes from the preset, then from the defaults."""

    name: Annotated[Literal["adamw", "sgd"], Wanted("adamw or sgd")] = "adamw"
    lr: Annotated[float | None, Field(gt=0), _NUMBER] = None
    """Default 1e-3."""
    weight_decay: Annotated[float | None, Field(ge=0), _NOT_NEGATIVE] = None
    """Default 1e-2."""
    momentum: Annotated[float, Field(ge=0, lt=1), Wanted("a number from 0 to below 1")] = 0.9
    """Of ``sgd``."""
    schedule: Schedule = "cosine"
    """``cosine`` goes from ``lr`` to 0 over all steps."""
    clip: Annotated[float | None, Field(gt=0), _NUMBER] = None
    """Largest norm of the gradient."""


class Model(Part):
    """A model that takes part, with its own data and loss."""

    weights: Annotated[str | None, _PATH] = None
    """Left out: the model begins as its function makes it, under the seed of the run."""
    model: Annotated[str | None, Wanted("file.py:function, digits-mlp or digits-cnn")] = None
    """What makes the module. Left out: the transformers class that ``config.json`` names."""
    data: Annotated[Data | None, Wanted("a data file, or a mapping with train")] = None
    loss: Annotated[str, Wanted("auto, cross_entropy, mse or file.py:function")] = "auto"
    """``auto``: the model's own loss if it returns one, else cross-entropy for classes, squared error for values."""
    metric: Annotated[str, Wanted("accuracy, loss or file.py:function")] = "accuracy"
    """``accuracy`` is in percent."""
    goal: Annotated[Literal["max", "min"] | None, Wanted("max or min")] = None
    """Which way the metric is better. Default: max, and min for ``loss``."""
    batch: Annotated[int | None, Field(ge=1), _COUNT] = None
    """Examples per step. Default 32."""
    optimizer: Annotated[Optimizer, Wanted("a mapping of settings")] = Field(default_factory=Optimizer)

    @model_validator(mode="before")
    @classmethod
    def _short_form_of_data(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("data"), str):
            return {**given, "data": {"train": given["data"]}}
        return given


class Pair(Part):
    """A tensor that receives, and the tensor that it receives from."""

    target: Annotated[str, Wanted("the name of a tensor of the target")]
    source: Annotated[str, Wanted("the name of a tensor of the source")]
    rank: Annotated[Rank | list[Rank] | None, _RANK] = None
    """Ranks of the two factorisations. Default: a quarter of the shorter side, 1 to 64. ``full`` exchanges W itself."""


class Adapter(Part):
    """The network that makes the target's factor from both factors, and how it learns."""

    kind: Annotated[Literal["lpka", "mlp"], Wanted("lpka or mlp")] = "lpka"
    """``mlp`` is the paper's baseline: two linear maps of the source instead of attention."""
    form: Annotated[Literal["scaled", "paper"], Wanted("scaled or paper")] = "scaled"
    """``scaled`` keeps scale and norm of the factor; ``paper``: a residual and a LayerNorm around each attention and
    the feed-forward layer, as the authors have it, with nothing kept: neither ``gate`` nor ``keep_norm`` counts."""
    mean: Annotated[Literal["learned", "plain"], Wanted("learned or plain")] = "learned"
    """Of the attention forms."""
    layers: Annotated[int | None, Field(ge=1), _COUNT] = None
    """Default 2."""
    heads: Annotated[int | None, Field(ge=1), _COUNT] = None
    """Default 4."""
    forms: Annotated[list[Form], Field(min_length=1), Wanted("a list of rr, rc, cr and cc")] = Field(
        default_factory=lambda: list[Form](("rr", "rc", "cr", "cc"))
    )
    """Queries from rows or columns of the target's factor, keys from rows or columns of the source's. Forms with r
    need projections as wide as the matrix; cc needs none, and scores of width by width."""
    min_width: Annotated[int, Field(ge=1), _COUNT] = 128
    """Least width of all heads together; the mean of both token widths if that is more."""
    max_width: Annotated[int | None, Field(ge=1), _COUNT] = None
    """Greatest width of heads and feed-forward layer, for wide matrices."""
    scores: Annotated[int, Field(ge=1), _COUNT] = 2**24
    """Attention scores held at a time; longer sequences are done in chunks."""
    keep_norm: Annotated[bool, _YES_OR_NO] = True
    """Give the new factor the Frobenius norm of the old one."""
    gate: Annotated[float, Wanted("a number")] = 0.1
    """Strength of a layer's change at the start; it is learnt."""
    init: Annotated[Literal["random", "zero"], Wanted("random or zero")] = "random"
    """``zero``: the first transfer changes nothing."""
    lr: Annotated[float | None, Field(gt=0), _NUMBER] = None
    """Of AdamW. Default 1e-4."""
    weight_decay: Annotated[float | None, Field(ge=0), _NOT_NEGATIVE] = None
    """Default 1e-2; biases and scalars have none."""
    clip: Positive = 50.0
    """Largest norm of the gradient."""
    schedule: Schedule = "cosine"
    """``cosine`` goes from ``lr`` to 0 over all transfers."""


class Transfer(Part):
    """One transfer: which models, which tensors, how long."""

    target: Annotated[str, Wanted("the name of a model")]
    source: Annotated[str | None, Wanted("the name of a model")] = None
    """Left out in mode ``self``."""
    mode: Annotated[Mode, Wanted("joint, frozen, mutual or self")] = "joint"
    """``joint``: the source learns too, and receives nothing. ``frozen``: the source stays as it is. ``mutual``: both
    receive. ``self``: the source is another tensor of the target."""
    preset: Annotated[str | None, Wanted("the name of a preset")] = None
    pairs: Annotated[list[Pair], Wanted("a list of pairs")] = Field(default_factory=list)
    """Needed; ``pxmerge pairs`` lists what can be paired."""
    steps: Count = 1000
    cycle: Annotated[int | None, Field(ge=1), _COUNT] = None
    """Transfer at every so many steps of the target. Default 4."""
    stop_at: Annotated[float, Field(gt=0, le=1), Wanted("a share above 0, at most 1")] = 0.7
    """The share of the steps after which nothing is transferred."""
    residual: Annotated[bool, _YES_OR_NO] = True
    """Keep what the factors of a tensor leave over, so that training begins at the checkpoint exactly."""
    phi_grad: Annotated[Literal["delta", "exact"], Wanted("delta or exact")] = "delta"
    """What the adapter learns from: the change that the target's step made to the new factor, or its gradient."""
    adapter: Annotated[Adapter, Wanted("a mapping of settings")] = Field(default_factory=Adapter)
    controls: Annotated[list[Control], Wanted("a list of none, sham and dense")] = Field(
        default_factory=lambda: list[Control](("none", "sham"))
    )
    """What transfer is compared with: no transfer; a fixed random source; no transfer and no factors."""
    select: Annotated[Literal["last", "best"], Wanted("last or best")] = "last"
    """``best`` keeps the weights with the best validation metric, looked at every ``save_every`` steps."""
    save_every: Annotated[int | None, Field(ge=1), _COUNT] = None
    """Steps between two saved states. Default: a tenth of the steps, and not within seconds of the one before."""


class TransferPlan(Part):
    """Models, and transfers between them."""

    short_forms: ClassVar[tuple[str, ...]] = ("transfer",)

    pxmerge_transfer: Annotated[Literal[1], Wanted("1, the version of the format that this release reads")] = 1
    models: Annotated[dict[str, Model], Wanted("a mapping from names to models")]
    transfers: Annotated[dict[str, Transfer], Wanted("a mapping from names to transfers")] = Field(default_factory=dict)
    """``transfer:`` instead for a single one."""
    output: Annotated[str, Wanted("a folder")] = "./transfer"
    seed: Annotated[int, Field(ge=0), Wanted("a whole number of 0 or more")] = 0
    seeds: Count = 1
    """Repetitions, each under the next seed; the comparison is paired over them."""
