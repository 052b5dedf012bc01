"""Tied embeddings: an embedding and a head that share one tensor, of which usually only the embedding is stored.

An adapter on one of the two was trained with the other left alone. Written into the shared tensor it would change
both, so the two are untied: both tensors are written, and the configuration says so. Trained token rows are the
exception: PEFT ties them as the base does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mergekit_px.adapters.patch import KeepPatch, Patch, RowsReplacedPatch
from mergekit_px.checkpoint.open import Checkpoint, StoredTensor
from mergekit_px.errors import AdapterError

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared")
_HEADS = ("lm_head", "embed_out")
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class Ties:
    """What a base checkpoint ties.

    Where ``tie_word_embeddings`` is not in the configuration, as when it has the default of its class, a model
    with a head whose tensor is not in the file is tied.
    """

    base: Checkpoint

    @cached_property
    def embedding(self) -> StoredTensor | None:
        """The input embedding, where exactly one tensor looks like it."""
        found = [t for name, t in self.base.tensors.items() if _module_leaf(name) in _EMBEDDINGS and len(t.shape) == 2]
        return found[0] if len(found) == 1 else None

    @cached_property
    def head(self) -> StoredTensor | None:
        """The stored head."""
        found = [t for name, t in self.base.tensors.items() if _module_leaf(name) in _HEADS]
        return found[0] if len(found) == 1 else None

    @cached_property
    def tied(self) -> bool:
        if self.base.config is None or self.embedding is None:
            return False
        stated = _text_part(self.base.config).get("tie_word_embeddings", self.base.config.get("tie_word_embeddings"))
        if self.head is not None:
            return bool(stated)
        architectures = self.base.config.get("architectures")
        with_head = not isinstance(architectures, list) or any(str(name).endswith(_WITH_HEAD) for name in architectures)
        return with_head and (stated is None or bool(stated))

    def is_missing_head(self, path: str) -> bool:
        """Whether a module is the head that exists only as the embedding."""
        return path.rpartition(".")[2] in _HEADS and self.tied and self.head is None

    def stand_in(self, name: str) -> StoredTensor:
        """The embedding's tensor under the head's name."""
        if self.embedding is None:
            raise ValueError("there is no embedding to stand in for the head")
        return replace(self.embedding, name=name)

    def resolve(
        self, patches: dict[str, Patch], *, keep_tied: bool, trained_tied: bool, where: str
    ) -> tuple[dict[str, Patch], bool]:
        """The patches with embedding and head made right, and whether the result must be declared untied.

        Args:
            keep_tied: change the shared tensor although only one of its uses was trained.
            trained_tied: the adapter kept both alike while it was trained.

        Raises AdapterError where both were trained apart and should stay tied.
        """
        if not self.tied or self.embedding is None:
            return patches, False
        patches = dict(patches)
        embedding = self.embedding.name
        head = next((name for name in patches if _module_leaf(name) in _HEADS), None)
        head = head or (self.head.name if self.head is not None else _head_name(embedding))
        touched = embedding in patches, head in patches
        if touched == (False, False):
            return patches, False
        if touched[0] and isinstance(patches[embedding], RowsReplacedPatch) and not touched[1]:
            if self.head is not None:
                patches[head] = replace(patches[embedding], target=head, source=head)
            return patches, False
        if "shared" in embedding.split(".") and not (trained_tied or keep_tied):
            raise AdapterError(
                f"{embedding} is shared by an encoder and a decoder, so it cannot be untied",
                where=where,
                hint="change all its uses alike with --keep-tied (keep_tied: true in a recipe)",
            )
        if trained_tied or keep_tied:
            if touched == (True, True) and not trained_tied:
                raise AdapterError(
                    "embedding and head were trained apart, so they cannot stay tied",
                    where=where,
                    hint="leave --keep-tied (keep_tied) out",
                )
            change = patches.pop(embedding) if touched[0] else patches[head]
            patches.pop(head, None)
            for name in (embedding, head) if self.head is not None else (embedding,):
                patches[name] = replace(change, target=name, source=name if change.source is not None else None)
            return patches, False
        if self.head is None:
            if touched[1] and patches[head].source is not None:
                patches[head] = replace(patches[head], source=embedding)
            elif not touched[1]:
                patches[head] = KeepPatch(
                    target=head, source=embedding, out_shape=self.embedding.shape, out_dtype=self.embedding.dtype
                )
        return patches, True


def config_updates(config: Mapping[str, Any] | None, patches: Mapping[str, Patch], *, untied: bool) -> dict[str, Any]:
    """The fields of config.json that the patches change, nested as in the file."""
    updates: dict[str, Any] = {}
    text = _text_part(config or {})
    nested = text is not config and bool(text)
    if untied:
        target = updates.setdefault("text_config", {}) if nested and "tie_word_embeddings" in text else updates
        target["tie_word_embeddings"] = False
    for name, patch in patches.items():
        if _module_leaf(name) in _EMBEDDINGS and text.get("vocab_size") not in (None, patch.out_shape[0]):
            (updates.setdefault("text_config", {}) if nested else updates)["vocab_size"] = patch.out_shape[0]
    return updates


def is_vocabulary(name: str) -> bool:
    """Whether a tensor is an embedding or a head, whose rows are the vocabulary."""
    return _module_leaf(name) in _EMBEDDINGS + _HEADS


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    part = config.get("text_config")
    return part if isinstance(part, Mapping) else config


def _module_leaf(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] == "weight" else ""


def _head_name(embedding: str) -> str:
    """``language_model.model.embed_tokens.weight`` -> ``language_model.lm_head.weight``."""
    outer = [part for part in embedding.split(".")[:-3] if part != "model"]
    return ".".join([*outer, "lm_head", "weight"])
