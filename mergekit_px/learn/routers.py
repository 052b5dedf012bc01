"""Rows of a router from prompts: what a dense model makes of the texts that each expert is for, and is not for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from mergekit_px.checkpoint.contents import Checkpoint
from mergekit_px.checkpoint.open import open_checkpoint
from mergekit_px.checkpoint.reader import open_reader
from mergekit_px.checkpoint.whole import read_tensor, write_tensors
from mergekit_px.errors import InputError, OutputError, PlanError
from mergekit_px.learn.models import load_model
from mergekit_px.learn.tokenizers import Tokenizer
from mergekit_px.plan.config import layer_count
from mergekit_px.plan.inputs import fetch_checkpoint
from mergekit_px.plan.layers import is_embedding
from mergekit_px.plan.mixtures import ROUTER_FILE_ROWS, ROUTER_FILE_SHARED
from mergekit_px.plan.tied import is_vocabulary
from mergekit_px.recipe.mixture import Expert, Mixture

ROUTERS_KIND = "routers"
_ALIKE = 0.999
"""Rows of a larger cosine send a token to both experts alike."""

Reading = Callable[[Sequence[str]], Tensor]
"""Texts -> what they are in every layer, shape (layers, width)."""


def write_routers(
    path: Path, reference: str, mixture: Mixture, *, overwrite: bool, allow_pickle: bool, note: Callable[[str], None]
) -> None:
    """Write the rows of a mixture's routers, as its prompts and the model ask for.

    A file that holds these rows already stays as it is.

    Args:
        reference: the model that reads the prompts.

    Raises:
        UsageError: transformers is missing.
        InputError: the model, or its tokenizer, cannot be read.
        OutputError: the file is there and holds something else.
    """
    checkpoint = fetch_checkpoint(reference, allow_pickle=allow_pickle)
    rows = router_rows(checkpoint, mixture)
    layers = sum(name.endswith("router") for name in rows)
    alike = [layer for layer in range(layers) if _alike(rows[ROUTER_FILE_ROWS.format(layer=layer)])]
    if alike:
        where = "every layer" if len(alike) == layers else f"{len(alike)} of {layers} layers"
        note(f"two experts have almost equal rows in {where}: their prompts are too alike to tell them apart")
    if path.exists() and not overwrite:
        if not _holds(path, rows):
            hint = "replace it with --overwrite, or name another output"
            raise OutputError("it is there already, with other rows of routers", where=str(path), hint=hint)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, rows, {"pxmerge.kind": ROUTERS_KIND})


def router_rows(checkpoint: Checkpoint, mixture: Mixture) -> dict[str, Tensor]:
    """The rows of every layer, float32, under the names of a file of routers."""
    if checkpoint.directory is None:
        raise InputError("prompts are read by a model on this machine", where=checkpoint.label)
    hint = "prompts are read by it: put its files there, or take a router that needs no prompts, such as random"
    tokenizer = Tokenizer(checkpoint.directory, checkpoint.label, hint)
    kind = mixture.router.kind
    read = _embeddings(checkpoint, tokenizer) if kind == "embedding" else _states(checkpoint, tokenizer, mixture)
    scale = mixture.router.scale or 1.0
    vectors = torch.stack([_vector(expert, read) for expert in mixture.experts], dim=1) * scale
    rows = {ROUTER_FILE_ROWS.format(layer=layer): own for layer, own in enumerate(vectors)}
    if mixture.shared is not None and mixture.shared.prompts:
        gate = _vector(mixture.shared, read) * scale
        rows |= {ROUTER_FILE_SHARED.format(layer=layer): own[None] for layer, own in enumerate(gate)}
    return rows


def _vector(expert: Expert, read: Reading) -> Tensor:
    """Of length 1 in every layer: what the expert is for, less what it is not for."""
    found = read(expert.prompts)
    if expert.negative_prompts:
        found = found - read(expert.negative_prompts)
    return torch.nn.functional.normalize(found, dim=-1, eps=1e-8)


def _states(checkpoint: Checkpoint, tokenizer: Tokenizer, mixture: Mixture) -> Reading:
    """The mean over prompts of the states that enter each layer: the last token's, or the mean over tokens."""
    module = load_model(checkpoint).module.eval()
    last = mixture.router.pooling == "last"

    def read(prompts: Sequence[str]) -> Tensor:
        total: Tensor | None = None
        for tokens in tokenizer.encode(prompts):
            with torch.no_grad():
                given = torch.tensor([tokens.ids])
                states = torch.stack(module(input_ids=given, output_hidden_states=True).hidden_states[:-1])[:, 0]
            own = states[:, -1] if last else states.mean(1)
            total = own if total is None else total + own
        assert total is not None
        return total.float() / len(prompts)

    return read


def _embeddings(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Reading:
    """The sum of the embeddings of all tokens of the prompts, of length 1, the same in every layer."""
    layers = layer_count(checkpoint.config or {})
    name = next((name for name in checkpoint.tensors if is_vocabulary(name) and is_embedding(name)), None)
    if layers is None or name is None:
        raise InputError("no embedding of tokens is in the model", where=checkpoint.label)
    with closing(open_reader(checkpoint)) as reader:
        embedding = read_tensor(reader, checkpoint.tensors[name])

    def read(prompts: Sequence[str]) -> Tensor:
        ids = torch.tensor([number for tokens in tokenizer.encode(prompts) for number in tokens.ids])
        if int(ids.max()) >= embedding.shape[0]:
            what = f"the tokenizer gives token {int(ids.max())}, and '{name}' has {embedding.shape[0]} rows"
            raise PlanError(what, where=checkpoint.label)
        total = embedding[ids].float().sum(0)
        return torch.nn.functional.normalize(total, dim=-1, eps=1e-8).expand(layers, -1)

    return read


def _alike(rows: Tensor) -> bool:
    unit = torch.nn.functional.normalize(rows.float(), dim=-1)
    return bool((unit @ unit.T).fill_diagonal_(0).max() > _ALIKE)


def _holds(path: Path, rows: dict[str, Tensor]) -> bool:
    """Whether a file holds these rows. Raises ``InputError`` for one that is no checkpoint."""
    known = open_checkpoint(path)
    if known.tensors.keys() != rows.keys():
        return False
    with closing(open_reader(known)) as reader:
        return all(torch.equal(read_tensor(reader, known.tensors[name]), row) for name, row in rows.items())
