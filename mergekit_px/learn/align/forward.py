"""A model with changed parameters, made layer by layer for one pass, never written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mergekit_px.learn.data import TARGETS, TASK, Batch
from mergekit_px.learn.labels import target_count
from mergekit_px.learn.models import LearningModel
from mergekit_px.learn.objective import cross_entropy, right_predictions
from mergekit_px.learn.ofasd.blend import Site
from mergekit_px.learn.outputs import Precision, predict


class ChangedModel:
    """The target model plus changes of some of its tensors. A model has one of these: its weights come from there.

    Args:
        model: in evaluation mode, on the device.
        sites: its arrays.
        precision: of forward passes.
        heads: tensors that stand for the model's own in batches of each task; none where all tasks have those.
    """

    def __init__(
        self,
        model: LearningModel,
        sites: Sequence[Site],
        precision: Precision = "float32",
        heads: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        self.module: nn.Module = model.module
        self.sites = {site.name: site for site in sites}
        self._precision = precision
        self.dtype = model.dtype
        self._changes: Mapping[str, Tensor] = {}
        self._scale = 1.0
        self._heads, self.task = heads, 0
        model.defer({model.names[site.name]: partial(self._value, site) for site in sites})

    def logits(
        self, changes: Mapping[str, Tensor], batch: Batch, scale: float = 1.0, precision: Precision | None = None
    ) -> Tensor:
        """Logits with ``scale * changes`` added to the tensors that they name; differentiable in the changes, until the
        next pass."""
        self._changes, self._scale = changes, scale
        self.task = int(batch[TASK][0]) if TASK in batch else 0
        return predict(self.module, batch, precision or self._precision)

    def in_head(self, site: Site) -> bool:
        """Whether tasks have arrays of their own in its place."""
        return any(site.name in head for head in self._heads)

    def _value(self, site: Site) -> Tensor:
        if self._heads and site.name in self._heads[self.task]:
            return self._heads[self.task][site.name]
        return site.value + self._scale * self._changes[site.name] if site.name in self._changes else site.value

    def loss(self, changes: Mapping[str, Tensor], batch: Batch, scale: float = 1.0) -> Tensor:
        """Cross-entropy with the changes."""
        return cross_entropy(self.logits(changes, batch, scale), batch[TARGETS])

    @torch.no_grad()
    def accuracy(self, changes: Mapping[str, Tensor], batches: Iterable[Batch], scale: float = 1.0) -> float:
        """Percent of right labels, ignored ones aside."""
        right, count = 0, 0
        for batch in batches:
            right += right_predictions(self.logits(changes, batch, scale), batch[TARGETS])
            count += target_count(batch)
        return 100.0 * right / count if count else float("nan")
