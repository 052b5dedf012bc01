"""A model with changed parameters: substituted for one forward pass, never written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergekit_px.learn.data import IGNORED, LABELS, Batch, forward_names
from mergekit_px.learn.models import LearningModel
from mergekit_px.learn.objective import logits_of
from mergekit_px.learn.ofasd.blend import Site
from mergekit_px.learn.ofasd.objective import cross_entropy
from mergekit_px.learn.precision import Precision, passes


class ChangedModel:
    """The target model plus changes of some of its tensors.

    Args:
        model: in evaluation mode, on the device.
        sites: its arrays.
        precision: of forward passes.
    """

    def __init__(self, model: LearningModel, sites: Sequence[Site], precision: Precision = "float32") -> None:
        self.module: nn.Module = model.module
        self.sites = {site.name: site for site in sites}
        self._inner = {site.name: model.names[site.name] for site in sites}
        self._precision = precision
        self._passed = forward_names(model.module)[1]

    def logits(self, changes: Mapping[str, Tensor], batch: Batch, scale: float = 1.0) -> Tensor:
        """Logits with ``scale * changes`` added to the tensors that they name; differentiable in the changes."""
        changed = {self._inner[name]: self.sites[name].base + scale * change for name, change in changes.items()}
        inputs = {name: array for name, array in batch.items() if name != LABELS or name in self._passed}
        with passes(next(iter(inputs.values())).device, self._precision):
            return logits_of(functional_call(self.module, changed, kwargs=inputs))

    def loss(self, changes: Mapping[str, Tensor], batch: Batch, scale: float = 1.0) -> Tensor:
        """Cross-entropy with the changes."""
        return cross_entropy(self.logits(changes, batch, scale), batch[LABELS])

    @torch.no_grad()
    def accuracy(self, changes: Mapping[str, Tensor], batches: Iterable[Batch], scale: float = 1.0) -> float:
        """Percent of right labels, ignored ones aside."""
        right, count = 0, 0
        for batch in batches:
            counted = batch[LABELS] != IGNORED
            best = self.logits(changes, batch, scale).argmax(dim=-1)
            right += int(((best == batch[LABELS]) & counted).sum())
            count += int(counted.sum())
        return 100.0 * right / count if count else float("nan")

    @torch.no_grad()
    def write(self, changes: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Put the changes into the model for good."""
        for name, change in changes.items():
            self.sites[name].target.copy_(self.sites[name].base + scale * change)
