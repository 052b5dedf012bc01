from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mergekit_px.errors import NonFiniteError, PlanError
from mergekit_px.learn.transfer.factors import Factors
from mergekit_px.learn.transfer.ranks import chosen_rank, default_rank, matrix_shape


def weight(*shape: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype))


def factors(parameter: nn.Parameter, rank: int | None, *, residual: bool = True) -> Factors:
    return Factors(parameter, rank, residual=residual, label="model/weight", seed=0)


def test_the_factors_are_those_of_the_svd() -> None:
    parameter = weight(6, 4)
    found = factors(parameter, 2)
    u, s, vt = np.linalg.svd(parameter.detach().numpy(), full_matrices=False)
    assert found.basis is not None
    np.testing.assert_allclose((found.basis @ found.address).detach(), (u[:, :2] * s[:2]) @ vt[:2], atol=1e-12)
    np.testing.assert_allclose((found.basis.T @ found.basis).detach(), np.diag(s[:2]), atol=1e-12)
    np.testing.assert_allclose((found.address @ found.address.T).detach(), np.diag(s[:2]), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 4), (1, 7), (7, 1), (5, 5), (4, 3, 3, 3), (3, 4, 2)])
def test_with_a_residual_training_begins_at_the_weights_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parameter = weight(*shape, dtype=dtype)
    before = parameter.detach().clone()
    found = factors(parameter, 1)
    found.write()
    assert torch.equal(parameter, before)
    with torch.no_grad():
        found.address.mul_(2.0)
    found.write()
    start = before.double().reshape(matrix_shape(shape)).numpy()
    u, s, vt = np.linalg.svd(start, full_matrices=False)
    expected = start + s[0] * np.outer(u[:, 0], vt[0])
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    np.testing.assert_allclose(parameter.detach().double().reshape(start.shape), expected, atol=tolerance)


def test_without_a_residual_the_model_gets_the_product() -> None:
    parameter = weight(6, 4)
    u, s, vt = np.linalg.svd(parameter.detach().numpy(), full_matrices=False)
    factors(parameter, 3, residual=False)
    np.testing.assert_allclose(parameter.detach(), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-12)


def test_the_folded_matrix_does_what_the_factors_do() -> None:
    parameter = weight(6, 4, dtype=torch.float32)
    found = factors(parameter, 2, residual=False)
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    assert found.basis is not None
    in_factors = (inputs @ found.address.T) @ found.basis.T
    assert torch.allclose(inputs @ parameter.T, in_factors, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 4), (4, 2, 3, 3)])
@pytest.mark.parametrize("rank", [2, None])
def test_gradients_are_those_of_autograd_through_the_product(shape: tuple[int, ...], rank: int | None) -> None:
    parameter = weight(*shape)
    found = factors(parameter, rank)
    direction = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (parameter.sin() * direction).sum().backward()
    assert found.take_gradient()
    assert parameter.grad is None
    leaves = [one.detach().clone().requires_grad_() for one in found.parameters]
    if rank is None:
        made = leaves[0].reshape(shape)
    else:
        basis, address = leaves
        product = basis @ address
        made = parameter.detach() + (product - product.detach()).reshape(shape)
    (made.sin() * direction).sum().backward()
    for one, leaf in zip(found.parameters, leaves, strict=True):
        assert torch.allclose(one.grad, leaf.grad, atol=1e-12)


def test_a_weight_used_twice_gets_both_gradients() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    found = factors(first.weight, 4)
    second(first(torch.ones(1, 4)).tanh()).sum().backward()
    whole = first.weight.grad.clone()
    assert found.take_gradient() and found.basis is not None
    assert torch.allclose(found.basis.grad, whole @ found.address.T)


def test_a_loss_that_does_not_reach_the_weight_is_noticed() -> None:
    assert not factors(weight(4, 4), 2).take_gradient()


def test_a_matrix_of_zeros_stays_so_and_can_still_learn() -> None:
    parameter = nn.Parameter(torch.zeros(3, 5))
    found = factors(parameter, 2)
    found.write()
    assert torch.equal(parameter, torch.zeros(3, 5))
    parameter.grad = torch.ones(3, 5)
    found.take_gradient()
    assert found.basis is not None
    assert bool((found.basis.grad != 0).any())
    again = factors(nn.Parameter(torch.zeros(3, 5)), 2)
    assert torch.equal(found.address, again.address)


def test_a_state_restores_all_of_it() -> None:
    found = factors(weight(6, 4), 2)
    with torch.no_grad():
        found.address.add_(1.0)
    state = {name: tensor.clone() for name, tensor in found.state().items()}
    other = Factors(nn.Parameter(torch.randn(6, 4, dtype=torch.float64)), 2, residual=True, label="o", seed=0)
    other.restore(state)
    assert torch.equal(other.matrix(), found.matrix())


def test_a_nan_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="model/weight"):
        factors(nn.Parameter(torch.full((2, 2), float("nan"))), 1)


def test_ranks() -> None:
    assert [default_rank(shape) for shape in [(1, 9), (4, 4), (100, 40), (16, 8, 3, 3), (4096, 4096)]] == [
        1,
        1,
        10,
        4,
        64,
    ]
    assert chosen_rank(None, (100, 40), "p") == 10
    assert chosen_rank(40, (100, 40), "p") == 40
    assert chosen_rank("full", (100, 40), "p") is None
    with pytest.raises(PlanError) as caught:
        chosen_rank(41, (100, 2, 4, 5), "plan.yaml:3:5")
    assert str(caught.value) == (
        "plan.yaml:3:5: rank 41 is above that of a 100 x 40 matrix; it can be 40 at most, or full"
    )
    for shape in [(5,), (), (0, 4)]:
        with pytest.raises(PlanError, match="is no matrix"):
            chosen_rank("full", shape, "p")
