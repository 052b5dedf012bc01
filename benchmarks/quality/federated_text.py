"""One-shot federated learning without labels on real text: clients of a text encoder, and lines to distil from."""

from __future__ import annotations

import sys
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.coefficients import learned
from benchmarks.quality.experiment import Experiment, Scores
from benchmarks.quality.federated import UNLABELLED, Federation, split
from benchmarks.quality.lab import Lab, State
from benchmarks.quality.packages import TASKS, examples
from benchmarks.quality.text_encoder import Encoder, Lines, padded, tokenized
from benchmarks.quality.text_tasks import BATCH, RATES, fit, head
from mergekit_px.learn.ofasd.settings import CoefficientSettings

TASK = TASKS["desktops"]
"""Of those with eight classes one where fine-tunes gain most."""
COUNTS = {"train": 640, "validation": 320, "test": 480}
"""Lines: those of the clients, those without labels, those for the test."""
CLIENTS, ALPHA, EPOCHS = 5, 0.5, 5
SETTINGS = CoefficientSettings(label_share=0.0, validation=0.25, test=0.03, steps=60, evaluate_every=10, batch=32)


class Classifier(nn.Module):
    """The encoder with the head of the task, as `pxmerge ofasd` loads it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Parameter(torch.zeros(len(TASK.classes), self.encoder.model.config.hidden_size), False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder.pooled(input_ids, attention_mask) @ self.head.T

    def logits(self, lines: Lines) -> Tensor:
        return self.encoder.features(lines) @ self.head.T

    def state(self) -> State:
        return {name: tensor.detach().clone().contiguous() for name, tensor in self.state_dict().items()}


@cache
def _part(part: str, seed: int) -> tuple[Lines, Tensor]:
    texts, labels = examples(TASK, part, COUNTS[part], seed)
    return tokenized(texts), torch.tensor(labels)


def text(lab: Lab) -> Scores:
    """The pre-trained encoder, five clients on 640 lines by a Dirichlet split with alpha 0.5.

    Coefficients are learned from 320 other lines without their labels; beside them all weights are trained by the same.
    """
    parts = {part: _part(part, lab.seed) for part in COUNTS}
    (lines, labels), (proxy, truth), (test, wanted) = (parts[part] for part in ("train", "validation", "test"))
    model = Classifier()
    with torch.no_grad():
        model.head.copy_(head(model.encoder, lines, labels, len(TASK.classes)))
    base = model.state()

    def logits(state: State, lines: Lines) -> Tensor:
        model.load_state_dict(state)
        return model.logits(lines).detach()

    def tuned(start: State, lines: Lines, targets: Tensor) -> State:
        model.load_state_dict(start)
        steps = EPOCHS * -(-len(lines) // BATCH)
        fit(model, lambda rows: model(*padded([lines[row] for row in rows])), targets, steps, RATES["full"], lab.seed)
        print(f"  tuned on {len(lines)} lines, seed {lab.seed}", file=sys.stderr, flush=True)
        return model.state()

    clients = split(labels, CLIENTS, ALPHA, lab.seed)
    federation = Federation(
        base,
        [tuned(base, [lines[row] for row in rows.tolist()], labels[rows]) for rows in clients],
        [float(len(rows)) for rows in clients],
        lambda state: logits(state, test),
        wanted,
    )
    names = [lab.save(f"client{number}", state) for number, state in enumerate(federation.clients)]
    start, data = lab.save("base", base), lab.folder / "proxy.npz"
    tokens, mask = padded(proxy)
    np.savez(data, input_ids=tokens.numpy(), attention_mask=mask.numpy(), labels=truth.numpy())
    found = federation.controls()
    settings = SETTINGS.model_copy(update={"seed": lab.seed})
    for title, granularity in (("isotropic KD", "model"), ("anisotropic KD", "tensor")):
        chosen = settings.model_copy(update={"granularity": granularity})
        place = f"{__file__}:{Classifier.__name__}"
        found[title] = federation.score(learned(lab, start, names, str(data), chosen, federation.counts, place))
        print(f"  {title} {found[title]:.1f}, seed {lab.seed}", file=sys.stderr, flush=True)
    said = federation.teacher(lambda state: logits(state, proxy)).softmax(-1)
    found["all weights KD"] = federation.score(tuned(federation.by_count(), proxy, said))
    return found


EXPERIMENTS = (Experiment("ofasd-text", text, compared=UNLABELLED, by_default=False),)
