"""PEFT folders from strangers: names, formats old and broken, wrong bases, tied embeddings. Nothing here needs PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergekit_px.adapters.adapter import Binding
from mergekit_px.adapters.binder import BindOptions
from mergekit_px.adapters.open import open_adapter
from mergekit_px.checkpoint.open import Checkpoint, open_checkpoint
from mergekit_px.errors import AdapterError, InputError, InputNotFoundError, MalformedCheckpointError, PxmergeError

Q, K, EMBED, HEAD = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def base_model(folder: Path, *, tied: bool = True, rename: tuple[str, str] = ("", ""), **config: Any) -> Checkpoint:
    tensors = {Q: numbers(8, 6), K: numbers(8, 6), EMBED: numbers(10, 6)}
    if not tied:
        tensors[HEAD] = numbers(10, 6)
    folder.mkdir(exist_ok=True)
    renamed = {rename[1] + name.removeprefix(rename[0]): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied, "vocab_size": 10} | config
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def lora_pair(module: str, out: int = 8, inside: int = 6, rank: int = 2, infix: str = "") -> dict[str, torch.Tensor]:
    return {
        f"{module}.lora_A{infix}.weight": numbers(rank, inside),
        f"{module}.lora_B{infix}.weight": numbers(out, rank),
    }


def adapter_folder(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config))
    return folder


def merged(
    binding: Binding, target: str, base: Checkpoint, folder: Path, file: str = "model.safetensors"
) -> torch.Tensor:
    patch, stored = binding[target], load_file(folder / "adapter_model.safetensors")
    source = None if patch.source is None else load_file(base.directory / file)[patch.source]
    return patch.merged(source, {role: stored[tensor.name] for role, tensor in patch.factors.items()})


@pytest.mark.parametrize(
    ("prefix", "infix", "rename"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj", "", ("", "")),
        ("base_model.model.model.layers.0.self_attn.q_proj", ".default", ("", "")),
        ("model.layers.0.self_attn.q_proj", "", ("", "")),
        ("base_model.model.layers.0.self_attn.q_proj", "", ("", "")),
        ("base_model.model.model.layers.0.self_attn.q_proj", "", ("model.", "")),
        ("base_model.model.model.layers.0.self_attn.q_proj", "", ("model.", "language_model.model.")),
        ("base_model.model.transformer.layers.0.self_attn.q_proj", "", ("", "")),
        ("base_model.model.model.language_model.layers.0.self_attn.q_proj", "", ("model.", "language_model.model.")),
    ],
)
def test_names_of_other_classes_find_their_tensor(
    prefix: str, infix: str, rename: tuple[str, str], tmp_path: Path
) -> None:
    base = base_model(tmp_path / "base", rename=rename)
    folder = adapter_folder(tmp_path / "a", lora_pair(prefix, infix=infix))
    target = rename[1] + Q.removeprefix(rename[0])

    binding = open_adapter(folder).bind(base)

    assert list(binding) == [target]
    expected = load_file(tmp_path / "base/model.safetensors")[target] + 2 * numbers(8, 2) @ numbers(2, 6)
    torch.testing.assert_close(merged(binding, target, base, folder), expected)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("base_model.model.model.layers.7.self_attn.q_proj", r"layers\.7.*nearest are"),
        ("base_model.model.vision_tower.layers.0.self_attn.q_proj", "nothing in the base fits vision_tower"),
        ("base_model.model.model.layers.0.self_attn.o_proj", "nothing in the base fits"),
        ("base_model.model.q_proj", r"q_proj could be any of model\.layers\.0"),
    ],
)
def test_names_that_fit_nothing_or_too_much(module: str, message: str, tmp_path: Path) -> None:
    adapter = open_adapter(adapter_folder(tmp_path / "a", lora_pair(module)))
    with pytest.raises(AdapterError, match=message):
        adapter.bind(base_model(tmp_path / "base"))


def test_two_modules_for_one_tensor_are_refused(tmp_path: Path) -> None:
    tensors = lora_pair("base_model.model.model.layers.0.self_attn.q_proj") | lora_pair("a.layers.0.self_attn.q_proj")
    with pytest.raises(AdapterError, match=r"both fit model\.layers\.0\.self_attn\.q_proj"):
        open_adapter(adapter_folder(tmp_path / "a", tensors)).bind(base_model(tmp_path / "base"))


PREFIX = "base_model.model."
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({f"{MODULE}.lora_A.weight": numbers(2, 6)}, {}, "lora_B of .*q_proj is missing"),
        ({f"{MODULE}.lora_B.weight": numbers(8, 2)}, {}, "lora_A of .*q_proj is missing"),
        (lora_pair(MODULE), {"use_dora": True}, "lora_magnitude_vector of .* is missing"),
        (lora_pair(MODULE), {"r": 4}, "the rank of .*q_proj is 2 in the tensors and 4 in the configuration"),
        (lora_pair(MODULE), {"rank_pattern": {"q_proj": 3}}, "is 2 in the tensors and 3 in the configuration"),
        (lora_pair(MODULE), {"rank_pattern": {"(": 3}}, "not a regular expression"),
        (lora_pair(MODULE), {"lora_alpha": "x"}, "'lora_alpha' is 'x', not a number"),
        (lora_pair(MODULE, inside=7), {}, r"is \[8, 6\] in the base, the adapter was made for \[8, 7\]"),
        (lora_pair(MODULE), {"init_lora_weights": "pissa_niter_4"}, "relative to the residual"),
        (lora_pair(MODULE), {"init_lora_weights": "loftq"}, "relative to the residual"),
        (lora_pair(MODULE), {"alora_invocation_tokens": [1]}, "acts on some tokens only"),
        (lora_pair(MODULE), {"layer_replication": [[0, 2]]}, "replicated layers"),
        (lora_pair(MODULE), {"enable_lora": [True, False]}, "grouped kind"),
        (lora_pair(MODULE), {"use_something_new": True}, "'use_something_new' is set, which this program"),
        (lora_pair(MODULE) | {f"{MODULE}.lora_diag": numbers(2)}, {}, "KaSA"),
        (lora_pair(MODULE) | {f"{PREFIX}score.weight": numbers(3, 6)}, {}, "nothing in the base fits score.weight"),
        (lora_pair(MODULE) | {f"{MODULE}.base_layer.bias": numbers(8)}, {}, "nothing in the base fits .*q_proj.bias"),
        (lora_pair(MODULE) | {f"{MODULE}.lora_B.bias": numbers(8)}, {}, "the base has none"),
        (lora_pair(MODULE), {"peft_type": "IA3"}, "nothing in the base fits .*lora_A"),
    ],
)
def test_adapters_that_cannot_be_merged_say_why(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = adapter_folder(tmp_path / "a", tensors, **config)
    with pytest.raises(AdapterError, match=message) as caught:
        open_adapter(folder).bind(base_model(tmp_path / "base"))
    assert "\n" not in str(caught.value)


def test_a_residual_base_may_be_declared(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", lora_pair(MODULE), init_lora_weights="pissa")
    binding = open_adapter(folder).bind(base_model(tmp_path / "base"), BindOptions(residual_base=True))
    assert list(binding) == [Q]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("PROMPT_TUNING", "adds learned tokens to the input"),
        ("PREFIX_TUNING", "adds learned keys and values"),
        ("XLORA", "depends on each token"),
        ("SOMETHING", "unknown peft_type SOMETHING"),
    ],
)
def test_kinds_that_have_no_merged_weight(kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        open_adapter(adapter_folder(tmp_path / "a", lora_pair(MODULE), peft_type=kind))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not an object"),
        ("{}", "no 'peft_type'"),
        ('{"peft_type": 3}', "no 'peft_type'"),
        ("\x00\xff", "not valid JSON|not UTF-8"),
    ],
)
def test_malformed_configurations(text: str, message: str, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", lora_pair(MODULE))
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=message):
        open_adapter(folder)


def test_configurations_of_the_first_releases_are_read(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", lora_pair(MODULE))
    first = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "enable_lora": None, "merge_weights": False, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(first))
    base = base_model(tmp_path / "base")
    binding = open_adapter(folder).bind(base)
    delta = merged(binding, Q, base, folder) - numbers(8, 6)
    torch.testing.assert_close(delta, 1.5 * numbers(8, 2) @ numbers(2, 6))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no such file"):
        open_adapter(tmp_path / "nowhere")
    (tmp_path / "outer").mkdir()
    folder = adapter_folder(tmp_path / "outer" / "mine", {})
    with pytest.raises(InputNotFoundError, match=r"the adapter is in a sub-folder; give .*/outer/mine"):
        open_adapter(tmp_path / "outer")
    with pytest.raises(AdapterError, match="holds no tensor"):
        open_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputNotFoundError, match=r"a configuration but no adapter_model\.safetensors"):
        open_adapter(folder)
    complete = adapter_folder(tmp_path / "complete", lora_pair(MODULE))
    (complete / "adapter_config.json").unlink()
    with pytest.raises(InputNotFoundError, match="no adapter configuration"):
        open_adapter(complete)


def test_broken_weights(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", lora_pair(MODULE))
    (folder / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(MalformedCheckpointError):
        open_adapter(folder)


def test_pickles_only_when_allowed(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", lora_pair(MODULE))
    (folder / "adapter_model.safetensors").unlink()
    torch.save(lora_pair(MODULE), folder / "adapter_model.bin")
    with pytest.raises(InputError):
        open_adapter(folder)
    adapter = open_adapter(folder, allow_pickle=True)
    assert list(adapter.bind(base_model(tmp_path / "base"))) == [Q]


def test_the_path_of_the_weights_means_the_folder(tmp_path: Path) -> None:
    folder = adapter_folder(
        tmp_path / "a", lora_pair(MODULE), base_model_name_or_path="org/base", peft_version="0.21.2"
    )
    adapter = open_adapter(folder / "adapter_model.safetensors")
    assert (adapter.kind, adapter.base_model_name, adapter.config.peft_version) == ("LORA", "org/base", (0, 21, 2))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_quantised_bases_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({Q: torch.ones(8, 6, dtype=dtype)}, tmp_path / "base.safetensors")
    adapter = open_adapter(adapter_folder(tmp_path / "a", lora_pair(MODULE)))
    with pytest.raises(AdapterError, match=r"is stored as .* in the base; give the base in full precision"):
        adapter.bind(open_checkpoint(tmp_path / "base.safetensors"))
    packed = {f"{Q.removesuffix('weight')}qweight": torch.ones(8, 2, dtype=torch.int32)}
    save_file(packed, tmp_path / "packed.safetensors")
    with pytest.raises(AdapterError, match="is quantised in the base"):
        adapter.bind(open_checkpoint(tmp_path / "packed.safetensors"))


# --- square experts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "model_type", "layout"),
    [
        (None, None, "in_out"),
        ("0.18.1", "mixtral", "in_out"),
        ("0.21.2", "mixtral", "out_in"),
        ("0.19.0", "gpt_oss", "in_out"),
    ],
)
def test_square_experts_follow_the_release_that_wrote_them(
    version: str | None, model_type: str | None, layout: str, tmp_path: Path
) -> None:
    """PEFT itself reads such a file by its own release, so a file of an older one comes out wrong there."""
    experts, size, rank = 3, 4, 2
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({"mlp.experts.down_proj": numbers(experts, size, size)}, folder / "model.safetensors")
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tensors = lora_pair("base_model.model.mlp.experts", out=size, inside=size, rank=rank * experts)
    config = {"target_parameters": ["experts.down_proj"], "peft_version": version}
    adapter = adapter_folder(tmp_path / "a", tensors, **config)
    base = open_checkpoint(folder)

    delta = merged(open_adapter(adapter).bind(base), "mlp.experts.down_proj", base, adapter) - numbers(
        experts, size, size
    )

    a = numbers(rank * experts, size).reshape(experts, rank, size)
    b = numbers(size, rank * experts).reshape(size, rank, experts)
    expected = 2 * torch.einsum("ore,eri->eoi" if layout == "out_in" else "ore,eri->eio", b, a)
    torch.testing.assert_close(delta, expected)


def test_square_experts_of_an_unknown_model_are_refused(tmp_path: Path) -> None:
    save_file({"mlp.experts.down_proj": numbers(3, 4, 4)}, tmp_path / "base.safetensors")
    tensors = lora_pair("base_model.model.mlp.experts", out=4, inside=4, rank=6)
    config = {"target_parameters": ["experts.down_proj"], "peft_version": "0.21.2"}
    with pytest.raises(AdapterError, match="square, so their layout depends on the model"):
        open_adapter(adapter_folder(tmp_path / "a", tensors, **config)).bind(
            open_checkpoint(tmp_path / "base.safetensors")
        )


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"one": (3, 4, 6), "two": (3, 4, 6)}, "which parameters of mlp.experts the factors belong to cannot be told"),
        ({"one": (3, 5, 6)}, r"fit no parameter of the base \(one \[3, 5, 6\]\)"),
    ],
)
def test_experts_that_the_shapes_do_not_settle(
    shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    save_file({f"mlp.experts.{n}": numbers(*shape) for n, shape in shapes.items()}, tmp_path / "base.safetensors")
    tensors = lora_pair("base_model.model.mlp.experts", out=4, inside=6, rank=6)
    with pytest.raises(AdapterError, match=message):
        open_adapter(adapter_folder(tmp_path / "a", tensors)).bind(open_checkpoint(tmp_path / "base.safetensors"))


# --- whole tensors -------------------------------------------------------------------------------------------


def test_infixed_copies_of_a_saved_module_are_not_mistaken_for_it(tmp_path: Path) -> None:
    save_file(
        {"score.weight": numbers(3, 6), "score.bias": numbers(3), Q: numbers(8, 6)}, tmp_path / "base.safetensors"
    )
    tensors = lora_pair(MODULE) | {
        f"{PREFIX}score.weight": torch.full((3, 6), 1.0),
        f"{PREFIX}score.bias": torch.full((3,), 2.0),
        f"{PREFIX}score.original_module.bias": torch.full((3,), 3.0),
        f"{PREFIX}score.modules_to_save.bias": torch.full((3,), 4.0),
    }
    folder = adapter_folder(tmp_path / "a", tensors, modules_to_save=["score"])
    binding = open_adapter(folder).bind(open_checkpoint(tmp_path / "base.safetensors"))
    assert {name: patch.copied.name for name, patch in binding.items() if patch.copied} == {
        "score.weight": f"{PREFIX}score.weight",
        "score.bias": f"{PREFIX}score.bias",
    }


def test_a_new_head_is_a_new_tensor(tmp_path: Path) -> None:
    tensors = lora_pair(MODULE) | {f"{PREFIX}score.weight": numbers(3, 6).half()}
    folder = adapter_folder(tmp_path / "a", tensors, modules_to_save=["score"])
    patch = open_adapter(folder).bind(base_model(tmp_path / "base"))["score.weight"]
    assert (patch.source, patch.out_shape, patch.out_dtype.name) == (None, (3, 6), "F16")


def test_a_resized_vocabulary_comes_before_the_adapter_on_it(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", tied=False)
    embed = PREFIX + EMBED.removesuffix(".weight")
    tensors = {
        f"{embed}.base_layer.weight": numbers(12, 6),
        f"{embed}.lora_embedding_A": numbers(2, 12),
        f"{embed}.lora_embedding_B": numbers(6, 2),
        f"{PREFIX}{HEAD}": numbers(12, 6) + 1,
    }
    folder = adapter_folder(tmp_path / "a", tensors)
    binding = open_adapter(folder).bind(base)
    assert {name: patch.out_shape for name, patch in binding.items()} == {EMBED: (12, 6), HEAD: (12, 6)}
    assert binding.config_updates == {"vocab_size": 12}
    expected = numbers(12, 6) + 2 * (numbers(6, 2) @ numbers(2, 12)).T
    torch.testing.assert_close(merged(binding, EMBED, base, folder), expected)


def test_a_whole_tensor_of_another_shape_is_a_clash(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", lora_pair(MODULE) | {f"{PREFIX}{K}": numbers(8, 7)})
    with pytest.raises(AdapterError, match=r"is \[8, 6\] in the base, the adapter was made for \[8, 7\]"):
        open_adapter(folder).bind(base_model(tmp_path / "base"))


# --- token rows ----------------------------------------------------------------------------------------------

EMBED_MODULE = PREFIX + EMBED.removesuffix(".weight")


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        (2, {"trainable_token_indices": [1, 2, 3]}, r"is \[2, 6\] for 3 tokens"),
        (2, {"trainable_token_indices": [1, 10]}, "token 10 is outside"),
        (2, {}, "has no token indices for model.embed_tokens"),
        (2, {"trainable_token_indices": {"other": [1, 2]}}, "has no token indices"),
    ],
)
def test_token_rows_that_do_not_fit(rows: int, config: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors = {f"{EMBED_MODULE}.token_adapter.trainable_tokens_delta": numbers(rows, 6)}
    adapter = open_adapter(adapter_folder(tmp_path / "a", tensors, **config))
    with pytest.raises(AdapterError, match=message):
        adapter.bind(base_model(tmp_path / "base"))


def test_token_rows_change_a_stored_twin_of_the_embedding_too(tmp_path: Path) -> None:
    tensors = {f"{EMBED_MODULE}.token_adapter.trainable_tokens_delta": numbers(2, 6)}
    adapter = open_adapter(adapter_folder(tmp_path / "a", tensors, trainable_token_indices={"embed_tokens": [1, 2]}))
    alone = adapter.bind(base_model(tmp_path / "tied"))
    assert (list(alone), alone.config_updates) == ([EMBED], {})
    apart = adapter.bind(base_model(tmp_path / "apart", tied=False))
    assert (list(apart), apart.config_updates) == ([EMBED], {})
    twins = adapter.bind(base_model(tmp_path / "twins", tied=False, tie_word_embeddings=True))
    assert (set(twins), twins.config_updates) == ({EMBED, HEAD}, {})


# --- tied embeddings -----------------------------------------------------------------------------------------

ON_EMBEDDING = {f"{EMBED_MODULE}.lora_embedding_A": numbers(2, 10), f"{EMBED_MODULE}.lora_embedding_B": numbers(6, 2)}
ON_HEAD = lora_pair(f"{PREFIX}lm_head", out=10)


def test_an_adapter_on_the_embedding_unties_the_head(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    folder = adapter_folder(tmp_path / "a", ON_EMBEDDING)
    binding = open_adapter(folder).bind(base)
    assert set(binding) == {EMBED, HEAD}
    assert binding.config_updates == {"tie_word_embeddings": False}
    torch.testing.assert_close(merged(binding, HEAD, base, folder), numbers(10, 6))
    expected = numbers(10, 6) + 2 * (numbers(6, 2) @ numbers(2, 10)).T
    torch.testing.assert_close(merged(binding, EMBED, base, folder), expected)


def test_an_adapter_on_the_head_leaves_the_embedding(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    folder = adapter_folder(tmp_path / "a", ON_HEAD)
    binding = open_adapter(folder).bind(base)
    assert list(binding) == [HEAD]
    assert (binding[HEAD].source, binding.config_updates) == (EMBED, {"tie_word_embeddings": False})
    torch.testing.assert_close(merged(binding, HEAD, base, folder), numbers(10, 6) + 2 * numbers(10, 2) @ numbers(2, 6))


def test_adapters_on_both_are_written_apart(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "a", ON_EMBEDDING | ON_HEAD)
    binding = open_adapter(folder).bind(base_model(tmp_path / "base"))
    assert {name: patch.source for name, patch in binding.items()} == {EMBED: EMBED, HEAD: EMBED}
    assert binding.config_updates == {"tie_word_embeddings": False}


def test_keeping_the_tie_is_a_choice(tmp_path: Path) -> None:
    base, keep = base_model(tmp_path / "base"), BindOptions(keep_tied=True)
    for tensors in (ON_EMBEDDING, ON_HEAD):
        binding = open_adapter(adapter_folder(tmp_path / "a", tensors)).bind(base, keep)
        assert {name: patch.source for name, patch in binding.items()} == {EMBED: EMBED}
        assert binding.config_updates == {}
    both = open_adapter(adapter_folder(tmp_path / "a", ON_EMBEDDING | ON_HEAD))
    with pytest.raises(AdapterError, match="trained apart"):
        both.bind(base, keep)
    tied = open_adapter(adapter_folder(tmp_path / "a", ON_EMBEDDING | ON_HEAD, ensure_weight_tying=True))
    assert list(tied.bind(base)) == [EMBED]


def test_a_tie_that_the_configuration_leaves_to_its_class(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", tie_word_embeddings=None)
    adapter = open_adapter(adapter_folder(tmp_path / "a", ON_EMBEDDING))
    assert set(adapter.bind(base)) == {EMBED, HEAD}
    bare = base_model(tmp_path / "bare", tie_word_embeddings=None, architectures=["LlamaModel"])
    assert set(adapter.bind(bare)) == {EMBED}


FACTORS = {
    "LORA": ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B"],
    "ADALORA": ["lora_A", "lora_B", "lora_E"],
    "LOHA": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"],
    "LOKR": ["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"],
    "IA3": ["ia3_l"],
    "OFT": ["oft_R.weight", "oft_embedding_R.weight"],
    "VERA": ["vera_lambda_b", "vera_lambda_d"],
    "HRA": ["hra_u"],
    "HIRA": ["hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"],
    "LN_TUNING": ["ln_tuning_layers.weight", "ln_tuning_layers.bias"],
    "SHIRA": ["shira_weight", "shira_indices"],
    "MISS": ["miss_block"],
    "TRAINABLE_TOKENS": ["trainable_tokens_delta"],
}


@pytest.mark.parametrize("kind", FACTORS)
@given(data=st.data())
@settings(max_examples=15, deadline=None, database=None, derandomize=True)
def test_no_shapes_bring_anything_but_an_answer(kind: str, data: st.DataObject, tmp_path_factory: Any) -> None:
    """Factors of any shapes, on bases of any shape: bound and applied, or refused in one line."""
    shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
    names = data.draw(st.lists(st.sampled_from(FACTORS[kind]), min_size=1, unique=True))
    folder = tmp_path_factory.mktemp(kind)
    save_file({"m.weight": torch.ones(data.draw(shapes.filter(bool)))}, folder / "base.safetensors")
    tensors = {f"m.{name}": torch.ones(data.draw(shapes)) for name in names}
    config = {"oft_block_size": 4, "trainable_token_indices": [0], "r": data.draw(st.sampled_from([None, 1, 2]))}
    config |= {"block_share": data.draw(st.booleans()), "target_parameters": ["m.weight"]}
    try:
        adapter = open_adapter(adapter_folder(folder, tensors, peft_type=kind, **config))
        base = open_checkpoint(folder / "base.safetensors")
        for target, patch in adapter.bind(base).items():
            assert merged(adapter.bind(base), target, base, folder, "base.safetensors").shape == patch.out_shape
    except PxmergeError as error:
        assert "\n" not in str(error)
