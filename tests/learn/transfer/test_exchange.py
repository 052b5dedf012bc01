from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergekit_px.learn.transfer.exchange import Exchange, Link, planned_transfers, sham_matrix
from mergekit_px.learn.transfer.factors import Factors
from mergekit_px.learn.transfer.plan import Adapter

LR = 0.05


class Problem:
    """A network in float64 whose first weight receives, and a batch for it."""

    def __init__(self, rank: int | None, *, exact: bool = False, kind: str = "lpka") -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
        self.inputs = torch.randn(8, 2, 4, 4, dtype=torch.float64)
        self.labels = torch.arange(8) % 3
        self.factors = Factors(self.network[0].weight, rank, residual=True, label="t", seed=0)
        settings = Adapter(kind=kind, layers=2, heads=2, min_width=8, lr=1e-3, weight_decay=0.0, gate=0.5)
        source = torch.randn(3, 7, dtype=torch.float64)
        self.exchange = Exchange(
            [Link(self.factors, source, "t <- s")], mutual=False, settings=settings, transfers=5, exact=exact, seed=0
        )
        self.before = self.factors.address.detach().clone()
        self.source = source

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.network(self.inputs), self.labels)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.loss().backward()
        self.factors.take_gradient()
        optimizer.step()
        self.factors.write()

    def loss_through_the_adapter(self) -> Tensor:
        """The loss as a function of the adapter alone, with the generated factor in the graph."""
        made = self.exchange.stacks[0](self.before, self.source)
        basis, address = (self.factors.basis, self.before) if self.factors.basis is not None else (None, self.before)
        change = made - address if basis is None else basis.detach() @ (made - address)
        weight = self.start + change.reshape(self.start.shape)
        logits = functional_call(self.network, {"0.weight": weight}, (self.inputs,))
        return nn.functional.cross_entropy(logits, self.labels)

    @property
    def start(self) -> Tensor:
        kept = self.factors._start
        return (self.before if kept is None else kept[0]).reshape(self.factors.weight.shape)


def relative(found: list[Tensor], expected: tuple[Tensor, ...]) -> float:
    flat = [torch.cat([one.flatten() for one in tensors]) for tensors in (found, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.mark.parametrize("kind", ["lpka", "mlp"])
@pytest.mark.parametrize("rank", [2, None])
def test_the_delta_rule_is_the_gradient_of_the_loss_times_the_rate(rank: int | None, kind: str) -> None:
    problem = Problem(rank, kind=kind)
    expected = torch.autograd.grad(problem.loss_through_the_adapter(), problem.exchange.parameters)
    problem.exchange.transfer()
    problem.step(torch.optim.SGD(problem.factors.parameters, lr=LR))
    found = [gradient / LR for gradient in problem.exchange.gradients()]
    assert relative(found, expected) <= 1e-10


@pytest.mark.parametrize("rank", [2, None])
def test_the_exact_rule_is_the_gradient_whatever_the_optimizer(rank: int | None) -> None:
    problem = Problem(rank, exact=True)
    expected = torch.autograd.grad(problem.loss_through_the_adapter(), problem.exchange.parameters)
    problem.exchange.transfer()
    problem.step(torch.optim.AdamW(problem.factors.parameters, lr=LR))
    assert relative(problem.exchange.gradients(), expected) <= 1e-10


def test_with_another_optimizer_the_delta_rule_still_points_along_the_gradient() -> None:
    problem = Problem(2)
    expected = torch.autograd.grad(problem.loss_through_the_adapter(), problem.exchange.parameters)
    problem.exchange.transfer()
    problem.step(torch.optim.AdamW(problem.factors.parameters, lr=LR))
    flat = [torch.cat([one.flatten() for one in tensors]) for tensors in (problem.exchange.gradients(), expected)]
    assert float(torch.cosine_similarity(*flat, dim=0)) > 0.5


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_adapter_learns_downhill(optimizer: type[torch.optim.Optimizer]) -> None:
    problem = Problem(2)
    before = problem.loss_through_the_adapter().item()
    problem.exchange.transfer()
    problem.step(optimizer(problem.factors.parameters, lr=LR))
    problem.exchange.learn()
    assert problem.loss_through_the_adapter().item() < before


def test_a_transfer_puts_the_new_factor_into_the_model() -> None:
    problem = Problem(2)
    with torch.no_grad():
        expected = problem.exchange.stacks[0](problem.before, problem.source)
    problem.exchange.transfer()
    assert torch.equal(problem.factors.address, expected)
    assert problem.factors.basis is not None
    change = (problem.factors.basis @ (expected - problem.before)).reshape(problem.start.shape)
    assert torch.allclose(problem.network[0].weight, problem.start + change, atol=1e-12)
    assert problem.exchange.done == 1


def test_nothing_is_written_before_all_is_read() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 4, generator=generator)) for _ in range(2)]
    first, second = (Factors(one, 2, residual=True, label=str(n), seed=0) for n, one in enumerate(weights))
    settings = Adapter(layers=1, heads=1, min_width=4, lr=1e-3, weight_decay=0.0, gate=0.5)
    links = [Link(first, second, "0 <- 1"), Link(second, first, "1 <- 0")]
    exchange = Exchange(links, mutual=False, settings=settings, transfers=1, exact=False, seed=0)
    old = [one.address.detach().clone() for one in (first, second)]
    exchange.transfer()
    with torch.no_grad():
        assert torch.equal(first.address, exchange.stacks[0](old[0], old[1]))
        assert torch.equal(second.address, exchange.stacks[1](old[1], old[0]))


def test_the_rate_falls_along_the_transfers() -> None:
    problem = Problem(2)
    optimizer = torch.optim.SGD(problem.factors.parameters, lr=LR)
    rates = []
    for _ in range(5):
        problem.exchange.transfer()
        problem.step(optimizer)
        problem.exchange.learn()
        rates.append(problem.exchange.optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
    assert rates == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * done / 5)) for done in range(5)])


def test_biases_and_scalars_do_not_decay() -> None:
    problem = Problem(2)
    decaying, others = problem.exchange.optimizer.param_groups
    assert all(one.ndim == 2 for one in decaying["params"])
    assert others["weight_decay"] == 0.0
    assert len(decaying["params"]) + len(others["params"]) == len(list(problem.exchange.stacks[0].parameters()))


def test_a_sham_has_the_size_of_the_source_and_nothing_else_of_it() -> None:
    source = torch.full((3, 7), 2.0)
    sham = sham_matrix(source, 0, "pair")
    assert float(sham.square().mean().sqrt()) == pytest.approx(2.0, rel=1e-5)
    assert torch.equal(sham, sham_matrix(-source, 0, "pair"))
    assert not torch.equal(sham, sham_matrix(source, 1, "pair"))
    assert float(sham.std()) > 1.0


@pytest.mark.parametrize(
    ("steps", "cycle", "stop"), [(10, 4, 7), (10, 1, 10), (10, 100, 7), (1, 3, 1), (9, 3, 9), (10, 3, 4)]
)
def test_planned_transfers(steps: int, cycle: int, stop: int) -> None:
    assert planned_transfers(steps, cycle, stop) == sum(t % cycle == 0 and t < stop for t in range(steps))
