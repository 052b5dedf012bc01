"""From models and data to their merge, from the lowest layer to the highest.

<output>/model/    the merged model
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.reader import TensorReader, open_reader
from mergekit_px.checkpoint.whole import read_tensor
from mergekit_px.learn.data import Examples, drawn, to_device
from mergekit_px.learn.data_files import load_data_and_labels
from mergekit_px.learn.labels import read_labels
from mergekit_px.learn.life import Run
from mergekit_px.learn.memory import COMPUTED, floating, numbers, plan_memory
from mergekit_px.learn.models import LearningModel
from mergekit_px.learn.ofasd.blend import Site, check_sources, find_sites
from mergekit_px.learn.output import write_model
from mergekit_px.learn.regmean_order.layers import Layer, by_layer, running_layers, up_to
from mergekit_px.learn.regmean_order.settings import RegmeanOrderReport, RegmeanOrderSettings
from mergekit_px.learn.sources import require_same_tokens
from mergekit_px.learn.state import StateFile
from mergekit_px.learn.stats.gram import GramSums
from mergekit_px.learn.stats.sums import Tensors, add_up
from mergekit_px.methods.regmean import RegMeanParams, regmean


@torch.no_grad()
def fit(run: Run[RegmeanOrderSettings]) -> RegmeanOrderReport:
    """Merge models in the order of their layers and write the merged model.

    Raises:
        UsageError, InputError, PlanError: models or data that do not fit.
        NonFiniteError: an activation or a merged value is not finite.
    """
    sources = run.checkpoints("sources")
    check_sources(sources[0], sources[1:])
    require_same_tokens(sources[0], sources[1:])
    _plan_memory(run, sources)
    model = run.model("sources")
    sites = find_sites(model)
    with ExitStack() as stack:
        readers = [open_reader(source) for source in sources]
        for reader in readers:
            stack.callback(reader.close)
        merge = _Merge(run, model, sources, readers)
        state = StateFile(run.work / "merged.safetensors", run.identity)
        saved, info = state.load() if state.exists else ({}, {"layers": 0, "matrices": []})
        for site in sites:
            site.target.copy_(saved[site.name] if saved else merge.average(site))
        data = [_examples(run, model, number) for number in range(len(sources))]
        layers = running_layers(model.module, sites, _few(run, data[0]))
        for number, layer in enumerate(layers):
            run.tell("layers", number, len(layers))
            if number < info["layers"]:
                continue
            info = {"layers": number + 1, "matrices": [*info["matrices"], *merge.merge(layer, data)]}
            if state.due:
                state.save({site.name: site.target for site in sites}, info)
    write_model(model, run.stage / "model", run.identity)
    return RegmeanOrderReport(
        examples=[len(part) for part in data],
        layers=[layer.name for layer in layers],
        matrices=info["matrices"],
        averaged=[site.name for site in sites if site.name not in info["matrices"]],
    )


class _Merge:
    """Merges tensors of models, in one of them."""

    def __init__(
        self,
        run: Run[RegmeanOrderSettings],
        model: LearningModel,
        sources: Sequence[Checkpoint],
        readers: Sequence[TensorReader],
    ) -> None:
        settings = run.settings
        self._sources, self._readers = sources, readers
        self._weights = settings.weights or (1.0,) * len(sources)
        self._params = RegMeanParams(shrink=settings.shrink, ridge=settings.ridge)
        self._sums = GramSums(
            model, batch=settings.batch, device=run.device, precision=settings.precision, transposed=True
        )

    def average(self, site: Site) -> Tensor:
        """Of all models, by their weights."""
        return self._merged([self._value(site, number) for number in range(len(self._sources))])

    def merge(self, layer: Layer, data: Sequence[Examples]) -> list[str]:
        """Put the merged weights of a layer into the model, whose layers below are merged; the matrices among them that
        any model has inputs of."""
        grams: list[Tensors] = []
        for number, examples in enumerate(data):
            for site in layer.sites:
                site.target.copy_(self._value(site, number))
            sums = self._sums.of(layer.linear)
            add_up(_UpTo(sums, layer), examples)
            grams.append(sums.means())
        measured = [site for site in layer.sites if any(site.name in found for found in grams)]
        for site in layer.sites:
            values = [self._value(site, number) for number in range(len(self._sources))]
            transposed = layer.is_transposed(site)
            if site in measured:
                values = [value.T for value in values] if transposed else values
                width = values[0].shape[1]
                values += [found.get(site.name, torch.zeros(width, width)).to(values[0].device) for found in grams]
            merged = self._merged(values)
            site.target.copy_(merged.T if transposed and site in measured else merged)
        return [site.name for site in measured]

    def _merged(self, tensors: Sequence[Tensor]) -> Tensor:
        return regmean(tensors, self._weights, self._params)

    def _value(self, site: Site, number: int) -> Tensor:
        tensor = read_tensor(self._readers[number], self._sources[number].tensors[site.name])
        return tensor.to(site.target.dtype).reshape(site.target.shape)


class _UpTo:
    """Sums of a layer's inputs; nothing above the layer runs."""

    def __init__(self, sums: GramSums, layer: Layer) -> None:
        self.batch, self._sums, self._layer = sums.batch, sums, layer
        self.state, self.restore = sums.state, sums.restore

    def add(self, number: int, examples: Examples) -> None:
        """Add a batch."""
        with up_to(self._layer):
            self._sums.add(number, examples)


def _examples(run: Run[RegmeanOrderSettings], model: LearningModel, number: int) -> Examples:
    """The data of a model, as all models take them."""
    settings = run.settings
    path = settings.data[number % len(settings.data)]
    source = run.checkpoints("sources")[number]
    found, labelled = load_data_and_labels(path, source, settings.text, run.note)
    found = drawn(found, settings.examples, settings.seed)
    return read_labels(model.module, found, run.device, labelled=labelled)[0]


def _few(run: Run[RegmeanOrderSettings], data: Examples) -> dict[str, Tensor]:
    return to_device(next(data.batches(2)), run.device, torch.float32)


def _plan_memory(run: Run[RegmeanOrderSettings], sources: Sequence[Checkpoint]) -> None:
    stored = floating(sources[0])
    # where weights are (in, out), as in GPT-2, it is the other side; there this is more in sum
    squares = by_layer({one.name: one.shape[1] ** 2 for one in stored if len(one.shape) == 2})
    grams = (2 + len(sources)) * COMPUTED * squares
    kept = {"weights": COMPUTED * numbers(stored), "Gram matrices of one layer": grams}
    plan_memory(run, stored, kept, {})
