"""Statistics of a model on data that merge methods read: Fisher information and Gram matrices.

They are written as one safetensors file: ``NAME.fisher`` in the shape of tensor NAME, ``NAME.gram`` as (n, n) for the
(m, n) weight NAME of a linear layer. All float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergekit_px._version import __version__
from mergekit_px.checkpoint.fingerprint import fingerprint
from mergekit_px.checkpoint.hashing import file_sha256
from mergekit_px.checkpoint.json_text import shown
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.task_vector import KIND_KEY
from mergekit_px.errors import InputError, NonFiniteError, OutputError, UsageError
from mergekit_px.execute.lane import pick_device
from mergekit_px.learn.artefact import write_report, write_tensors
from mergekit_px.learn.data import (
    IGNORED,
    LABELS,
    Batch,
    Examples,
    derived_seed,
    load_examples,
    require_classes,
    to_device,
)
from mergekit_px.learn.models import LearningModel, find_checkpoint, load_model
from mergekit_px.learn.objective import check_fit, forward, logits_of
from mergekit_px.methods.fisher import FISHER
from mergekit_px.methods.regmean import GRAM

Labels = Literal["expected", "sampled", "given"]
Kind = Literal["fisher", "gram"]
Tell = Callable[[int, int], None]

STATISTICS_KIND = "statistics"
FINGERPRINT_KEY = "pxmerge.model_fingerprint"
MOST_CLASSES = 100
"""Classes up to which every one of them is gone through, with a backward pass each."""


@dataclass(frozen=True, slots=True)
class StatsOptions:
    """What is measured, and how.

    Attributes:
        kinds: of statistics.
        labels: whose log-likelihood the Fisher information is of: every class by its predicted probability, one class
            drawn from the prediction, or the label of the data (the empirical Fisher information).
        examples: how many are used, drawn by the seed; None for all.
        batch: examples in one forward pass of the Gram matrices. Fisher information goes example by example.
        seed: draws examples and labels.
        factory: ``file.py:function`` that makes the model.
    """

    kinds: tuple[Kind, ...] = ("fisher", "gram")
    labels: Labels = "expected"
    examples: int | None = None
    batch: int = 64
    seed: int = 0
    device: str = "auto"
    factory: str | None = None
    allow_code: bool = False
    allow_pickle: bool = False


def fisher_information(
    model: LearningModel,
    data: Examples,
    *,
    labels: Labels = "expected",
    seed: int = 0,
    device: torch.device | None = None,
    tell: Tell = lambda done, total: None,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information, by tensor name in the checkpoint.

    ``F = mean_n E_y [(d log p(y | x_n) / d theta)^2]`` with y as ``labels`` says (Matena and Raffel,
    arXiv:2111.09832, equation 3). Float32 on the CPU, in the shapes of the tensors. Tensors that no gradient reaches
    (buffers, parts that the data do not use) have zeros.

    Raises:
        InputError: labels that are not classes.
        UsageError: ``expected`` for a model with too many classes, or with several predictions for an example.
        NonFiniteError: a gradient is not finite.
    """
    device = device or torch.device("cpu")
    stored = {name: tensor for name in model.names if (tensor := model.tensor(name)) is not None}
    distinct = {id(one): one for one in stored.values() if isinstance(one, nn.Parameter)}
    parameters = [one.requires_grad_() for one in distinct.values() if one.is_floating_point()]
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for number, batch in enumerate(data.batches(1)):
        example = to_device(batch, device, torch.float32)
        generator = torch.Generator().manual_seed(derived_seed(seed, "fisher", number))
        terms = _log_likelihoods(model.module, example, labels, generator, data.where)
        for place, (probability, value) in enumerate(terms):
            last = place + 1 == len(terms)
            gradients = torch.autograd.grad(value, parameters, retain_graph=not last, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient, value=probability)
        tell(number + 1, len(data))
    found = {id(one): total.div_(len(data)).cpu() for one, total in zip(parameters, sums, strict=True)}
    return {
        name: _finite(found[id(one)], name).clone() if id(one) in found else torch.zeros(one.shape)
        for name, one in stored.items()
        if one.is_floating_point()
    }


def gram_matrices(
    model: LearningModel,
    data: Examples,
    *,
    batch: int = 64,
    device: torch.device | None = None,
    tell: Tell = lambda done, total: None,
) -> dict[str, Tensor]:
    """``E x x'`` of the inputs x of every ``nn.Linear``, by the name of its weight in the checkpoint.

    The mean is over all rows that the layer sees (examples, and tokens in them); positions that an
    ``attention_mask`` of the data leaves out do not count. (n, n) float32 on the CPU, summed in float64.

    Raises:
        NonFiniteError: an input of a layer is not finite.
    """
    device = device or torch.device("cpu")
    by_parameter: dict[int, list[str]] = {}
    for name in model.names:
        by_parameter.setdefault(id(model.tensor(name)), []).append(name)
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    mask: list[Tensor | None] = [None]

    def add(module: nn.Linear, arguments: tuple[Any, ...]) -> None:
        name = by_parameter[id(module.weight)][0]
        inputs = arguments[0].detach()
        kept = mask[0]
        seen = inputs[kept] if kept is not None and kept.shape == inputs.shape[:-1] else inputs.flatten(0, -2)
        seen = seen.double()
        product = seen.T @ seen
        sums[name] = sums[name] + product if name in sums else product
        rows[name] = rows.get(name, 0) + len(seen)

    hooks = [
        module.register_forward_pre_hook(add)
        for module in model.module.modules()
        if isinstance(module, nn.Linear) and id(module.weight) in by_parameter
    ]
    done = 0
    try:
        with torch.no_grad():
            for part in data.batches(batch):
                moved = to_device(part, device, torch.float32)
                mask[0] = moved["attention_mask"].bool() if "attention_mask" in moved else None
                forward(model.module, moved)
                done += len(part[LABELS])
                tell(done, len(data))
    finally:
        for hook in hooks:
            hook.remove()
    means = {first: _finite((total / max(rows[first], 1)).float().cpu(), first) for first, total in sums.items()}
    return {name: means[names[0]].clone() for names in by_parameter.values() if names[0] in means for name in names}


def measure(
    reference: str, data: str | Path, output: Path, options: StatsOptions, tell: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Measure a model and write ``output`` and, beside it, a report with the suffix ``.json``.

    Returns:
        the report.

    Raises:
        UsageError, InputError: options, a model or data that do not fit.
        NonFiniteError: a statistic is not finite.
        WriteError: the disk refuses.
    """
    device = pick_device(options.device)
    checkpoint = find_checkpoint(reference, allow_pickle=options.allow_pickle)
    model = load_model(checkpoint, options.factory, allow_code=options.allow_code)
    examples = load_examples(data)
    if options.examples is not None and options.examples < len(examples):
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(derived_seed(options.seed)))
        examples = examples.take(order[: options.examples])
    model.module.to(device).eval()
    _require_fit(model.module, examples, device)
    tensors: dict[str, Tensor] = {}
    if "fisher" in options.kinds:
        fisher = fisher_information(
            model,
            examples,
            labels=options.labels,
            seed=options.seed,
            device=device,
            tell=lambda done, total: tell("Fisher information, examples", done, total),
        )
        tensors.update({name + FISHER.suffix: tensor for name, tensor in fisher.items()})
    if "gram" in options.kinds:
        gram = gram_matrices(
            model,
            examples,
            batch=options.batch,
            device=device,
            tell=lambda done, total: tell("Gram matrices, examples", done, total),
        )
        if not gram and options.kinds == ("gram",):
            raise InputError("the model has no linear layers whose weights are tensors of its checkpoint")
        tensors.update({name + GRAM.suffix: tensor for name, tensor in gram.items()})
    reader = open_reader(checkpoint)
    try:
        model_fingerprint = fingerprint(checkpoint, reader)
    finally:
        reader.close()
    report = {
        "model": reference,
        "model_fingerprint": model_fingerprint,
        "data": str(data),
        "data_sha256": file_sha256(Path(data).expanduser()),
        "examples": len(examples),
        "device": str(device),
        "versions": {"pxmerge": __version__, "torch": torch.__version__},
        "options": {key: value for key, value in asdict(options).items() if not key.startswith("allow")},
        "fisher_trace": _total(tensors, FISHER.suffix),
        "gram_trace": {
            name.removesuffix(GRAM.suffix): float(tensor.diagonal().double().sum())
            for name, tensor in tensors.items()
            if name.endswith(GRAM.suffix)
        },
        "without": sorted(set(checkpoint.tensors) - set(model.names)),
    }
    write_tensors(output, tensors, {KIND_KEY: STATISTICS_KIND, FINGERPRINT_KEY: model_fingerprint})
    write_report(output.with_suffix(".json"), report)
    return report


def require_new(output: Path, *, overwrite: bool) -> None:
    """Raise ``OutputError`` for a name without .safetensors, a folder, or a file that is not to be replaced."""
    if output.suffix != ".safetensors":
        raise OutputError("statistics are written as .safetensors", where=str(output), hint="end the name so")
    if output.is_dir() or (output.exists() and not overwrite):
        raise OutputError("it exists already", where=str(output), hint="replace it with --overwrite, or name another")


def _log_likelihoods(
    module: nn.Module, example: Batch, labels: Labels, generator: torch.Generator, where: str
) -> list[tuple[float, Tensor]]:
    """(probability, log-likelihood) of the labels of one example; the probabilities add up to 1."""
    given = example[LABELS]
    output = forward(module, example)
    if labels == "given":
        own = getattr(output, "loss", None)
        counted = int((given != IGNORED).sum())
        if isinstance(own, Tensor):  # models that predict the next token shift the labels themselves
            return [(1.0, -own * counted)]
        logits = logits_of(output)
        loss = functional.cross_entropy(logits.flatten(0, -2), given.flatten(), ignore_index=IGNORED, reduction="sum")
        return [(1.0, -loss)]
    scores = functional.log_softmax(logits_of(output).flatten(0, -2).float(), dim=-1)
    counts = (given != IGNORED).flatten()
    probabilities = scores.detach().exp()
    if labels == "sampled":
        drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(scores.device)
        return [(1.0, (scores.gather(1, drawn).squeeze(1) * counts).sum())]
    if len(scores) > 1 or scores.shape[1] > MOST_CLASSES:
        raise UsageError(
            f"the expectation over labels takes one prediction of at most {MOST_CLASSES} classes for an example,"
            f" and the model gives {len(scores)} of {scores.shape[1]}",
            where=where,
            hint="draw labels instead: --labels sampled",
        )
    return [(float(probability), value) for probability, value in zip(probabilities[0], scores[0], strict=True)]


def _require_fit(module: nn.Module, data: Examples, device: torch.device) -> None:
    sample = to_device(data.take(torch.arange(min(2, len(data)))).arrays, device, torch.float32)
    classes = check_fit(module, sample, data.where, reads_logits=True)
    if classes is None:
        raise InputError(f"{LABELS} are values, and statistics are taken for classes", where=data.where)
    require_classes(data.arrays[LABELS], classes, data.where)


def _finite(tensor: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError("a statistic is NaN or infinite", where=shown(name))
    return tensor


def _total(tensors: Mapping[str, Tensor], suffix: str) -> float:
    return sum(float(tensor.double().sum()) for name, tensor in tensors.items() if name.endswith(suffix))
