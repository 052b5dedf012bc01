"""A model with a forward pass, made from a checkpoint.

The class is that of ``transformers`` which the checkpoint's ``config.json`` names, or what a function of the user's
returns. Code that lies beside a checkpoint is never run.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.whole import read_tensor, read_tensors
from mergekit_px.errors import (
    InputError,
    NonFiniteError,
    TensorMismatchError,
    UsageError,
)
from mergekit_px.learn.deferred import Deferred, Make
from mergekit_px.user_code import user_function

_NAMES_SHOWN = 3


@dataclass(frozen=True)
class LearningModel:
    """A module, and how its tensors are called in the checkpoint.

    Attributes:
        module: the model; floating-point tensors are float32 unless the user's function made them otherwise, or it was
            loaded narrow: then parameters are as they are stored, and it runs under `Deferred`.
        checkpoint: where its tensors come from; None if it begins as its function made it.
        names: tensor name in the checkpoint -> name in ``module.state_dict()``, for every tensor that is the same
            array in both. Fused tensors that the class keeps in another form are not among them.
    """

    module: nn.Module
    checkpoint: Checkpoint | None
    names: Mapping[str, str]
    _export: Callable[[dict[str, Tensor]], dict[str, Tensor]] = field(default=dict, repr=False)
    _deferred: list[Deferred] = field(default_factory=list, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        floating = [one.dtype for one in self.module.parameters() if one.is_floating_point()]
        return floating[0] if floating and floating[0].itemsize >= 4 else torch.float32

    def defer(self, makers: Mapping[str, Make]) -> None:
        """Compute with weights that are made when they are needed: by these makers, by names in the module, instead of
        any before; what is stored narrow is widened."""
        while self._deferred:
            self._deferred.pop().remove()
        self._deferred.append(Deferred(self.module, makers))

    def tensor(self, name: str) -> Tensor | None:
        """The parameter or buffer that holds a tensor of the checkpoint, itself; None where there is none."""
        inner = self.names.get(name)
        return None if inner is None else self.module.state_dict(keep_vars=True)[inner]

    def tensors(self) -> dict[str, Tensor]:
        """The model as it now is, under the names, in the shapes, dtypes and order of the checkpoint.

        New or shared memory, on the CPU. Raises ``NonFiniteError`` where a value became NaN or infinite.
        """
        found = self._export({name: tensor.detach() for name, tensor in self.module.state_dict().items()})
        if self.checkpoint is None:
            return {name: _finite(tensor.cpu(), name) for name, tensor in found.items()}
        for name, inner in self.names.items():
            if name not in found:  # one of several names of a tied tensor
                found[name] = self.module.state_dict()[inner].detach()
        return {
            name: _finite(found[name].cpu().to(stored.dtype.torch).reshape(stored.shape), name)
            for name, stored in self.checkpoint.tensors.items()
        }


def load_model(
    checkpoint: Checkpoint | None,
    factory: str | Callable[[], nn.Module] | None = None,
    *,
    allow_code: bool = False,
    narrow: bool = False,
) -> LearningModel:
    """A model that holds the tensors of a checkpoint.

    Args:
        checkpoint: its tensors; None for a model that begins as the factory makes it.
        factory: ``file.py:function``, or the function itself, which takes nothing and returns a module whose
            ``state_dict`` has the names of the checkpoint. Left out: the ``transformers`` class that
            ``config.json`` names.
        allow_code: whether the user's code may be run.
        narrow: keep parameters of a ``transformers`` class as they are stored.

    Raises:
        UsageError: code that is not allowed or does not work, or the extra ``models`` is not installed.
        InputError: no configuration, or a class that ``transformers`` does not have.
        TensorMismatchError: tensors that the model or the checkpoint lacks, or of other shapes.
    """
    if factory is not None:
        where = factory if isinstance(factory, str) else getattr(factory, "__name__", "the model")
        make = user_function(factory, allow_code=allow_code) if isinstance(factory, str) else factory
        module = make()
        if not isinstance(module, nn.Module):
            raise UsageError(f"it returned {type(module).__name__}, not a torch.nn.Module", where=where)
        if checkpoint is not None:
            _fill(module, checkpoint, where)
        names = {name: name for name in (module.state_dict() if checkpoint is None else checkpoint.tensors)}
        return LearningModel(module, checkpoint, names)
    if checkpoint is None:
        raise UsageError("a model needs weights or a function that makes it", hint="name one of the two")
    return _transformers_model(checkpoint, narrow=narrow)


def _fill(module: nn.Module, checkpoint: Checkpoint, where: str) -> None:
    """Copy the tensors of a checkpoint into a module of the same names and shapes."""
    state = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    given = {id(state[name]) for name in checkpoint.tensors if name in state}
    _require_fit(
        missing=[name for name, tensor in state.items() if name not in checkpoint.tensors and id(tensor) not in given],
        unexpected=[name for name in checkpoint.tensors if name not in state],
        mismatched=[
            (name, tuple(state[name].shape), stored.shape)
            for name, stored in checkpoint.tensors.items()
            if name in state and tuple(state[name].shape) != stored.shape
        ],
        checkpoint=checkpoint,
        where=where,
    )
    reader = open_reader(checkpoint)
    try:
        with torch.no_grad():
            for name, stored in checkpoint.tensors.items():
                state[name].copy_(_finite(read_tensor(reader, stored), f"{checkpoint.label}: {name}"))
    finally:
        reader.close()


def _transformers_model(checkpoint: Checkpoint, *, narrow: bool) -> LearningModel:
    if checkpoint.config is None or checkpoint.directory is None:
        raise InputError(
            "it has no config.json that names a class",
            where=checkpoint.label,
            hint="give the folder, or a function that makes the model: file.py:function",
        )
    if importlib.util.find_spec("transformers") is None:
        raise UsageError("models by their config.json need transformers", hint='run: pip install "pxmerge[models]"')
    import transformers

    architectures = checkpoint.config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if model_class is None or not hasattr(model_class, "from_pretrained"):
        what = (
            f"transformers {transformers.__version__} has no class {shown(str(name))}" if name else "no class is named"
        )
        raise InputError(
            what,
            where=f"{checkpoint.label}/config.json",
            hint="give a function that makes the model: file.py:function (code beside a checkpoint is never run)",
        )
    dtypes = {stored.dtype.torch for stored in checkpoint.tensors.values() if stored.dtype.arithmetic}
    dtype = dtypes.pop() if dtypes in ({torch.bfloat16}, {torch.float16}) else torch.float32
    named: dict[str, Any] = {}
    module, info = _made(model_class, checkpoint, dtype, named)
    missing = info["missing_keys"]
    if missing and all(key.startswith("pooler.") for key in missing):
        named["add_pooling_layer"] = False  # saved without: what it would compute is no part of the checkpoint
        module, info = _made(model_class, checkpoint, dtype, named)
    if any(buffer.is_floating_point() and buffer.dtype == dtype != torch.float32 for buffer in module.buffers()):
        module, info = _made(model_class, checkpoint, torch.float32, named)  # it computes what it does not store
    if not narrow:
        for parameter in module.parameters():  # one after another
            parameter.data = parameter.data.float() if parameter.is_floating_point() else parameter.data
    _require_fit(
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(info["unexpected_keys"]),
        mismatched=sorted((key, tuple(ours), tuple(theirs)) for key, theirs, ours in info["mismatched_keys"]),
        checkpoint=checkpoint,
        where=str(name),
    )
    own: Any = module.config
    for settings in (own, own.get_text_config()):
        settings.use_cache = False  # what generation keeps
    export = functools.partial(_original_names, module)
    return LearningModel(module, checkpoint, _same_arrays(module, checkpoint, export), export)


def _made(
    model_class: Any, checkpoint: Checkpoint, dtype: torch.dtype, named: Mapping[str, Any]
) -> tuple[nn.Module, Any]:
    """A model with the tensors of a checkpoint, themselves where they have that dtype, and what was missing.

    Args:
        named: arguments of the class.
    """
    import transformers

    tensors = {
        name: _finite(tensor, f"{checkpoint.label}: {name}") for name, tensor in read_tensors(checkpoint).items()
    }
    config = _quietly(
        checkpoint,
        transformers.AutoConfig.from_pretrained,
        checkpoint.directory,
        local_files_only=True,
        trust_remote_code=False,
    )
    made: tuple[nn.Module, Any] = _quietly(
        checkpoint,
        model_class.from_pretrained,
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **named,
    )
    return made


def _quietly(checkpoint: Checkpoint, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """A call into ``transformers`` without its log and bars; what it raises in one line."""
    try:
        with silence():
            return call(*arguments, **named)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        lines = str(error).strip().splitlines()
        what = f"transformers cannot make the model: {lines[0] if lines else type(error).__name__}"
        raise InputError(what, where=f"{checkpoint.label}/config.json") from error


@contextmanager
def silence() -> Iterator[None]:
    """Inside, ``transformers`` keeps its log and bars to itself."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def _original_names(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of the files, which for some classes are not those of the module."""
    from transformers.core_model_loading import revert_weight_conversion

    original: dict[str, Tensor] = revert_weight_conversion(module, state)
    return original


def _same_arrays(
    module: nn.Module, checkpoint: Checkpoint, export: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, str]:
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    by_place = {(tensor.data_ptr(), tuple(tensor.shape)): name for name, tensor in state.items()}
    exported = export(dict(state))
    names = {}
    for name, stored in checkpoint.tensors.items():
        tensor = exported.get(name, state.get(name))
        if tensor is None or tuple(tensor.shape) != stored.shape:
            raise InputError(
                f"{type(module).__name__} keeps {shown(name)} in a form that cannot be turned back",
                where=checkpoint.label,
                hint="give a function that makes the model: file.py:function",
            )
        inner = by_place.get((tensor.data_ptr(), tuple(tensor.shape)))
        if inner is not None:
            names[name] = inner
    return names


def _require_fit(
    *,
    missing: list[str],
    unexpected: list[str],
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
    checkpoint: Checkpoint,
    where: str,
) -> None:
    """Raise ``TensorMismatchError`` where a checkpoint does not fill a model exactly."""
    found = []
    if missing:
        found.append(f"it lacks {_listed(missing)}")
    if unexpected:
        found.append(f"the model has no {_listed(unexpected)}")
    if mismatched:
        name, wanted, given = mismatched[0]
        more = f" and {len(mismatched) - 1} more" if len(mismatched) > 1 else ""
        found.append(f"{shown(name)} is {list(given)} there and {list(wanted)} in the model{more}")
    if found:
        raise TensorMismatchError(
            f"the checkpoint does not fit the model {where}: {'; '.join(found)}",
            where=checkpoint.label,
            hint="names and shapes of the model's state_dict must be those of the checkpoint",
        )


def _listed(names: list[str]) -> str:
    text = ", ".join(shown(name) for name in names[:_NAMES_SHOWN])
    return text if len(names) <= _NAMES_SHOWN else f"{text} and {len(names) - _NAMES_SHOWN} more"


def _finite(tensor: Tensor, where: str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # torch cannot ask this of eight bits
    if not bool(torch.isfinite(wide).all()):
        raise NonFiniteError("a NaN or an infinity", where=where)
    return tensor
