from __future__ import annotations

import pytest

from mergekit_px.checkpoint.selection import Selection, missing_shards, select_weights

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["config.json"], None),
        ([], None),
        ([*SHARDS, INDEX, "config.json"], Selection(index=INDEX)),
        ([*SHARDS, INDEX, "model.safetensors"], Selection(index=INDEX, rival="model.safetensors")),
        (["model.safetensors", "other.safetensors"], Selection(("model.safetensors",))),
        (["adapter_model.safetensors", "adapter_config.json", "x.bin"], Selection(("adapter_model.safetensors",))),
        (["a.safetensors.index.json", "a-1.safetensors"], Selection(index="a.safetensors.index.json")),
        (["b.safetensors", "a.safetensors"], Selection(("a.safetensors", "b.safetensors"))),
        (["pytorch_model.bin", "training_args.bin"], Selection(("pytorch_model.bin",), pickled=True)),
        (
            ["pytorch_model.bin", "pytorch_model.bin.index.json"],
            Selection(index="pytorch_model.bin.index.json", pickled=True),
        ),
        (["optimizer.pt", "weights.PT", "scheduler.pt"], Selection(("weights.PT",), pickled=True)),
        (["optimizer.pt", "training_args.bin"], None),
    ],
)
def test_the_weights_are_chosen_by_name(names: list[str], chosen: Selection | None) -> None:
    assert select_weights(names) == chosen
    assert select_weights(reversed(names)) == chosen


@pytest.mark.parametrize(("indexed", "is_open"), [(SHARDS, True), (["model.safetensors"], False)])
def test_a_single_file_beside_an_index_must_be_one_of_its_own(indexed: list[str], is_open: bool) -> None:
    assert Selection(index=INDEX, rival="model.safetensors").is_open(indexed) is is_open
    assert not Selection(index=INDEX).is_open(indexed)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (SHARDS, []),
        (SHARDS[:1], SHARDS[1:]),
        (["model-00000-of-00002.bin", "model-00001-of-00002.bin"], []),
        (["model.fp16-00002-of-00002.safetensors"], ["model.fp16-00001-of-00002.safetensors"]),
        (["model-00001-of-00002.fp16.safetensors"], ["model-00002-of-00002.fp16.safetensors"]),
        (["pytorch_model-00001-of-00002.bin"], ["pytorch_model-00002-of-00002.bin"]),
        (["a.safetensors", "part-2-of-3.safetensors"], []),
    ],
)
def test_numbers_of_shards_tell_which_is_missing(names: list[str], missing: list[str]) -> None:
    assert missing_shards(names) == missing
