"""What the user asked for, as frozen pydantic models: no files are opened here and no tensor is known.

A recipe names its inputs (``models``), a graph of ``steps`` over them, and one ``output``.
Values that may vary are kept as written; the plan resolves them for each tensor.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mergekit_px.located.validate import Part, Wanted
from mergekit_px.recipe.mixture import ExpertChoice, Mixture

Scalar = bool | int | float | str | None

Value = Scalar | list[Any] | dict[str, Any]
"""A parameter as written: a scalar; a list of numbers, interpolated over depth; or one value for each
source by name, ``{math: 0.3, code: [0.1, 0.5]}``."""

LayerRange = str | int | list[int]
"""As written; :mod:`mergekit_px.recipe.layer_range` reads it."""


MEAN = "mean"
"""As a step's base: the mean of its sources, unless a model or step has that name."""

UNION = "union"
"""As a tokenizer: that of the base with the tokens that the others have besides, unless a model has that name."""


_LAYERS = Wanted("layers: 7, '8-15', [0, 5, 9], '20-' or 'none'")
_NAME = Wanted("the name of a model or step", text=True)
_MODEL = Wanted("the name of a model", text=True)
_PARAMS = Wanted("a mapping from parameters to values")
_RULES = Wanted("a list of rules")
_TEXT = Wanted("text", text=True)
_YES_OR_NO = Wanted("true or false")


class ModelInput(Part):
    """One input checkpoint, with an adapter on top of it if one is named."""

    written: ClassVar[Wanted] = Wanted("a path or {model: path, adapter: path}", text=True)

    model: Annotated[str | None, Wanted("a path or a name on the Hub", text=True)] = None
    """A folder, a safetensors file, ``org/name`` or ``org/name@revision``; or a pattern such as
    ``./run/checkpoint-*``, which stands for all checkpoints of a training run that match, in order of step. Left out
    for an adapter alone. Relative paths are relative to the current directory."""
    adapter: Annotated[str | list[str] | None, Wanted("a path or a name on the Hub, or a list of them", text=True)] = (
        None
    )
    """A PEFT adapter (or several, applied in order) on top of the model."""
    keep_tied: Annotated[bool, _YES_OR_NO] = False
    """An adapter that changes one of a tied embedding and head changes both alike, instead of untying them. Not
    what was trained, but the model keeps its size."""
    attention_output: Annotated[Literal["as_trained", "once"], Wanted("as_trained or once")] = "as_trained"
    """PEFT adds the LoRA of the out_proj of an ``nn.MultiheadAttention`` twice, in training as in merging, and so
    does ``as_trained``; ``once`` is for adapters that were trained otherwise."""
    residual_base: Annotated[bool, _YES_OR_NO] = False
    """The model is the residual one that a start such as PiSSA's left behind, not the original."""
    component: Annotated[str | None, Wanted("the name of a part of a pipeline, such as unet", text=True)] = None
    """One component of a pipeline: ``unet``, ``transformer``, ``vae``, ``text_encoder``, ``text_encoder_2``. Left out,
    all are merged. For a model that is one already: the part of its adapters that it takes."""
    rename: Annotated[dict[str, str], Wanted("a mapping of name patterns to name patterns")] = Field(
        default_factory=dict
    )
    """Other names for its tensors, after its adapters: ``{"model.*": "model.language_model.*"}``. Each ``*`` keeps
    what it matches; of several patterns that match a name, the last counts."""

    @property
    def may_be_several(self) -> bool:
        """Whether the model is written as a pattern; a folder may have such a name too."""
        return self.model is not None and any(sign in self.model for sign in "*?[")


class Rule(Part):
    """What changes for the tensors that it selects; of several rules that match, the later wins key by key."""

    match: Annotated[str | list[str] | None, Wanted("a glob on tensor names, or a list of them")] = None
    """Globs on output tensor names; any may match."""
    layers: Annotated[LayerRange | None, _LAYERS] = None
    """Layers by number: 7, '8-15' (both ends included), [0, 5, 9], '20-' for the rest, or 'none' for the tensors
    outside the numbered layers."""
    depth: Annotated[list[float] | None, Wanted("two numbers from 0 to 1, as [0.5, 1]")] = None
    """Layers by their depth, from one to another, both included: 0 is the first layer (of the model, or of the slice)
    and 1 the last. Embeddings stand at 0, everything after the layers at 1."""
    method: Annotated[str | None, Wanted("the name of a merge method", text=True)] = None
    """Another method for these tensors (its parameters start from their defaults)."""
    params: Annotated[dict[str, Value], _PARAMS] = Field(default_factory=dict)
    """Other values of the method's parameters; values by source change only the sources that they name."""
    weights: Annotated[
        dict[str, Value] | list[Value] | None,
        Wanted("a mapping from sources to weights, or a list with one weight for each source"),
    ] = None
    """Other weights of the sources: by name, which leaves the others as they are, or one for each in order."""
    take: Annotated[str | None, _NAME] = None
    """Take these tensors from this model or step, unmerged."""
    drop: Annotated[bool, _YES_OR_NO] = False
    """Leave these tensors out of the output."""


class SliceSource(Part):
    """Some layers of one source of a slice."""

    model: Annotated[str, _NAME]
    """A model or step."""
    layers: Annotated[LayerRange, _LAYERS]
    """Which of its layers, as many as of the other sources; 'none' for a slice that only stands at the beginning or
    the end, for what is outside the layers."""
    weight: Annotated[Value, Wanted("a number, or a list of numbers")] = None
    """Its weight; a list of numbers is interpolated over the layers of the slice."""
    params: Annotated[dict[str, Value], _PARAMS] = Field(default_factory=dict)
    """Its values of the parameters that may differ between sources."""


class Slice(Part):
    """Consecutive output layers, made from as many layers of each of its sources.

    Lists of values are interpolated over the layers of the slice. Tensors outside the numbered layers are made as
    in the first slice where they belong to an embedding, else as in the last.
    """

    sources: Annotated[list[SliceSource], Wanted("a list of one source or more, each {model: name, layers: range}")] = (
        Field(min_length=1)
    )
    """What the layers are made from."""
    base: Annotated[str | None, _NAME] = None
    """The base of this slice where it differs from the step's; it takes part with the layers given in
    ``sources`` if it is listed there, else with those of the first source."""
    params: Annotated[dict[str, Value], _PARAMS] = Field(default_factory=dict)
    """Values of the method's parameters in this slice."""
    rules: Annotated[list[Rule], _RULES] = Field(default_factory=list)
    """Rules of this slice, after those of the step. Names and layer numbers are those of the output."""


class Step(Part):
    """One node of the graph: a method over sources, evaluated tensor by tensor."""

    written: ClassVar[Wanted] = Wanted("a step such as {method: linear, sources: [a, b]}")

    method: Annotated[str, Wanted("the name of a merge method", text=True)]
    """The merge method."""
    base: Annotated[str | None, _NAME] = None
    """The base model (a model or a step). Methods on task vectors subtract it from each source.
    ``mean`` stands for the mean of the sources."""
    sources: Annotated[
        dict[str, Value] | list[str], Wanted("a list of names of models or steps, or a mapping from names to weights")
    ] = Field(default_factory=list)
    """Models or steps, in order; as a mapping, with their weights."""
    params: Annotated[dict[str, Value], _PARAMS] = Field(default_factory=dict)
    """Values of the method's parameters: one value, a list of numbers interpolated over the layers, or one of these
    for each source by name."""
    like: Annotated[str | None, Wanted("the name of a variant such as mergekit", text=True)] = None
    """Start from another implementation's variant of the method: ``mergekit`` or ``peft``."""
    rules: Annotated[list[Rule], _RULES] = Field(default_factory=list)
    """Changes for some tensors, by glob on their names, by layer, or both; later rules win."""
    slices: Annotated[list[Slice] | None, Wanted("a list of slices")] = None
    """Layers stacked anew: the output's layers are those of the slices in order. Replaces ``sources``."""
    stack: Annotated[list[str], Wanted("a list of globs on tensor names")] = Field(default_factory=list)
    """Globs on the names of the layers that ``slices`` speak of, where a model has several stacks of layers, as an
    encoder and a decoder. Such layers keep their places; without it, the stack is that of the language model."""
    mixture: Annotated[Mixture | None, Wanted("a mapping with experts")] = None
    """Experts in the place of the MLPs; the method and its sources make everything else."""
    experts: Annotated[ExpertChoice | None, Wanted("a mapping such as {keep: [0, 1]}")] = None
    """Experts that are chosen of those that the step has."""
    missing: Annotated[Literal["error", "present", "base"], Wanted("error, present or base")] = "error"
    """A tensor that only some inputs have: refuse, merge it over the inputs that have it, or take it from
    the base (from the first source that has it, where the base does not)."""
    vocabulary: Annotated[Literal["error", "truncate"], Wanted("error or truncate")] = "error"
    """Sources with different numbers of rows in an embedding or head: refuse, or keep the common rows."""

    def source_names(self) -> list[str]:
        return list(self.sources)


class TokenRow(Part):
    """Where the rows of one token come from, in embedding and head."""

    written: ClassVar[Wanted] = Wanted("the name of a model or {kind: model, zero, mean or random}", text=True)

    kind: Annotated[Literal["model", "zero", "mean", "random"], Wanted("model, zero, mean or random")] = "model"
    """``model``: a model's row. ``zero``. ``mean``: of the models that have the token, or else of all rows.
    ``random``: drawn with the mean and the spread of a model's rows."""
    model: Annotated[str | None, _MODEL] = None
    """The model whose row, or whose rows' spread, counts."""
    token: Annotated[str | None, _TEXT] = None
    """Another token, whose row of that model is taken."""
    id: Annotated[int | None, Wanted("the number of a row")] = None
    """The row of that model by its number."""
    force: Annotated[bool, _YES_OR_NO] = False
    """Also for the models that have the token themselves."""


class Tokenizer(Part):
    """The tokenizer of the result; every model's rows follow its tokens."""

    from_: Annotated[str, Wanted("union or the name of a model", text=True)] = Field(alias="from")
    """A model, or ``union``: the tokenizer of the base, with the tokens that the other models have besides."""
    base: Annotated[str | None, _MODEL] = None
    """The model that a union begins with, and whose rows stand in where another lacks a token; the base of the
    output's step if left out. Without one, the mean of the models that have the token stands in."""
    tokens: Annotated[
        dict[str, TokenRow], Wanted("a mapping from tokens to models or {kind: model, zero, mean or random}")
    ] = Field(default_factory=dict)
    """Tokens whose rows come from elsewhere: a model, or a mapping. Those that no tokenizer has are added."""
    absent: Annotated[Literal["models", "subword", "mean"], Wanted("models, subword or mean")] = "models"
    """What makes up the rows of tokens that a model lacks: the other models' rows, by the rule above; the mean of the
    rows of the pieces that the model's own tokens make of the token's text; or the mean of all its rows."""
    rows: Annotated[str | None, Wanted("the path of a file", text=True)] = None
    """A file of mixtures for tokens that a model lacks, as ``pxmerge tokens transplant --method omp`` writes it; goes
    before ``absent``."""
    pad_to: Annotated[int | None, Wanted("a whole number from 1 on")] = None
    """The number of rows is a multiple of this, with no more rows than that needs; if left out, the model's own."""


class Push(Part):
    """Where the result is uploaded once it is complete."""

    repo: Annotated[str, Wanted("a repository such as org/name")]
    """The repository, ``org/name``; made if it does not exist."""
    private: Annotated[bool, _YES_OR_NO] = False
    """Whether a repository that is made is private."""
    revision: Annotated[str | None, _TEXT] = None
    """The branch; the default one if left out."""


class Output(Part):
    """What is written, and where."""

    from_: Annotated[str | None, _NAME] = Field(default=None, alias="from")
    """The step (or model) to write; the last step if left out."""
    path: Annotated[str, Wanted("a folder or a .safetensors file", text=True)] = "./merged"
    """The folder of the result; or one file, if it ends in ``.safetensors``: the weights alone, whatever their size."""
    dtype: Annotated[str | None, Wanted("a dtype such as bfloat16")] = None
    """Storage dtype of merged floating-point tensors; that of the base or first source if left out."""
    quantize: Annotated[Literal["keep"] | None, Wanted("keep")] = None
    """``keep`` writes what the base or first source keeps quantised in the same way; plain if left out."""
    shard_size: Annotated[str | int, Wanted("a size such as 5GB")] = "5GB"
    """Largest size of one file of weights, as 5GB, 512MiB or a number of bytes."""
    config_from: Annotated[str | None, _MODEL] = None
    """The model whose config and other side files go with the result; the base or first source if left out."""
    tokenizer_from: Annotated[str | None, _MODEL] = None
    """The model whose tokenizer and chat template go with the result; ``config_from`` if left out."""
    chat_template: Annotated[str | None, Wanted("Jinja text, or chatml, llama3, mistral, exaone or alpaca")] = None
    """What is written as the chat template in place of the tokenizer's own: Jinja text, or chatml, llama3, mistral,
    exaone or alpaca."""
    kind: Annotated[Literal["model", "task_vector"] | None, Wanted("model or task_vector")] = None
    """``task_vector`` writes the difference to the base instead of the model."""
    push: Annotated[Push | None, Wanted("a mapping with the repo to push to")] = None
    """Where to upload the result."""


class Recipe(Part):
    """A merge: inputs, a graph of steps, an output."""

    short_forms: ClassVar[tuple[str, ...]] = ("merge",)

    pxmerge: Annotated[Literal[1], Wanted("1, the version of the recipe format that this release reads")] = 1
    """Version of the recipe format."""
    models: Annotated[dict[str, ModelInput], Wanted("a mapping from names to models")]
    """The inputs by name: a path, ``org/name``, ``org/name@revision``, or a mapping with an adapter."""
    steps: Annotated[dict[str, Step], Wanted("a mapping from names to steps")]
    """The graph of merges by name, evaluated tensor by tensor; a single one may be written as ``merge:``."""
    tokenizer: Annotated[Tokenizer | None, Wanted("a mapping such as {from: union}")] = None
    """The tokenizer of the result, where it is not simply that of ``output.tokenizer_from``."""
    output: Annotated[Output, Wanted("a mapping that says what is written, and where")] = Field(default_factory=Output)
    """What is written, and where."""
    seed: Annotated[int, Wanted("a whole number from 0 to 9223372036854775807")] = 0
    """Seed of the methods that draw random numbers."""
    lock: Annotated[str | None, Wanted("the path of a lock file", text=True)] = None
    """A lock file, as ``pxmerge lock`` writes it, relative to the recipe's own: the inputs are those that it pins, or
    nothing is merged."""
