"""The checkpoint factory writes what libraries read; the battery finds each fault it is there for."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mergekit_px.errors import UsageError
from mergekit_px.methods.declare import REGISTRY, Extent, Method, Operands, Params, Sweep, merge_method
from mergekit_px.testing import (
    apply_method,
    check_method,
    fine_tune,
    merge_tensors,
    tiny_llama_config,
    tiny_llama_tensors,
    write_checkpoint,
)


def test_a_checkpoint_in_one_file(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.tensor(1.5)}
    folder = write_checkpoint(tmp_path / "new" / "model", tensors, dtype=torch.bfloat16, config={"model_type": "x"})
    loaded = load_file(folder / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {
        "a": torch.bfloat16,
        "b": torch.int64,
        "c": torch.bfloat16,
    }
    assert torch.equal(loaded["a"], tensors["a"].bfloat16()) and loaded["c"].shape == ()
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "x"}
    with safe_open(folder / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_checkpoint_in_shards(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((i + 1,), float(i)) for i in range(7)}
    folder = write_checkpoint(tmp_path, tensors, shards=3, metadata={"kind": "test"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * (i + 1) for i in range(7))
    assert sorted(set(index["weight_map"].values())) == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(folder / file)[name], tensors[name])


@pytest.mark.parametrize("tied", [False, True])
def test_the_tiny_llama_is_a_llama(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden": 48, "layers": 3, "heads": 6, "key_value_heads": 3, "vocabulary": 50, "tied": tied}
    model = LlamaForCausalLM(LlamaConfig.from_dict(tiny_llama_config(**size)))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    tensors = tiny_llama_tensors(**size, dtype=torch.bfloat16)
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_weights_and_fine_tunes_follow_their_seeds() -> None:
    tensors = {**tiny_llama_tensors(seed=1), "steps": torch.tensor([3])}
    again = tiny_llama_tensors(seed=1)
    assert all(torch.equal(tensors[name], again[name]) for name in again)
    assert not torch.equal(tiny_llama_tensors(seed=2)["lm_head.weight"], tensors["lm_head.weight"])
    tuned = fine_tune(tensors, 5, size=0.01)
    assert torch.equal(tuned["steps"], tensors["steps"])
    difference = tuned["model.embed_tokens.weight"] - tensors["model.embed_tokens.weight"]
    assert 0.009 < difference.std() < 0.011
    assert torch.equal(fine_tune(tensors, 5, size=0.01)["lm_head.weight"], tuned["lm_head.weight"])
    assert not torch.equal(fine_tune(tensors, 6, size=0.01)["lm_head.weight"], tuned["lm_head.weight"])


def test_merges_have_the_stored_dtype_unless_told() -> None:
    single, half = torch.ones(4), torch.ones(4, dtype=torch.bfloat16)
    assert apply_method("linear", [half, single]).dtype == torch.bfloat16
    assert apply_method("task_arithmetic", [half, half], base=single).dtype == torch.float32
    assert apply_method("linear", [half], dtype=torch.float64).dtype == torch.float64


def test_wrong_numbers_of_sources_are_refused() -> None:
    with pytest.raises(UsageError, match="slerp takes exactly 2 sources, 3 given"):
        merge_tensors("slerp", [{"a": torch.ones(2)}] * 3)


class Documented(Params):
    factor: float = 1.0
    """What everything is multiplied with."""


class Undocumented(Params):
    factor: float = 1.0


class Demanding(Params):
    factor: float
    """What everything is multiplied with."""


def mean_of_block(sources: list[torch.Tensor]) -> torch.Tensor:
    """Adds the mean of the block.

    Depends on the cut.
    """
    return sources[0] + sources[0].sum() / max(sources[0].numel(), 1)


def in_place(sources: list[torch.Tensor]) -> torch.Tensor:
    """Adds into the first source.

    Changes its argument.
    """
    return sources[0].mul_(2.0)


def returns_argument(sources: list[torch.Tensor]) -> torch.Tensor:
    """Gives the first source.

    The engine may write into it.
    """
    return sources[0]


def other_dtype(sources: list[torch.Tensor]) -> torch.Tensor:
    """Rounds to half precision.

    The engine rounds.
    """
    return sources[0].half()


def other_shape(sources: list[torch.Tensor]) -> torch.Tensor:
    """Drops an axis.

    Shapes are kept.
    """
    return sources[0].sum(dim=0)


def unseeded(sources: list[torch.Tensor]) -> torch.Tensor:
    """Adds noise.

    From the global generator.
    """
    return sources[0] + 1e-6 * torch.rand_like(sources[0])


def imprecise(sources: list[torch.Tensor]) -> torch.Tensor:
    """Averages in bfloat16.

    Loses bits.
    """
    dtype = sources[0].dtype
    if dtype == torch.float64:
        return (sources[0] + sources[1]) / 2
    return ((sources[0].bfloat16() * 0.3 + sources[1].bfloat16() * 0.7) / 1).to(dtype)


def divides_by_zero(sources: list[torch.Tensor]) -> torch.Tensor:
    """Divides by the first source less itself.

    Never finite.
    """
    return sources[0] / (sources[0] - sources[0])


def first_only(sources: list[torch.Tensor]) -> torch.Tensor:
    """Doubles the first source.

    Neither symmetric nor an average.
    """
    return sources[0] * 2


def one_line(sources: list[torch.Tensor]) -> torch.Tensor:
    """Copies the first source."""
    return sources[0].clone()


def undocumented(sources: list[torch.Tensor], params: Undocumented) -> torch.Tensor:
    """Copies the first source.

    Its parameter says nothing.
    """
    return sources[0].clone()


def demanding(sources: list[torch.Tensor], params: Demanding) -> torch.Tensor:
    """Copies the first source.

    Its parameter has no default.
    """
    return sources[0].clone()


def declare(function: Callable[..., torch.Tensor], **options: Any) -> Method:
    merge_method(**{"space": "any", "access": "elementwise", "sources": (2, 2), **options})(function)
    return REGISTRY.pop(function.__name__)


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (mean_of_block, "blocks of 29 give the same bits"),
        (in_place, "neither changed nor returned"),
        (returns_argument, "neither changed nor returned"),
        (other_dtype, r"float32 gives \(1,\) torch.float16"),
        (other_shape, r"gives \(\)"),
        (unseeded, "the same arguments give the same bits"),
        (imprecise, "are those of float64, rounded once"),
        (divides_by_zero, "finite results"),
        (one_line, "says more than one line"),
        (undocumented, "the parameter factor has a docstring"),
        (demanding, "the parameter factor has a default"),
    ],
)
def test_the_battery_finds_faults(function: Callable[..., torch.Tensor], complaint: str) -> None:
    method = declare(function)
    params = {"factor": 1.0} if "params" in method.arguments else {}
    with pytest.raises(AssertionError, match=f"{method.name}: .*{complaint}"):
        check_method(method, params)


@pytest.mark.parametrize(
    ("claim", "complaint"), [("identity", "equal sources"), ("symmetric", "the order of the sources")]
)
def test_the_battery_checks_claims(claim: str, complaint: str) -> None:
    method = declare(first_only)
    check_method(method)
    with pytest.raises(AssertionError, match=complaint):
        check_method(method, **{claim: True})  # type: ignore[arg-type]


def test_the_battery_validates_presets() -> None:
    def scaled(sources: list[torch.Tensor], params: Documented) -> torch.Tensor:
        """Multiplies the first source.

        Its preset is misspelt.
        """
        return sources[0] * params.factor

    with pytest.raises(ValueError, match="facter"):
        check_method(declare(scaled, presets={"other": {"facter": 2.0}}))
    check_method(declare(scaled, presets={"other": {"factor": 2.0}}))


def test_statistics_are_sums_over_blocks() -> None:
    """Elements, then squares, then the method: the protocol as a method's author sees it."""
    seen: list[Extent] = []

    def statistics(extent: Extent) -> Generator[Sweep, torch.Tensor, float]:
        seen.append(extent)

        def squares(operands: Operands) -> torch.Tensor:
            return operands.tensors[0].double().square().sum()

        total = yield squares
        return (total / extent.elements).sqrt().item()

    def root_mean_square(sources: list[torch.Tensor], statistics: float) -> torch.Tensor:
        """Divides by the root mean square.

        Of the whole tensor.
        """
        return sources[0] / statistics

    method = declare(root_mean_square, access="two_pass", statistics=statistics, sources=(1, None))
    source = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    merged = apply_method(method, [source, source], [1.0, 2.0], block=3)
    torch.testing.assert_close(merged, source / 2.5)
    assert seen == [Extent(sources=2, elements=4, weights=(1.0, 2.0), params=Params())]


def test_rows_are_never_cut() -> None:
    def centred(sources: list[torch.Tensor]) -> torch.Tensor:
        """Subtracts the mean of each row.

        Rows are vectors along the last axis.
        """
        return sources[0] - sources[0].mean(dim=-1, keepdim=True)

    method = declare(centred, access="rows", sources=(1, None))
    source = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    for block in (1, 7, 20, None):
        torch.testing.assert_close(
            apply_method(method, [source], block=block), source - source.mean(dim=-1, keepdim=True)
        )
