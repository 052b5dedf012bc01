from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import plan_of, recipe

from mergekit_px.errors import PlanError, RecipeError
from mergekit_px.testing import tiny_llama_config, tiny_llama_tensors, write_checkpoint


def notes_of(folder: Path, one: dict[str, Any], other: dict[str, Any], **options: Any) -> list[str]:
    for name, change in {"one": one, "other": other}.items():
        config = {**tiny_llama_config(), **change}
        write_checkpoint(folder / "models" / name, tiny_llama_tensors(seed=len(name)), config=config)
    step = {"method": "linear", "sources": ["one", "other"]}
    plan = plan_of(recipe(folder / "models", step), folder / "out", **options)
    return [note for note in plan.notes if "disagree" in note]


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        ({"rope_theta": 1e4}, {"rope_theta": 1e6}, "rope_theta: 10000.0 in 'one', 1000000.0 in 'other'"),
        ({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        ({"rope_theta": 1e4}, {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"num_attention_heads": 2}, {"num_attention_heads": 4}, "num_attention_heads"),
        ({"model_type": "llama"}, {"model_type": "mistral"}, "model_type: 'llama' in 'one', 'mistral' in 'other'"),
        ({"hidden_act": "silu"}, {"hidden_act": "gelu"}, "hidden_act"),
        ({"text_config": {"rms_norm_eps": 1e-6}}, {"text_config": {"rms_norm_eps": 1e-5}}, "rms_norm_eps"),
        ({"vision_config": {"num_heads": 2}}, {"vision_config": {"num_heads": 4}}, "vision_config.num_heads"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            {"layer_types": ["full_attention", "full_attention"]},
            "the kind of layer 1: 'sliding_attention' in 'one', 'full_attention' in 'other'",
        ),
        ({"sliding_window": 8, "use_sliding_window": True}, {"sliding_window": 16}, "sliding_window"),
        (
            {"id2label": {"0": "LABEL_0", "1": "no", "2": "yes"}},
            {"id2label": {"0": "never", "1": "yes", "2": "no"}},
            "the label 1: 'no' in 'one', 'yes' in 'other'",
        ),
    ],
)
def test_entries_that_change_what_weights_mean_are_named(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], named: str
) -> None:
    assert any(named in note for note in notes_of(tmp_path, one, other))
    with pytest.raises(PlanError, match="disagree in"):
        notes_of(tmp_path, one, other, strict=True)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"torch_dtype": "bfloat16", "pad_token_id": 1}, {"dtype": "float32", "transformers_version": "5.0"}),
        (
            {"rope_theta": 1e4},
            {"rope_theta": None, "rope_parameters": {"rope_theta": 10000, "rope_type": "default"}},
        ),
        ({"sliding_window": 8, "use_sliding_window": False}, {"sliding_window": None}),
    ],
)
def test_two_spellings_of_one_thing_agree(tmp_path: Path, one: dict[str, Any], other: dict[str, Any]) -> None:
    assert notes_of(tmp_path, one, other, strict=True) == []


def test_keys_without_effect_are_told_or_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_checkpoint(tmp_path / name, tiny_llama_tensors(), config=tiny_llama_config())
    models = [
        {"model": str(tmp_path / "one"), "revision": "main", "parameters": {"weight": 1}},
        {"model": str(tmp_path / "other"), "parameters": {"weight": 1}},
    ]
    config = {"merge_method": "linear", "models": models}
    assert any("'revision' in an entry of 'models'" in note for note in plan_of(config, tmp_path / "out").notes)
    with pytest.raises(RecipeError, match=r"'revision' .* has no effect.*leave out --strict"):
        plan_of(config, tmp_path / "out", strict=True)


def test_files_that_say_something_else_are_named_with_their_entries(tmp_path: Path) -> None:
    files = {
        "one": {"generation_config.json": '{"eos_token_id": 1, "transformers_version": "4"}', "modeling_tiny.py": "1"},
        "other": {"generation_config.json": '{"eos_token_id": 2}', "modeling_tiny.py": "2", "chat_template.jinja": "x"},
        "third": {"generation_config.json": '{"eos_token_id": 1}', "LICENSE.txt": "x"},
    }
    for name, texts in files.items():
        write_checkpoint(tmp_path / "models" / name, tiny_llama_tensors(seed=len(name)), config=tiny_llama_config())
        for file, text in texts.items():
            (tmp_path / "models" / name / file).write_text(text)
    plan = plan_of(
        recipe(tmp_path / "models", {"method": "linear", "sources": ["one", "other", "third"]}), tmp_path / "out"
    )
    assert [note for note in plan.notes if "these files" in note] == [
        "these files say something else in 'other', and are those of 'one': generation_config.json (eos_token_id),"
        " modeling_tiny.py",
        "these files are in 'other' and not in 'one', and are not copied: chat_template.jinja",
    ]


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": 3}, "eos_token_id"),
        ({"eos_token_id": 2}, {"eos_token_id": [2, 7]}, "eos_token_id"),
        ({"pad_token_id": 1, "bos_token_id": 1}, {"pad_token_id": 5, "bos_token_id": 1}, "pad_token_id"),
        ({"text_config": {"image_token_id": 1}}, {"text_config": {"image_token_id": 2}}, "image_token_id"),
        ({"eos_token_id": [7, 2]}, {"eos_token_id": [2, 7]}, None),
        ({"eos_token_id": 2}, {"eos_token_id": [2]}, None),
        ({"eos_token_id": 2}, {"eos_token_id": None}, None),
        ({"eos_token_id": 2}, {}, None),
    ],
    ids=str,
)
def test_special_tokens_that_differ_in_the_configs_are_told(
    one: dict[str, object], other: dict[str, object], told: str | None, tmp_path: Path
) -> None:
    for name, more in (("one", one), ("other", other)):
        write_checkpoint(tmp_path / "models" / name, tiny_llama_tensors(), config=tiny_llama_config() | more)
    plan = plan_of(recipe(tmp_path / "models", {"method": "linear", "sources": ["one", "other"]}), tmp_path / "out")
    line = f"these files say something else in 'other', and are those of 'one': config.json ({told})"
    assert [note for note in plan.notes if "these files" in note] == ([line] if told else [])
