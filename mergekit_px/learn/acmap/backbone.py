"""A frozen model that runs with the tensors of one adapter at a time in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_px.adapters.adapter import Adapter, Binding
from mergekit_px.adapters.config import AdapterConfig
from mergekit_px.adapters.peft_keys import parse_keys
from mergekit_px.adapters.registry import family
from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.fingerprint import fingerprint
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.reader import MemoryReader, checkpoint_from_state_dict, open_reader
from mergekit_px.checkpoint.whole import read_tensors
from mergekit_px.errors import AdapterError, InputError, NonFiniteError, TensorMismatchError, UsageError
from mergekit_px.execute.lane import pick_device
from mergekit_px.learn.acmap.readout import Pool, Readout
from mergekit_px.learn.data import Batch, require_arguments, to_device
from mergekit_px.learn.labels import with_positions
from mergekit_px.learn.models import LearningModel, load_model
from mergekit_px.learn.text_data import NO_TEXT, TextOptions
from mergekit_px.plan.inputs import fetch_checkpoint

_FAILURES = (RuntimeError, TypeError, ValueError, IndexError)


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """The model that computes features.

    Attributes:
        base: its checkpoint. With ``factory``, adapter tensors may be missing from it; None if the function that
            makes the model fills it too.
        factory: ``file.py:function`` that makes the model.
        feature, pool: what is read, see `Readout`.
        batch: examples of one forward pass.
        text: how texts are read, where they are the data.
    """

    base: str | None = None
    factory: str | None = None
    feature: str | None = None
    pool: Pool = "first"
    batch: int = 64
    device: str = "auto"
    allow_code: bool = False
    allow_pickle: bool = False
    allow_base_mismatch: bool = False
    text: TextOptions = NO_TEXT


class Backbone:
    """A model and what it takes to put an adapter into it.

    Args:
        adapter: any merged adapter, by the names of the state; only names and shapes are looked at.
        config: the configuration of a PEFT adapter; None where the adapter's names are those of the model.

    Raises:
        UsageError, InputError: no model, or one that cannot be made.
        TensorMismatchError: adapter and model do not fit one another.
        AdapterError: a PEFT adapter that cannot be put into the base.
    """

    def __init__(self, options: ModelOptions, adapter: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> None:
        self._config = config
        self.device = pick_device(options.device)
        self._model = _model(options, () if config is not None else adapter)
        self._module = self._model.module.to(self.device).eval().requires_grad_(False)
        self._tensors = self._module.state_dict(keep_vars=True)
        self._readout = Readout(self._module, options.feature, options.pool)
        if config is not None and self._model.checkpoint is None:
            raise UsageError("PEFT adapters change the tensors of a base", hint="give its checkpoint by --base")
        self.with_adapter(adapter)
        self.fingerprint = self._fingerprint(set() if config is not None else set(adapter))

    def with_adapter(self, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that take the places of the model's, by the names of the module, on its device."""
        changed = self._bound(adapter) if self._config is not None else adapter
        found = {}
        for name, tensor in changed.items():
            inner = self._model.names.get(name, name)
            own = self._tensors.get(inner)
            if own is None:
                raise TensorMismatchError(
                    f"the model has no {shown(name)}, which the adapters of the state have",
                    hint="names are those of the model's state_dict; or merge PEFT adapters as folders",
                )
            if own.shape != tensor.shape:
                raise TensorMismatchError(
                    f"{shown(name)} is {list(tensor.shape)} in the state's adapters, {list(own.shape)} in the model"
                )
            found[inner] = tensor.to(self.device, own.dtype)
        return found

    @torch.no_grad()
    def features(self, batches: Iterator[Batch], tensors: Mapping[str, Tensor], where: str) -> Iterator[Tensor]:
        """(b, d) of each batch of inputs, with ``tensors`` in the model.

        Raises:
            InputError: inputs that do not fit the forward pass.
            NonFiniteError: a feature that is NaN or infinite.
        """
        dtype = next((one.dtype for one in self._tensors.values() if one.is_floating_point()), torch.float32)
        with self._readout.listening():
            for number, batch in enumerate(batches):
                require_arguments(self._module, batch, where)
                given = with_positions(self._module, to_device(batch, self.device, dtype))
                found = self._feature(given, tensors, where)
                if not bool(torch.isfinite(found).all()):
                    raise NonFiniteError("the model gives features that are NaN or infinite", where=where)
                if number == 0:
                    self._require_sight(given, tensors, found, where)
                yield found

    def _feature(self, given: Batch, tensors: Mapping[str, Tensor], where: str) -> Tensor:
        try:
            output = torch.func.functional_call(self._module, dict(tensors), (), given)
        except _FAILURES as error:
            shapes = ", ".join(f"{name} {list(array.shape[1:])}" for name, array in given.items())
            lines = str(error).splitlines() or [type(error).__name__]
            what = f"the model cannot take the arrays ({shapes} for an example): {lines[0]}"
            raise InputError(what, where=where) from error
        return self._readout.read(output, given, where)

    def _require_sight(self, given: Batch, tensors: Mapping[str, Tensor], found: Tensor, where: str) -> None:
        """Raise ``UsageError`` for a feature of texts that stays what it is whatever follows their first token."""
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None or ids.ndim != 2 or ids.shape[1] < 2:
            return
        rows = torch.arange(len(ids)) if mask is None else mask[:, :2].bool().all(dim=1).nonzero().flatten()
        few = {name: array[rows[:2]] for name, array in given.items()}
        ids = few["input_ids"]
        others = torch.where(ids == ids[:, :1], ids.max(), ids[:, :1]) if len(ids) else ids
        others[:, :1] = ids[:, :1]
        if torch.equal(others, ids):
            return
        few["input_ids"] = others
        if torch.allclose(self._feature(few, tensors, where), found[rows[:2]], rtol=0, atol=1e-6):
            raise UsageError(
                f"the feature of {type(self._module).__name__} depends on nothing but the first token of a text, which"
                " sees no other",
                where="--pool",
                hint="read the last token, which sees all: --pool last; or --pool mean",
            )

    def _bound(self, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the base with a PEFT adapter in them."""
        assert self._config is not None
        label = "the state's adapter"
        config = AdapterConfig(str(self._config.get("peft_type", "")).upper(), self._config, label)
        kind = family(config)
        described = checkpoint_from_state_dict(label, adapter)
        bound = Adapter(label, described, config, kind, parse_keys(described.tensors, kind.parameters, label))
        found = {}
        for target, patch in self._patches(bound).items():
            own, source = (None if name is None else self._tensor(name) for name in (target, patch.source))
            if own is None or (patch.source is not None and source is None):
                raise TensorMismatchError(
                    f"the adapter changes {shown(target)}, which the model keeps in another form or ties to another",
                    hint="give a function that makes the model: --model file.py:function",
                )
            factors = {role: adapter[stored.name].to(self.device) for role, stored in patch.factors.items()}
            block = None if source is None else source.detach()
            if block is not None and block.dtype != torch.float64:
                block = block.float()
            found[target] = patch.merged(block, factors)
        return found

    def _patches(self, adapter: Adapter) -> Binding:
        """By the names of the model, which PEFT uses; else by those of the files, where the class renames tensors."""
        base = self._model.checkpoint
        assert base is not None
        inside = {name: one for name, one in self._tensors.items() if isinstance(one, Tensor)}
        try:
            return adapter.bind(replace(checkpoint_from_state_dict(base.label, inside), config=base.config))
        except AdapterError:
            return adapter.bind(base)

    def _tensor(self, name: str) -> Tensor | None:
        """A tensor of the model by its name there, or in the checkpoint."""
        return self._tensors[name] if name in self._tensors else self._model.tensor(name)

    def _fingerprint(self, adapter: set[str]) -> str:
        """A short name for the weights without adapters."""
        base = self._model.checkpoint
        if base is not None:
            reader = open_reader(base)
            try:
                return fingerprint(base, reader)
            finally:
                reader.close()
        rest = {name: one.detach().cpu() for name, one in self._tensors.items() if name not in adapter and one.numel()}
        return fingerprint(checkpoint_from_state_dict("the model", rest), MemoryReader(rest))


def _model(options: ModelOptions, adapter: Mapping[str, Tensor] | tuple[()]) -> LearningModel:
    if options.base is None and options.factory is None:
        raise UsageError("features of data need a model", hint="give --base, --model, or both; or --features")
    checkpoint = None if options.base is None else fetch_checkpoint(options.base, allow_pickle=options.allow_pickle)
    if options.factory is None or checkpoint is None:
        return load_model(checkpoint, options.factory, allow_code=options.allow_code)
    made = load_model(None, options.factory, allow_code=options.allow_code)
    _fill(made.module, checkpoint, set(adapter), options.factory)
    return LearningModel(made.module, checkpoint, {name: name for name in checkpoint.tensors})


def _fill(module: nn.Module, checkpoint: Checkpoint, adapter: set[str], where: str) -> None:
    """Copy a base into a model whose adapter tensors it need not have."""
    state = {name: one for name, one in module.state_dict(keep_vars=True).items() if isinstance(one, Tensor)}
    given = {id(state[name]) for name in checkpoint.tensors if name in state}
    problems = [f"the model has no {shown(name)}" for name in checkpoint.tensors if name not in state]
    problems += [
        f"it lacks {shown(name)}" for name, one in state.items() if name not in adapter and id(one) not in given
    ]
    problems += [
        f"{shown(name)} is {list(stored.shape)} there and {list(state[name].shape)} in the model"
        for name, stored in checkpoint.tensors.items()
        if name in state and tuple(state[name].shape) != stored.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise TensorMismatchError(
            f"the checkpoint does not fit the model {where}: {problems[0]}{more}",
            where=checkpoint.label,
            hint="names and shapes must be those of the model's state_dict, the adapters' tensors aside",
        )
    with torch.no_grad():
        for name in checkpoint.tensors:
            tensor = read_tensors(checkpoint, [name])[name]
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                raise NonFiniteError("a NaN or an infinity", where=f"{checkpoint.label}: {shown(name)}")
            state[name].copy_(tensor)
