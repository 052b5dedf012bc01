"""The diagonal of the Fisher information."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from mergekit_px.errors import UsageError
from mergekit_px.learn.data import COUNTED, IGNORED, TARGETS, Batch, Examples, derived_seed, to_device
from mergekit_px.learn.deferred import Widened
from mergekit_px.learn.models import LearningModel
from mergekit_px.learn.outputs import Precision, forward, logits_of, passes
from mergekit_px.learn.stats.sums import Tensors, require_finite

Labels = Literal["expected", "sampled", "given"]

MOST_CLASSES = 100
"""Classes up to which every one of them is gone through, with a backward pass each."""


class FisherSums:
    """Squared gradients of log-likelihoods, added up example by example.

    ``F = mean_n E_y [(d log p(y | x_n) / d theta)^2]`` with y as ``labels`` says (Matena and Raffel,
    arXiv:2111.09832, equation 3). Float32 on the CPU, in the shapes of the tensors. Tensors that no gradient reaches
    (buffers, parts that the data do not use) have zeros.

    Args:
        labels: whose log-likelihood; ``expected`` refuses models with too many classes, or with several predictions
            for an example.
        seed: draws labels, where they are drawn, from it and the number of the example.
    """

    batch = 1

    def __init__(
        self, model: LearningModel, *, labels: Labels, seed: int, device: torch.device, precision: Precision
    ) -> None:
        self._module = model.module
        self._labels = labels
        self._seed = seed
        self._device = device
        self._precision = precision
        self._stored = {name: tensor for name in model.names if (tensor := model.tensor(name)) is not None}
        self._sums: dict[int, Tensor] = {}
        """By what is stored."""
        self._hooks: list[RemovableHandle] = []
        self._probability = 0.0
        makers = {}
        for name, stored in self._stored.items():
            if not isinstance(stored, nn.Parameter) or not stored.is_floating_point() or id(stored) in self._sums:
                continue
            total = torch.zeros_like(stored, dtype=model.dtype, requires_grad=False)
            self._sums[id(stored)] = total
            leaf: Tensor = stored
            if stored.dtype != total.dtype:
                leaf = torch.zeros((), dtype=total.dtype, device=stored.device).expand(stored.shape)
                makers[model.names[name]] = partial(Widened.apply, leaf, stored.detach())
            self._hooks.append(leaf.requires_grad_().register_post_accumulate_grad_hook(partial(self._square, total)))
        model.defer(makers)

    def add(self, number: int, examples: Examples) -> None:
        """Add example ``number``, the only one given."""
        example = to_device(examples.arrays, self._device, torch.float32)
        generator = torch.Generator().manual_seed(derived_seed(self._seed, "fisher", number))
        with passes(self._device, self._precision):
            terms = _log_likelihoods(self._module, example, self._labels, generator, examples.where)
        for place, (self._probability, value) in enumerate(terms):
            value.backward(retain_graph=place + 1 < len(terms))

    @torch.no_grad()
    def _square(self, total: Tensor, leaf: Tensor) -> None:
        """Add the square of a gradient, which is gone after that."""
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            total.addcmul_(gradient, gradient, value=self._probability)

    def state(self) -> Tensors:
        """The sums so far, themselves."""
        return {str(number): total for number, total in enumerate(self._sums.values())}

    def restore(self, state: Tensors) -> None:
        """Go on from sums that `state` gave."""
        for number, total in enumerate(self._sums.values()):
            total.copy_(state[str(number)])

    def means(self, count: int) -> Tensors:
        """The information, given how many examples were added; the sums are gone after that.

        Raises:
            NonFiniteError: a mean is not finite.
        """
        for hook in self._hooks:
            hook.remove()
        means = {key: total.div_(count).cpu() for key, total in self._sums.items()}
        return {
            name: require_finite(means[id(one)], name) if id(one) in means else torch.zeros(one.shape)
            for name, one in self._stored.items()
            if one.is_floating_point()
        }


def _log_likelihoods(
    module: nn.Module, example: Batch, labels: Labels, generator: torch.Generator, where: str
) -> list[tuple[float, Tensor]]:
    """(probability, log-likelihood) of the labels of one example; the probabilities add up to 1."""
    counted = example[COUNTED]
    logits = logits_of(forward(module, example))[counted]
    if labels == "given":
        targets = example[TARGETS][counted]
        return [(1.0, -functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))]
    scores = functional.log_softmax(logits, dim=-1)
    probabilities = scores.detach().exp()
    if labels == "sampled":
        drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(scores.device)
        return [(1.0, scores.gather(1, drawn).sum())]
    if len(scores) > 1 or scores.shape[1] > MOST_CLASSES:
        raise UsageError(
            f"the expectation over labels takes one prediction of at most {MOST_CLASSES} classes for an example,"
            f" and the model gives {len(scores)} of {scores.shape[1]}",
            where=where,
            hint="draw labels instead: --labels sampled",
        )
    return [(float(probability), value) for probability, value in zip(probabilities[0], scores[0], strict=True)]
