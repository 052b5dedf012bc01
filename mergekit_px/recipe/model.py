"""What the user asked for, as frozen pydantic models: no files are opened here and no tensor is known.

A recipe names its inputs (``models``), a graph of ``steps`` over them, and one ``output``.
Values that may vary are kept as written; the plan resolves them for each tensor.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Scalar = bool | int | float | str | None

Value = Scalar | list[Any] | dict[str, Any]
"""A parameter as written: a scalar; a list of numbers, interpolated over depth; or one value for each
source by name, ``{math: 0.3, code: [0.1, 0.5]}``."""

LayerRange = str | int | list[int]
"""As written; :mod:`mergekit_px.recipe.layer_range` reads it."""


MEAN = "mean"
"""As a step's base: the mean of its sources, unless a model or step has that name."""


class RecipeModel(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, use_attribute_docstrings=True, defer_build=True
    )


class ModelInput(RecipeModel):
    """One input checkpoint, with an adapter on top of it if one is named."""

    model: str | None = None
    """A folder, a safetensors file, ``org/name`` or ``org/name@revision``. Left out for an adapter alone.
    Relative paths are relative to the current directory."""
    adapter: str | list[str] | None = None
    """A PEFT adapter (or several, applied in order) on top of the model."""
    keep_tied: bool = False
    """An adapter that changes one of a tied embedding and head changes both alike, instead of untying them. Not
    what was trained, but the model keeps its size."""
    attention_output: Literal["as_trained", "once"] = "as_trained"
    """PEFT adds the LoRA of the out_proj of an ``nn.MultiheadAttention`` twice, in training as in merging, and so
    does ``as_trained``; ``once`` is for adapters that were trained otherwise."""
    residual_base: bool = False
    """The model is the residual one that a start such as PiSSA's left behind, not the original."""
    component: str | None = None
    """One component of a pipeline: ``unet``, ``transformer``, ``vae``, ``text_encoder``, ``text_encoder_2``. Left out,
    all are merged. For a model that is one already: the part of its adapters that it takes."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Other names for its tensors, after its adapters: ``{"model.*": "model.language_model.*"}``. Each ``*`` keeps
    what it matches; of several patterns that match a name, the last counts."""


class Rule(RecipeModel):
    """What changes for the tensors that it selects; of several rules that match, the later wins key by key."""

    match: str | list[str] | None = None
    """Globs on output tensor names; any may match."""
    layers: LayerRange | None = None
    """Layers by number: 7, '8-15' (both ends included), [0, 5, 9], '20-' for the rest, or 'none' for the tensors
    outside the numbered layers."""
    method: str | None = None
    """Another method for these tensors (its parameters start from their defaults)."""
    params: dict[str, Value] = Field(default_factory=dict)
    """Other values of the method's parameters; values by source change only the sources that they name."""
    weights: dict[str, Value] | list[Value] | None = None
    """Other weights of the sources: by name, which leaves the others as they are, or one for each in order."""
    take: str | None = None
    """Take these tensors from this model or step, unmerged."""
    drop: bool = False
    """Leave these tensors out of the output."""


class SliceSource(RecipeModel):
    """Some layers of one source of a slice."""

    model: str
    """A model or step."""
    layers: LayerRange
    """Which of its layers, as many as of the other sources."""
    weight: Value = None
    """Its weight; a list of numbers is interpolated over the layers of the slice."""
    params: dict[str, Value] = Field(default_factory=dict)
    """Its values of the parameters that may differ between sources."""


class Slice(RecipeModel):
    """Consecutive output layers, made from as many layers of each of its sources.

    Lists of values are interpolated over the layers of the slice. Tensors outside the numbered layers are made as
    in the first slice where they belong to an embedding, else as in the last.
    """

    sources: list[SliceSource] = Field(min_length=1)
    """What the layers are made from."""
    base: str | None = None
    """The base of this slice where it differs from the step's; it takes part with the layers given in
    ``sources`` if it is listed there, else with those of the first source."""
    params: dict[str, Value] = Field(default_factory=dict)
    """Values of the method's parameters in this slice."""
    rules: list[Rule] = Field(default_factory=list)
    """Rules of this slice, after those of the step. Names and layer numbers are those of the output."""


class Step(RecipeModel):
    """One node of the graph: a method over sources, evaluated tensor by tensor."""

    method: str
    """The merge method."""
    base: str | None = None
    """The base model (a model or a step). Methods on task vectors subtract it from each source.
    ``mean`` stands for the mean of the sources."""
    sources: dict[str, Value] | list[str] = Field(default_factory=list)
    """Models or steps, in order; as a mapping, with their weights."""
    params: dict[str, Value] = Field(default_factory=dict)
    """Values of the method's parameters: one value, a list of numbers interpolated over the layers, or one of these
    for each source by name."""
    like: str | None = None
    """Start from another implementation's variant of the method: ``mergekit`` or ``peft``."""
    rules: list[Rule] = Field(default_factory=list)
    """Changes for some tensors, by glob on their names, by layer, or both; later rules win."""
    slices: list[Slice] | None = None
    """Layers stacked anew: the output's layers are those of the slices in order. Replaces ``sources``."""
    missing: Literal["error", "present", "base"] = "error"
    """A tensor that only some inputs have: refuse, merge it over the inputs that have it, or take it from
    the base (from the first source that has it, where the base does not)."""
    vocabulary: Literal["error", "truncate"] = "error"
    """Sources with different numbers of rows in an embedding or head: refuse, or keep the common rows."""

    def source_names(self) -> list[str]:
        return list(self.sources)


class Push(RecipeModel):
    """Where the result is uploaded once it is complete."""

    repo: str
    """The repository, ``org/name``; made if it does not exist."""
    private: bool = False
    """Whether a repository that is made is private."""
    revision: str | None = None
    """The branch; the default one if left out."""


class Output(RecipeModel):
    """What is written, and where."""

    from_: str | None = Field(default=None, alias="from")
    """The step (or model) to write; the last step if left out."""
    path: str = "./merged"
    """The folder of the result."""
    dtype: str | None = None
    """Storage dtype of merged floating-point tensors; that of the base or first source if left out."""
    shard_size: str | int = "5GB"
    """Largest size of one file of weights, as 5GB, 512MiB or a number of bytes."""
    config_from: str | None = None
    """The model whose config and other side files go with the result; the base or first source if left out."""
    tokenizer_from: str | None = None
    """The model whose tokenizer and chat template go with the result; ``config_from`` if left out."""
    chat_template: str | None = None
    """Jinja text that is written as the chat template, in place of the tokenizer's own."""
    kind: Literal["model", "task_vector"] | None = None
    """``task_vector`` writes the difference to the base instead of the model."""
    push: Push | None = None
    """Where to upload the result."""


class Recipe(RecipeModel):
    """A merge: inputs, a graph of steps, an output."""

    pxmerge: Literal[1] = 1
    """Version of the recipe format."""
    models: dict[str, ModelInput]
    """The inputs by name: a path, ``org/name``, ``org/name@revision``, or a mapping with an adapter."""
    steps: dict[str, Step]
    """The graph of merges by name, evaluated tensor by tensor; a single one may be written as ``merge:``."""
    output: Output = Field(default_factory=Output)
    """What is written, and where."""
    seed: int = 0
    """Seed of the methods that draw random numbers."""
