"""What a label belongs to: the one place that decides which prediction of a model is compared with which label.

A causal language model predicts the next token: its prediction at a position belongs to the label one place on. Others
are compared position by position. Padding, prompts and labels of -100 take no part, whatever is computed. Learners see
data only after that: ``TARGETS`` has at each place what the prediction there is compared with, and ``COUNTED`` which
predictions take part at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergekit_px.errors import InputError
from mergekit_px.learn.data import (
    COUNTED,
    IGNORED,
    LABELS,
    TARGETS,
    Batch,
    Examples,
    forward_names,
    require_arguments,
    require_classes,
    to_device,
)
from mergekit_px.learn.outputs import forward, logits_of, loss_of

Kind = Literal["values", "examples", "tokens", "next tokens"]

_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")
_BY_POSITION = ("input_ids", "attention_mask", "token_type_ids", "position_ids", LABELS)
"""Arrays of a transformers model that have a column for each token."""
_SAMPLE = 2
_NEAR = 1e-4


@dataclass(frozen=True)
class Reading:
    """How the labels of data belong to the predictions of a model.

    Attributes:
        kind: what a label is of: a value, a class of an example, of a token, or the next token.
        classes: that the model has; None for values.
        own_loss: whether the model returns a loss that is neither the cross-entropy nor the squared error.
    """

    kind: Kind
    classes: int | None
    own_loss: bool
    _module: nn.Module
    _positions: tuple[int, ...]
    _labelled: bool

    def of(self, arrays: Batch) -> Batch:
        """The arrays with ``TARGETS``, ``COUNTED`` and what else the forward pass needs to make predictions for them.

        Labels of padding become -100; columns at the end that are padding in every example are left out.
        """
        found = _with_decoder_inputs(self._module, _trimmed(self._module, arrays))
        labels = found[LABELS]
        if self.kind in ("values", "examples"):
            found[TARGETS] = labels
            shape = labels.shape if self.kind == "examples" else labels.shape[:1]
            found[COUNTED] = torch.ones(shape, dtype=torch.bool, device=labels.device)
            return found
        mask = _mask(self._module, found)
        if self.kind == "next tokens":
            found = with_positions(self._module, found)
        if self._labelled:
            found[LABELS] = _masked(labels, mask)
            found[TARGETS] = _next(found[LABELS], mask, IGNORED) if self.kind == "next tokens" else found[LABELS]
            found[COUNTED] = found[TARGETS] != IGNORED
        else:
            real = torch.ones((len(labels), *self._positions), dtype=torch.bool, device=labels.device)
            real = mask if mask is not None and mask.shape == real.shape else real
            found[COUNTED] = _next(real, mask, False) if self.kind == "next tokens" else real
            found[TARGETS] = torch.full(real.shape, IGNORED, device=labels.device)
        return found


def read_labels(
    module: nn.Module,
    data: Examples,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    labelled: bool = True,
) -> tuple[Examples, Reading]:
    """Data as a learner takes it, and how its labels are read.

    Args:
        module: on the device.
        labelled: whether the labels of the data mean anything.

    Raises:
        InputError: arrays, labels or lengths that do not fit the model, labels that equal the inputs where nothing is
            predicted from what comes before, and labels that were moved to the next token already.
    """
    reading = find_reading(module, dict(data.arrays), data.where, device, dtype, labelled=labelled)
    read = reading.of(dict(data.arrays))
    if labelled and not bool(read[COUNTED].any()):
        raise InputError("no prediction has a label: all are padding, prompt or -100", where=data.where)
    return Examples(read, data.where), reading


def find_reading(
    module: nn.Module,
    arrays: Batch,
    where: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    labelled: bool = True,
) -> Reading:
    """Try a few examples: how do labels belong to predictions? Raises as `read_labels` does."""
    require_arguments(module, arrays, where)
    arrays = _trimmed(module, arrays)
    _require_tokens(module, arrays, where)
    labels = arrays[LABELS]
    arrays = _with_decoder_inputs(module, arrays)
    few = to_device({name: array[:_SAMPLE] for name, array in arrays.items()}, device, dtype)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            logits = _logits(module, few, where)
            if labels.is_floating_point():
                return Reading("values", None, _has_own_loss(module, few, logits), module, (), labelled)
            classes, positions = int(logits.shape[-1]), tuple(logits.shape[1:-1])
            if logits.ndim < 2 or (labelled and logits.shape[:-1] != few[LABELS].shape):
                raise InputError(
                    f"labels of shape {list(few[LABELS].shape)} do not fit logits of shape {list(logits.shape)}",
                    where=where,
                )
            if labelled:
                require_classes(labels, classes, where)
            if not positions:
                return Reading("examples", classes, _has_own_loss(module, few, logits), module, (), labelled)
            is_next = _predicts_next(module, arrays, few, logits, labelled=labelled)
            if labelled:
                _require_no_copies(module, arrays, where, is_next=is_next)
            own = labelled and _has_own_loss(module, few, logits)
            return Reading("next tokens" if is_next else "tokens", classes, own, module, positions, labelled)
    finally:
        module.train(was_training)


def real_rows(values: Tensor, batch: Batch) -> Tensor:
    """(n, features): the rows of what a layer saw or gave, positions that an attention mask leaves out aside.

    Which of two masks, of an encoder's tokens or of a decoder's, the shape tells.
    """
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(name)
        if mask is not None and mask.shape == values.shape[:-1]:
            return values[mask.bool()]
    return values.flatten(0, -2)


def target_count(batch: Batch) -> int:
    """How many labels of a batch take part in its loss."""
    targets = batch[TARGETS]
    return len(targets) if targets.is_floating_point() else int((targets != IGNORED).sum())


def _logits(module: nn.Module, few: Batch, where: str) -> Tensor:
    try:
        output = forward(module, few)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{name} {list(array.shape[1:])}" for name, array in few.items() if name != LABELS)
        lines = str(error).splitlines() or [type(error).__name__]
        what = f"the model cannot take the arrays ({shapes} for an example): {lines[0]}"
        raise InputError(what, where=where) from error
    try:
        return logits_of(output)
    except InputError:
        last = ", ".join(list(module.state_dict())[-2:])
        raise InputError(
            f"{type(module).__name__} has no head that scores classes: it returned {type(output).__name__} without"
            f" logits, and its last tensors are {last}",
            where=where,
            hint="give a checkpoint with a head, whose config.json names the class that has it",
        ) from None


def _predicts_next(module: nn.Module, arrays: Batch, few: Batch, logits: Tensor, *, labelled: bool) -> bool:
    """By what the model's own loss does with labels, else by its class, else by what it can see."""
    is_causal = bool(_CAUSAL.search(type(module).__name__))
    copies = labelled and _are_inputs(module, arrays)
    labels = few[LABELS] if labelled else few.get("input_ids")
    if labels is None or labels.shape != logits.shape[:-1]:
        return is_causal
    labels = _masked(labels, _mask(module, few))
    own = _own_loss(module, {**few, LABELS: labels}) if int(labels.max()) < logits.shape[-1] else None
    if own is not None:
        in_place = _near(own, _cross_entropy(logits, labels))
        one_on = _near(own, _cross_entropy(logits[:, :-1], labels[:, 1:]))
        if one_on != in_place:
            return one_on or (is_causal and copies and _looks_back_only(module, few, logits))
        return is_causal
    return is_causal or (copies and _looks_back_only(module, few, logits))


def _looks_back_only(module: nn.Module, few: Batch, logits: Tensor) -> bool:
    """Whether the first prediction stays as it is when all later tokens become others."""
    if "input_ids" not in few:
        return False
    ids = few["input_ids"].clone()
    ids[:, 1:] = torch.where(ids[:, 1:] == ids[0, 0], ids.max(), ids[0, 0])
    changed = logits_of(forward(module, {**few, "input_ids": ids}))
    return torch.allclose(changed[:, 0], logits[:, 0], rtol=0, atol=1e-6 * float(logits.abs().max()))


def _require_no_copies(module: nn.Module, arrays: Batch, where: str, *, is_next: bool) -> None:
    name = type(module).__name__
    if not is_next and _are_inputs(module, arrays):
        raise InputError(
            f"the labels are the {_inputs_name(module)} themselves, and {name} does not predict the next token:"
            " it would learn to copy",
            where=where,
            hint="give labels of -100 where no input was masked, or a model for causal language modelling",
        )
    if is_next and not _are_inputs(module, arrays) and _are_inputs(module, arrays, moved=1):
        raise InputError(
            f"the labels are the input_ids moved by one already, and {name} predicts the next token:"
            " they would be moved twice",
            where=where,
            hint="give labels that equal input_ids, -100 where they do not count",
        )


def _are_inputs(module: nn.Module, arrays: Batch, moved: int = 0) -> bool:
    """Whether every label that counts is the input at its place, or ``moved`` places on."""
    inputs, labels = arrays.get(_inputs_name(module)), arrays[LABELS]
    if inputs is None or inputs.shape != labels.shape:
        return False
    labels = _masked(labels, _mask(module, arrays))
    if moved:
        labels, inputs = labels[:, :-moved], inputs[:, moved:]
    counted = labels != IGNORED
    return bool(counted.any()) and bool((labels[counted] == inputs[counted]).all())


def _require_tokens(module: nn.Module, arrays: Batch, where: str) -> None:
    """Raise ``InputError`` for token numbers beyond the vocabulary, and for more tokens than there are positions."""
    ids = arrays.get("input_ids")
    if ids is None or ids.ndim != 2 or not ids.numel():
        return
    embed: Any = getattr(module, "get_input_embeddings", None)
    embeddings = None if embed is None else embed()
    if isinstance(embeddings, nn.Embedding) and ids.is_floating_point():
        raise InputError(f"input_ids are {ids.dtype}, and tokens are whole numbers".replace("torch.", ""), where=where)
    if isinstance(embeddings, nn.Embedding) and not 0 <= int(ids.min()) <= int(ids.max()) < embeddings.num_embeddings:
        raise InputError(
            f"input_ids go from {int(ids.min())} to {int(ids.max())}, the model has a vocabulary of"
            f" {embeddings.num_embeddings}",
            where=where,
            hint="use the tokenizer that belongs to the model",
        )
    longest = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < ids.shape[1]:
        raise InputError(
            f"an example is {ids.shape[1]} tokens long, the model has {longest} positions",
            where=where,
            hint=f"cut the examples: --max-length {longest} for texts",
        )


def _has_own_loss(module: nn.Module, few: Batch, logits: Tensor) -> bool:
    labels = few[LABELS]
    labels = _masked(labels, _mask(module, few)) if labels.ndim > 1 else labels
    own = _own_loss(module, {**few, LABELS: labels})
    if own is None:
        return False
    if labels.is_floating_point():
        if labels.numel() != logits.numel():
            return True
        return not _near(own, functional.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype)))
    kinds = [_cross_entropy(logits, labels)]
    if labels.ndim > 1:
        kinds.append(_cross_entropy(logits[:, :-1], labels[:, 1:]))
    return not any(_near(own, one) for one in kinds)


def _own_loss(module: nn.Module, few: Batch) -> Tensor | None:
    if LABELS not in forward_names(module)[0]:
        return None
    try:
        return loss_of(forward(module, few, with_labels=True))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def _near(first: Tensor, second: Tensor) -> bool:
    """Equal as numbers of float32 are; two that are both no number are equal."""
    return torch.allclose(first.float(), second.float(), rtol=_NEAR, atol=_NEAR, equal_nan=True)


def _trimmed(module: nn.Module, arrays: Batch) -> Batch:
    """Without the columns at the end that are padding in every example, which cost time and positions."""
    mask = arrays.get("attention_mask")
    if getattr(module, "config", None) is None or mask is None or mask.ndim != 2:
        return arrays
    width = _used(mask.bool())
    cut = {name: width for name in _BY_POSITION if name in arrays and arrays[name].shape[1:] == mask.shape[1:]}
    if _is_encoder_decoder(module):
        cut.pop(LABELS, None)
        if arrays[LABELS].ndim == 2 and not arrays.keys() & {"decoder_input_ids", "decoder_attention_mask"}:
            cut[LABELS] = _used(arrays[LABELS] != IGNORED)
    return {name: array[:, : cut[name]].contiguous() if name in cut else array for name, array in arrays.items()}


def _used(kept: Tensor) -> int:
    """How many columns there are up to the last in which something is kept; all where nothing is."""
    columns = kept.any(dim=0).nonzero()
    return int(columns.max()) + 1 if len(columns) else kept.shape[1]


def _mask(module: nn.Module, arrays: Batch) -> Tensor | None:
    """Which positions of the predictions are no padding, bool."""
    mask = arrays.get("decoder_attention_mask" if _is_encoder_decoder(module) else "attention_mask")
    return None if mask is None or mask.ndim != 2 else mask.bool()


def _masked(labels: Tensor, mask: Tensor | None) -> Tensor:
    return labels if mask is None or mask.shape != labels.shape else labels.masked_fill(~mask, IGNORED)


def _next(values: Tensor, mask: Tensor | None, nothing: Any) -> Tensor:
    """At each position the value of the next; ``nothing`` at the last, and where padding would predict."""
    moved = torch.full_like(values, nothing)
    moved[:, :-1] = values[:, 1:]
    return moved if mask is None or mask.shape != values.shape else moved.masked_fill(~mask, nothing)


def _is_encoder_decoder(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _inputs_name(module: nn.Module) -> str:
    return "decoder_input_ids" if _is_encoder_decoder(module) else "input_ids"


def _with_decoder_inputs(module: nn.Module, arrays: Batch) -> Batch:
    """With what a decoder reads, the labels one place back, where a model would make it from labels.

    It never has as many places as the encoder, so that shapes tell what a layer sees.
    """
    make = getattr(module, "prepare_decoder_input_ids_from_labels", None)
    labels = arrays[LABELS]
    if make is None or "decoder_input_ids" in arrays or labels.ndim != 2 or labels.is_floating_point():
        return dict(arrays)
    if "attention_mask" in arrays and arrays["attention_mask"].shape == labels.shape:
        labels = functional.pad(labels, (0, 1), value=IGNORED)
    until_last = (labels != IGNORED).flip(1).cummax(dim=1).values.flip(1)
    given = {"decoder_input_ids": make(labels=labels), "decoder_attention_mask": until_last.long()}
    return {**given, **arrays, LABELS: labels}


def with_positions(module: nn.Module, arrays: Batch) -> Batch:
    """With positions that begin at the first token, where padding comes before it."""
    mask = _mask(module, arrays)
    if mask is None or bool(mask[:, 0].all()) or "position_ids" in arrays:
        return arrays
    if "position_ids" not in forward_names(module)[0]:
        return arrays
    return {**arrays, "position_ids": (mask.long().cumsum(dim=1) - 1).clamp_(min=0)}
