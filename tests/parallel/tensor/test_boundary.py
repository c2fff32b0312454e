"""Each boundary against its definition, forward and backward, with sizes that divide by nothing."""

from __future__ import annotations

import pytest
import torch

from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.parallel.tensor import boundary
from paceline.plan.mesh import MeshConfig

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

B, T, D = 2, 5, 3


def terms(tp):
    """A term of a partial tensor for each rank, and its gradient once it is whole."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(tp, B, T, D), draw(B, T, D)


def over_ranks(tp, function):
    def run(rank):
        world = World(MeshConfig(tp=tp), rank, torch.device("cpu"))
        return [t.detach().numpy() for t in function(rank, world)]

    return [[torch.from_numpy(t) for t in found] for found in run_ranks(run, tp)]


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_a_sum_and_a_copy_are_each_other_s_converse(tp):
    x, gradient_BTD = terms(tp)

    def summed(rank, world):
        term = x[rank].clone().requires_grad_()
        whole = boundary.sum_up(term, world)
        whole.backward(gradient_BTD)
        return whole, term.grad

    def copied(rank, world):
        whole = x[0].clone().requires_grad_()
        copy = boundary.copy_in(whole, world)
        copy.backward(x[rank])  # every rank has another term of the gradient
        return copy, whole.grad

    for whole, gradient in over_ranks(tp, summed):
        torch.testing.assert_close(whole, x.sum(0))
        assert torch.equal(gradient, gradient_BTD)
    for copy, gradient in over_ranks(tp, copied):
        assert torch.equal(copy, x[0])
        torch.testing.assert_close(gradient, x.sum(0))


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_rows_are_scattered_and_gathered(tp):
    x, gradient_BTD = terms(tp)

    def run(rank, world):
        term = x[rank].clone().requires_grad_()
        rows_1RD = boundary.scatter_rows(term, world)
        whole_1RD = boundary.gather_rows(rows_1RD, world)
        tokens_BTD = whole_1RD[:, : B * T].view(B, T, D)
        tokens_BTD.backward(gradient_BTD / tp)  # each rank's use of it gives a part of the gradient
        return tokens_BTD, term.grad, rows_1RD

    for rank, (tokens_BTD, gradient, rows_1RD) in enumerate(over_ranks(tp, run)):
        torch.testing.assert_close(tokens_BTD, x.sum(0))
        torch.testing.assert_close(gradient, gradient_BTD)
        num_rows = -(-B * T // tp)
        assert rows_1RD.shape == (1, num_rows, D)
        own = x.sum(0).flatten(0, 1)[rank * num_rows : (rank + 1) * num_rows]
        torch.testing.assert_close(rows_1RD[0, : len(own)], own)


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_own_rows_of_a_whole_tensor_have_their_gradient_alone(tp):
    x, gradient_BTD = terms(tp)

    def run(_rank, world):
        whole = x[0].clone().requires_grad_()
        rows_1RD = boundary.own_rows(whole, world)
        tokens = boundary.gather_rows(rows_1RD, world)[:, : B * T].view(B, T, D)
        tokens.backward(gradient_BTD / tp)
        return tokens, whole.grad

    found = over_ranks(tp, run)
    for tokens, _ in found:
        assert torch.equal(tokens, x[0])
    torch.testing.assert_close(sum(gradient for _, gradient in found), gradient_BTD)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 1, 1), (1, 2, 0)])
def test_columns_are_gathered(sizes):
    x, gradient_BTD = terms(1)

    def run(rank, world):
        part = x[0].split(sizes, dim=-1)[rank].clone().requires_grad_()
        whole = boundary.gather_columns(part, sizes, world)
        whole.backward(gradient_BTD)
        return whole, part.grad

    for rank, (whole, gradient) in enumerate(over_ranks(len(sizes), run)):
        assert torch.equal(whole, x[0])
        assert torch.equal(gradient, gradient_BTD.split(sizes, dim=-1)[rank])
