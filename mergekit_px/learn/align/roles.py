"""Which part a tensor plays in a transformer, told by the end of its name.

This is the only place with names of layers. A pattern is matched against the last components of a module's path,
each a glob, upper and lower case alike; what is before them is the block that the module belongs to. One module may
match several patterns: shapes and the rest of the block decide (`mergekit_px.learn.align.layout`).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import Literal, get_args

from mergekit_px.errors import UsageError

Role = Literal[
    "query", "key", "value", "qkv", "qkv-by-head", "output", "query-norm", "key-norm",
    "up", "down", "embedding", "writer", "reader", "dense", "vector", "fixed",
]  # fmt: skip
"""What a module does.

query, key, value: projections of attention; qkv: the three in one, one below the other; qkv-by-head: in one, head by
head; output: the projection behind the heads; query-norm, key-norm: norms between projection and scores.
up: a projection to the hidden units of an MLP, its gate included; down: the one back.
embedding: vectors of the residual stream in its last axis; writer: a layer whose outputs are the residual stream;
reader: a layer whose inputs are; dense: a layer from the stream to something of its width; vector: one number for each
channel of the stream (norms, layer scales). fixed: a constant that no permutation concerns.
"""

_LEAVES = {
    ".weight": "weight", "_weight": "weight", ".gamma": "weight", ".bias": "bias", "_bias": "bias", ".beta": "bias"
}  # fmt: skip

Place = tuple[str, str]
"""A role and a pattern, as users add them."""

PATTERNS: dict[Role, tuple[str, ...]] = {
    "query": ("query", "self.query", "attention.query", "q_proj", "query_proj", "q_lin", "to_q", "wq", "q", "linear_q"),
    "key": ("key", "self.key", "attention.key", "k_proj", "key_proj", "k_lin", "to_k", "wk", "k", "linear_k"),
    "value": ("value", "self.value", "attention.value", "v_proj", "value_proj", "v_lin", "to_v", "wv", "v", "linear_v"),
    "qkv": ("qkv", "in_proj", "qkv_proj", "wqkv", "c_attn", "to_qkv"),
    "output": (
        "output.dense", "out_proj", "o_proj", "out_lin", "to_out", "to_out.0", "wo", "o", "proj", "c_proj", "dense",
        "output_proj", "linear_out",
    ),
    "query-norm": ("q_norm", "query_norm", "q_layernorm", "norm_q"),
    "key-norm": ("k_norm", "key_norm", "k_layernorm", "norm_k"),
    "up": (
        "intermediate.dense", "fc1", "fc_in", "c_fc", "linear1", "linear_1", "lin1", "wi", "wi_0", "wi_1", "w1", "w3",
        "up_proj", "gate_proj", "gate_up_proj", "gate", "dense_h_to_4h", "weights_in", "ffn",
    ),
    "down": (
        "output.dense", "fc2", "fc_out", "c_proj", "linear2", "linear_2", "lin2", "wo", "w2", "down_proj",
        "dense_4h_to_h", "weights_out", "ffn_output",
    ),
    "embedding": (
        "*embeddings", "embed*", "*embedding", "wte", "wpe", "shared", "*position*", "pos_embed*", "*_token",
        "*_tokens", "tok_*",
    ),
    "dense": (
        "pooler", "pooler.dense", "transform.dense", "lm_head.dense", "pre_classifier", "classifier.dense",
        "head.dense", "vocab_transform", "embedding_hidden_mapping_in",
    ),
    "writer": ("patch*.proj*", "patch_embed*", "patches", "conv_proj", "embed*", "embedding_hidden_mapping_in"),
    "reader": (
        "lm_head", "classifier", "head", "heads.head", "score", "classifier.out_proj", "embed_out", "fc", "decoder",
        "*_projection", "vocab_projector", "qa_outputs", "router", "gate", "shared_expert_gate",
    ),
    "vector": (
        "*norm*", "attention.layernorm", "attention.ln", "ln*", "*_ln", "ls[12]", "*gamma*", "*lambda*", "layer_scale*",
    ),
    "fixed": ("*inv_freq", "masked_bias", "logit_scale"),
}  # fmt: skip

DOUBTFUL_FUSIONS = {("qkv_proj", "out_proj"), ("wqkv", "wo")}
"""Names, as they are written, of fused and output projections that stand for another order in one family of models than
in others."""

RELATIVE_POSITIONS = re.compile(r"relative|rel_pos|rel_bias|position_bias", re.IGNORECASE)
"""In the names of tensors that tell heads apart by number, in all layers at once."""

ATTENTION_ROLES: tuple[Role, ...] = ("query", "key", "value", "qkv", "qkv-by-head", "output", "query-norm", "key-norm")
MLP_ROLES: tuple[Role, ...] = ("up", "down")
OUTER_ROLES: tuple[Role, ...] = ("embedding", "writer", "reader", "dense", "vector", "fixed")


def check_places(places: Sequence[Place]) -> None:
    """Raise ``UsageError`` for a role that there is not, or an empty pattern."""
    for role, pattern in places:
        if role not in get_args(Role):
            raise UsageError(f"there is no role {role!r}", hint=f"roles are {', '.join(get_args(Role))}")
        if not all(pattern.split(".")):
            raise UsageError(f"{pattern!r} is no pattern for the end of a name", hint=f"write it as {role}=attn.to_q")


def split_name(name: str) -> tuple[str, str]:
    """Path of the module and name of the array in it: ``a.fc.bias`` -> (``a.fc``, ``bias``).

    ``a.in_proj_weight`` counts as the weight of ``a.in_proj``, ``a.norm.gamma`` as that of ``a.norm``, and a parameter
    of its own as a weight of its own name.
    """
    for end, leaf in _LEAVES.items():
        if name.endswith(end):
            return name.removesuffix(end), leaf
    return name, "weight"


def roles_of(path: str, places: Sequence[Place] = ()) -> list[tuple[Role, str]]:
    """The roles that a module may have, with the block that it would belong to; the longest block first.

    Where a pattern of the user matches, only the user's count.
    """
    own = [found for role, pattern in places for found in _matched(path, role, pattern)]
    if not own:
        own = [
            found
            for role, patterns in PATTERNS.items()
            for pattern in patterns
            for found in _matched(path, role, pattern)
        ]
    return sorted(dict.fromkeys(own), key=lambda found: -len(found[1]))


def is_placed(path: str, places: Sequence[Place]) -> bool:
    """Whether a pattern of the user matches."""
    return any(_matched(path, role, pattern) for role, pattern in places)


def _matched(path: str, role: str, pattern: str) -> list[tuple[Role, str]]:
    wanted, given = pattern.lower().split("."), path.split(".")
    tail = given[-len(wanted) :]
    if len(tail) < len(wanted) or not all(
        fnmatch.fnmatchcase(one.lower(), glob) for one, glob in zip(tail, wanted, strict=True)
    ):
        return []
    block = ".".join(given[: -len(wanted)])
    known: Role = role  # type: ignore[assignment]
    return [(known, f"{block}." if block else "")]
