from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mergekit_px.learn.transfer.adapter import AdapterStack, FactorAttention, both_ways
from mergekit_px.learn.transfer.plan import Adapter

SHAPES = [
    ((1, 9), (4, 6)),
    ((9, 1), (1, 5)),
    ((4, 4), (4, 4)),
    ((3, 18), (2, 7)),
    ((2, 7), (7, 2)),
]
"""Factors (rank, columns) of target and source: of vectors, squares and kernels."""


def settings(**given: object) -> Adapter:
    return Adapter(**{"layers": 2, "heads": 2, "min_width": 8, "lr": 1e-3, "weight_decay": 0.0, **given})


def matrices(target: tuple[int, int], source: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        3.0 * torch.randn(target, generator=generator, dtype=torch.float64),
        0.1 * torch.randn(source, generator=generator, dtype=torch.float64),
    )


def stack(target: Tensor, source: Tensor, label: str = "pair", **given: object) -> AdapterStack:
    made = AdapterStack(tuple(target.shape), tuple(source.shape), settings(**given), seed=0, label=label)
    return made.to(target.dtype)


@pytest.mark.parametrize(("target_shape", "source_shape"), SHAPES)
@pytest.mark.parametrize("given", [{}, {"kind": "mlp"}, {"max_width": 3}, {"heads": 3, "layers": 1}], ids=str)
def test_any_two_shapes_meet(
    target_shape: tuple[int, int], source_shape: tuple[int, int], given: dict[str, object]
) -> None:
    target, source = matrices(target_shape, source_shape)
    made = stack(target, source, **given)
    output = made(target, source)
    assert output.shape == target.shape
    assert not torch.equal(output, target)
    # Not the sum: with one norm for all outputs it hardly moves.
    (output * torch.linspace(1, 2, output.numel()).reshape(output.shape)).sum().backward()
    assert all(torch.isfinite(one.grad).all() for one in made.parameters())


@pytest.mark.parametrize("form", ["rr", "rc", "cr", "cc"])
def test_a_form_is_attention_over_its_tokens(form: str) -> None:
    target, source = matrices((3, 5), (2, 7))
    made = FactorAttention(form, (3, 5), (2, 7), settings(heads=2, min_width=8)).double()
    queries = target.numpy() if form[0] == "r" else target.numpy().T
    keys = source.numpy() if form[1] == "r" else source.numpy().T

    def mapped(name: str, tokens: np.ndarray) -> np.ndarray:
        linear = getattr(made, name)
        return tokens @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()

    width = max((queries.shape[1] + keys.shape[1]) // 2, 8) // 2
    assert made.query.out_features == 2 * width
    heads = []
    for head in range(2):
        part = slice(head * width, (head + 1) * width)
        scores = mapped("query", queries)[:, part] @ mapped("key", keys)[:, part].T / np.sqrt(width)
        share = np.exp(scores - scores.max(axis=1, keepdims=True))
        heads.append(share / share.sum(axis=1, keepdims=True) @ mapped("value", keys)[:, part])
    expected = mapped("out", np.concatenate(heads, axis=1))
    expected = expected if form[0] == "r" else expected.T
    np.testing.assert_allclose(made(target, source).detach(), expected, atol=1e-12)


def test_the_forms_begin_as_their_mean() -> None:
    target, source = matrices((3, 5), (2, 7))
    mix = stack(target, source).layers[0].mix
    expected = sum(form(target, source) for form in mix.forms) / 4
    assert torch.allclose(mix(target, source), expected, atol=1e-12)
    only = stack(target, source, forms=["cr"]).layers[0].mix
    assert torch.equal(only(target, source), only.forms[0](target, source))


def test_a_layer_is_its_formula() -> None:
    target, source = matrices((3, 5), (2, 7))
    layer = stack(target, source, keep_norm=False, gate=0.3).layers[0]

    def rms(matrix: Tensor) -> Tensor:
        return (matrix**2).mean() ** 0.5

    mixed = layer.mix(target / rms(target), source / rms(source))
    expected = target + 0.3 * rms(target) * layer.narrow(torch.nn.functional.gelu(layer.widen(mixed)))
    assert torch.allclose(layer(target, source), expected, atol=1e-7)


@pytest.mark.parametrize(("target_shape", "source_shape"), SHAPES)
@pytest.mark.parametrize("kind", ["lpka", "mlp"])
@torch.no_grad()
def test_the_norm_is_kept(target_shape: tuple[int, int], source_shape: tuple[int, int], kind: str) -> None:
    target, source = (matrix.float() for matrix in matrices(target_shape, source_shape))
    output = stack(target, source, gate=5.0, kind=kind)(target, source)
    assert abs(float(output.norm() / target.norm()) - 1) <= 1e-6
    free = stack(target, source, gate=5.0, kind=kind, keep_norm=False)(target, source)
    assert abs(float(free.norm() / target.norm()) - 1) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_output_maps_change_no_bit(dtype: torch.dtype) -> None:
    target, source = (matrix.to(dtype) for matrix in matrices((3, 18), (2, 7)))
    assert torch.equal(stack(target, source, init="zero")(target, source), target)


def test_zeros_stay_zeros() -> None:
    target, source = torch.zeros(2, 3), torch.zeros(4, 5)
    made = stack(target, source)
    output = made(target, source)
    output.sum().backward()
    assert torch.equal(output, target)


@pytest.mark.parametrize("mean", ["plain", "learned"])
def test_the_form_of_the_paper_is_a_dense_loop(mean: str) -> None:
    target, source = matrices((3, 5), (2, 7))
    made = stack(target, source, form="paper", mean=mean, heads=1)
    share = np.full(4, 0.25)
    if mean == "learned":
        share = np.exp([0.3, -0.2, 0.5, 0.0]) / np.exp([0.3, -0.2, 0.5, 0.0]).sum()
        for layer in made.layers:
            layer.mix.weights.data.copy_(torch.from_numpy(np.log(share)))
    found = made(target, source)

    def normal(rows: np.ndarray) -> np.ndarray:
        return (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + 1e-5)

    def through(linear: torch.nn.Linear, rows: np.ndarray) -> np.ndarray:
        return rows @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()

    value, given = target.numpy(), source.numpy()
    for layer in made.layers:
        mixed = np.zeros_like(value)
        for weight, form, one in zip(share, ("rr", "rc", "cr", "cc"), layer.mix.forms, strict=True):
            queries, keys = value if form[0] == "r" else value.T, given if form[1] == "r" else given.T
            scores = through(one.query, queries) @ through(one.key, keys).T
            scores = np.exp(scores / np.sqrt(one.query.out_features))
            attended = scores / scores.sum(1, keepdims=True) @ through(one.value, keys)
            rows = normal(queries + through(one.out, attended))
            mixed += weight * (rows if form[0] == "r" else rows.T)
        wide = torch.nn.functional.gelu(torch.from_numpy(through(layer.widen, mixed))).numpy()
        value = normal(mixed + through(layer.narrow, wide))
    np.testing.assert_allclose(found.detach().numpy(), value, rtol=1e-9, atol=1e-10)
    assert {name for name, one in made.named_parameters() if not one.requires_grad} == {
        f"layers.{layer}.{name}" for layer in (0, 1) for name in (["gate"] + ["mix.weights"] * (mean == "plain"))
    }


def test_chunks_change_neither_result_nor_gradient() -> None:
    target, source = matrices((3, 40), (2, 30))
    whole, cut = stack(target, source), stack(target, source, scores=150)
    weights = torch.linspace(-1, 1, 120).reshape(3, 40).double()
    (cut(target, source) * weights).sum().backward()
    (whole(target, source) * weights).sum().backward()
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-12)
    assert torch.allclose(whole(target, source), cut(target, source), atol=1e-12)


def test_parameters_depend_on_the_label_and_on_nothing_drawn_before() -> None:
    target, source = matrices((3, 5), (2, 7))
    first = list(stack(target, source).parameters())
    torch.rand(3)
    again, other = stack(target, source), stack(target, source, label="other")
    assert all(torch.equal(one, two) for one, two in zip(first, again.parameters(), strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(first, other.parameters(), strict=True))


def test_both_ways_uses_what_the_layers_before_gave() -> None:
    target, source = matrices((3, 5), (2, 7))
    forth, back = stack(target, source, "a"), stack(source, target, "b")
    one_target, one_source = forth.layers[0](target, source), back.layers[0](source, target)
    expected = forth.layers[1](one_target, one_source), back.layers[1](one_source, one_target)
    found = both_ways(forth, back, target, source)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
