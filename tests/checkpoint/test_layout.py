"""Where every tensor goes: the split and the names of the Hub's own helper, offsets that match the headers."""

from __future__ import annotations

import json
import time

import pytest
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given
from hypothesis import strategies as st

from mergekit_px.checkpoint.dtypes import DTYPES
from mergekit_px.checkpoint.header import parse_header
from mergekit_px.checkpoint.layout import OutputTensor, parse_size, plan_layout
from mergekit_px.errors import MalformedCheckpointError, UsageError

U8 = DTYPES["U8"]


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 60))
def test_the_split_is_that_of_the_hub(sizes, shard_size) -> None:
    tensors = [OutputTensor(f"t{number:02d}", U8, (size,)) for number, size in enumerate(sizes)]
    layout = plan_layout(tensors, shard_size=shard_size, metadata={"format": "pt"})
    if not sizes:
        assert [shard.file for shard in layout.shards] == ["model.safetensors"]
        return
    hub = split_state_dict_into_shards_factory(
        {tensor.name: tensor for tensor in tensors},
        get_storage_size=lambda tensor: tensor.shape[0],
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    assert {shard.file: sorted(shard.header.entries) for shard in layout.shards} == {
        file: sorted(names) for file, names in hub.filename_to_tensors.items()
    }
    assert bool(layout.indices) == hub.is_sharded
    for index in layout.indices.values():
        assert json.loads(index) == {
            "metadata": {"total_parameters": sum(sizes), "total_size": hub.metadata["total_size"]},
            "weight_map": hub.tensor_to_filename,
        }


def test_places_and_sizes_agree_with_the_headers() -> None:
    tensors = [
        OutputTensor("b", DTYPES["BF16"], (10, 3)),
        OutputTensor("a", DTYPES["F32"], (5,)),
        OutputTensor("packed", DTYPES["F4"], (2, 8)),
        OutputTensor("scalar", DTYPES["I64"], ()),
    ]
    layout = plan_layout(tensors, shard_size=70, stems={"": "adapter_model"}, metadata={"format": "pt"})
    assert [shard.file for shard in layout.shards] == [
        "adapter_model-00001-of-00002.safetensors",
        "adapter_model-00002-of-00002.safetensors",
    ]
    assert [*layout.indices] == ["adapter_model.safetensors.index.json"]
    for number, shard in enumerate(layout.shards):
        assert parse_header(shard.header_bytes[8:], shard.size, shard.file) == shard.header
        for entry in shard.header.entries.values():
            place = (number, len(shard.header_bytes) + entry.begin, entry.end - entry.begin)
            assert layout.location[entry.name] == place
    assert layout.location["b"][0] == 0 and layout.location["scalar"][0] == 1
    assert layout.size == sum(shard.size for shard in layout.shards)
    (index,) = layout.indices.values()
    assert json.loads(index)["metadata"] == {"total_parameters": 52, "total_size": 60 + 20 + 8 + 8}


def test_index_text_is_sorted_indented_and_ends_with_a_newline() -> None:
    layout = plan_layout([OutputTensor(name, U8, (1,)) for name in "ba"], shard_size=1, metadata={})
    expected = {
        "metadata": {"total_parameters": 2, "total_size": 2},
        "weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"},
    }
    assert (
        layout.indices["model.safetensors.index.json"]
        == (json.dumps(expected, indent=2, sort_keys=True) + "\n").encode()
    )


def test_fifty_thousand_tensors_are_laid_out_in_a_moment() -> None:
    tensors = [OutputTensor(f"model.layers.{number}.weight", U8, (4,)) for number in range(50_000)]
    began = time.process_time()
    layout = plan_layout(tensors, shard_size=50_000, metadata={})
    assert len(layout.location) == 50_000 and len(layout.shards) == 4
    assert time.process_time() - began < 10  # quadratic work would take minutes


def test_what_cannot_be_laid_out() -> None:
    for shard_size in (10, 1):
        with pytest.raises(UsageError, match="x is used twice"):
            plan_layout([OutputTensor("x", U8, (1,))] * 2, shard_size=shard_size, metadata={})
    with pytest.raises(UsageError, match="holds nothing"):
        plan_layout([], shard_size=0, metadata={})
    with pytest.raises(MalformedCheckpointError, match="whole bytes"):
        plan_layout([OutputTensor("x", DTYPES["F4"], (3,))], metadata={})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        ("200MB", 2 * 10**8),
        ("1.5GB", 1_500_000_000),
        (" 4 kib ", 4096),
        ("1tb", 10**12),
        ("123", 123),
        ("10B", 10),
        (77, 77),
        ("0.1GB", 10**8),
    ],
)
def test_sizes(text, size) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 G B", "5XB", "-5GB", "1e9", "0", "0.0001B", 0, -1, True, "5GB5"])
def test_bad_sizes(text) -> None:
    with pytest.raises(UsageError, match="write one such as"):
        parse_size(text)
