"""How a mixture uses its experts: how often its routers choose each, and how much each adds where it is chosen."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.task_vector import KIND_KEY
from mergekit_px.checkpoint.whole import read_tensors
from mergekit_px.errors import InputError
from mergekit_px.learn.data import Batch, Examples, to_device
from mergekit_px.learn.labels import real_rows
from mergekit_px.learn.models import LearningModel
from mergekit_px.learn.outputs import Precision, forward, passes
from mergekit_px.learn.sources import source_fingerprint
from mergekit_px.learn.stats.sums import FINGERPRINT_KEY, STATISTICS_KIND, Tensors, require_finite
from mergekit_px.plan.layers import split_layer

ExpertScore = Literal["frequency", "reap"]

_ROUTED = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))
"""Arguments of the experts' forward pass in the classes of transformers 5, after the states: for each token the
numbers of its experts, and their weights. gpt-oss has names of its own."""


class ExpertSums:
    """What goes to each expert and comes of it, added up batch by batch in float64.

    Raises:
        InputError: a model without experts that are given their tokens by number.
    """

    def __init__(self, model: LearningModel, *, batch: int, device: torch.device, precision: Precision) -> None:
        self.batch = batch
        self._module = model.module
        self._device = device
        self._precision = precision
        self._experts = {name: module for name, module in model.module.named_modules() if _routed_names(module)}
        if not self._experts:
            label = None if model.checkpoint is None else model.checkpoint.label
            hint = "take a mixture of a class of transformers; llama4, jetmoe, nllb_moe and doge are not among them"
            raise InputError("the model has no experts that tokens are sent to by number", where=label, hint=hint)
        self._tokens: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._batch: Batch = {}

    @torch.no_grad()
    def add(self, number: int, examples: Examples) -> None:
        """Add a batch."""
        self._batch = to_device(examples.arrays, self._device, torch.float32)
        hooks = [
            module.register_forward_pre_hook(_Seen(self, name), with_kwargs=True)
            for name, module in self._experts.items()
        ]
        try:
            with passes(self._device, self._precision):
                forward(self._module, self._batch)
        finally:
            for hook in hooks:
                hook.remove()

    def see(self, name: str, module: nn.Module, given: dict[str, Any]) -> None:
        """Count the tokens of each expert of a layer, and add up the norms of what it makes of them, by their
        weights. Experts are asked for one choice of each token at a time, with a weight of 1."""
        states, routed, weights = (self._rows(given[key]) for key in ("hidden_states", *_routed_names(module)))
        count = next(parameter.shape[0] for parameter in module.parameters() if parameter.ndim == 3)
        tokens = self._tokens.setdefault(name, torch.zeros(count, dtype=torch.float64, device=states.device))
        sums = self._sums.setdefault(name, torch.zeros_like(tokens))
        for choice in range(routed.shape[1]):
            expert = routed[:, choice]
            made = module.forward(states, expert[:, None], torch.ones_like(weights[:, :1]))
            norms = weights[:, choice].double() * made.double().norm(dim=-1)
            tokens.index_add_(0, expert, torch.ones_like(norms))
            sums.index_add_(0, expert, norms)

    def state(self) -> Tensors:
        """The sums so far, themselves, and the tokens that they are of."""
        tokens = {f"tokens.{name}": total for name, total in self._tokens.items()}
        return tokens | {f"sum.{name}": total for name, total in self._sums.items()}

    def restore(self, state: Tensors) -> None:
        """Go on from sums that `state` gave."""
        for key, value in state.items():
            kind, _, name = key.partition(".")
            (self._tokens if kind == "tokens" else self._sums)[name] = value.to(self._device)

    def means(self) -> Tensors:
        """For each layer the share of all choices that fell on each expert, and its mean weighted norm (REAP, Lasby et
        al., arXiv:2510.13999): 0 for one that no token went to."""
        found: Tensors = {}
        for name, tokens in self._tokens.items():
            means = {"frequency": tokens / tokens.sum(), "reap": self._sums[name] / tokens.clamp(min=1)}
            found |= {f"{name}.{kind}": require_finite(one.float().cpu(), name) for kind, one in means.items()}
        return found

    def _rows(self, values: Tensor) -> Tensor:
        """The rows of tokens that count, whether or not the class has made one axis of examples and tokens."""
        mask = self._batch.get("attention_mask")
        flat = values.detach().flatten(0, -2)
        if mask is not None and mask.numel() == len(flat):
            flat = flat.view(*mask.shape, -1)
        return real_rows(flat, self._batch)


class _Seen:
    """A hook of the experts of one layer."""

    def __init__(self, sums: ExpertSums, name: str) -> None:
        self._sums, self._name = sums, name

    def __call__(self, module: nn.Module, places: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._sums.see(self._name, module, inspect.signature(module.forward).bind(*places, **named).arguments)


def _routed_names(module: nn.Module) -> tuple[str, ...]:
    names = tuple(inspect.signature(module.forward).parameters)
    return next((pair for pair in _ROUTED if names[:3] == ("hidden_states", *pair)), ())


def measured_scores(path: Path, by: ExpertScore, model: Checkpoint) -> dict[str, list[float]]:
    """Scores of all experts by layer, from a file of statistics of that model.

    Raises:
        InputError: no such statistics, of another model, or of two stacks of layers.
    """
    file = open_checkpoint(path)
    names = [name for name in file.tensors if name.endswith(f".{by}")]
    if file.metadata.get(KIND_KEY) != STATISTICS_KIND or not names:
        what = f"it holds no {by} of experts"
        raise InputError(what, where=str(path), hint="measure them: pxmerge stats MODEL --what experts --data FILE")
    if file.metadata.get(FINGERPRINT_KEY) != source_fingerprint(model):
        hint = f"measure it: pxmerge stats {model.label} --what experts --data FILE"
        raise InputError(f"its statistics are of another model than {model.label}", where=str(path), hint=hint)
    scores: dict[str, list[float]] = {}
    for name, values in read_tensors(file, names).items():
        split = split_layer(name)
        layer = "" if split is None else str(split.layer)
        if layer in scores or not layer:
            raise InputError(f"several of its layers are number {layer or 'none'}", where=f"{path}: {name}")
        scores[layer] = values.tolist()
    return scores
