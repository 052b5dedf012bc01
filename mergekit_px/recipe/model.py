"""What the user asked for, as frozen pydantic models: no files are opened here and no tensor is known.

A recipe names its inputs (``models``), a graph of ``steps`` over them, and one ``output``.
Values that may vary are kept as written; the plan resolves them for each tensor.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Scalar = bool | int | float | str | None

Value = Scalar | list[Any] | dict[str, Any]
"""A parameter as written: a scalar; a list of numbers, interpolated over depth; or one value for each
source by name, ``{math: 0.3, code: [0.1, 0.5]}``."""

LayerRange = Annotated[
    str | int | list[int],
    Field(
        description=(
            "Layers by number: 7, '8-15' (both ends included), [0, 5, 9], '20-' for the rest, "
            "or 'none' for the tensors outside the numbered layers."
        )
    ),
]


class RecipeModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, use_attribute_docstrings=True)


class ModelInput(RecipeModel):
    """One input checkpoint, with an adapter on top of it if one is named."""

    model: str | None = None
    """A folder, a safetensors file, ``org/name`` or ``org/name@revision``. Left out for an adapter alone."""
    adapter: str | list[str] | None = None
    """A PEFT adapter (or several, applied in order) on top of the model."""


class Rule(RecipeModel):
    """What changes for the tensors that it selects; of several rules that match, the later wins key by key."""

    match: str | list[str] | None = None
    """Globs on output tensor names; any may match."""
    layers: LayerRange | None = None
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
    layers: LayerRange
    weight: Value = None
    params: dict[str, Value] = Field(default_factory=dict)


class Slice(RecipeModel):
    """Consecutive output layers, made from as many layers of each of its sources.

    Lists of values are interpolated over the layers of the slice. Tensors outside the numbered layers are made as
    in the first slice where they belong to an embedding, else as in the last.
    """

    sources: list[SliceSource] = Field(min_length=1)
    base: str | None = None
    """The base of this slice where it differs from the step's; it takes part with the layers given in
    ``sources`` if it is listed there, else with those of the first source."""
    params: dict[str, Value] = Field(default_factory=dict)
    rules: list[Rule] = Field(default_factory=list)
    """Rules of this slice, after those of the step. Names and layer numbers are those of the output."""


class Step(RecipeModel):
    """One node of the graph: a method over sources, evaluated tensor by tensor."""

    method: str
    base: str | None = None
    """The base model (a model or a step). Methods on task vectors subtract it from each source."""
    sources: dict[str, Value] | list[str] = Field(default_factory=list)
    """Models or steps, in order; as a mapping, with their weights."""
    params: dict[str, Value] = Field(default_factory=dict)
    like: str | None = None
    """Start from another implementation's variant of the method: ``mergekit`` or ``peft``."""
    rules: list[Rule] = Field(default_factory=list)
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
    private: bool = False
    revision: str | None = None


class Output(RecipeModel):
    """What is written, and where."""

    from_: str | None = Field(default=None, alias="from")
    """The step (or model) to write; the last step if left out."""
    path: str = "./merged"
    dtype: str | None = None
    """Storage dtype of merged floating-point tensors; that of the base or first source if left out."""
    shard_size: str | int = "5GB"
    config_from: str | None = None
    """The model whose config and other side files go with the result; the base or first source if left out."""
    tokenizer_from: str | None = None
    """The model whose tokenizer and chat template go with the result; ``config_from`` if left out."""
    kind: Literal["model", "task_vector"] | None = None
    """``task_vector`` writes the difference to the base instead of the model."""
    push: Push | None = None


class Recipe(RecipeModel):
    """A merge: inputs, a graph of steps, an output."""

    pxmerge: Literal[1] = 1
    models: dict[str, ModelInput]
    steps: dict[str, Step]
    output: Output = Field(default_factory=Output)
    seed: int = 0
    """Seed of the methods that draw random numbers."""
