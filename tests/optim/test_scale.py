"""The one owner of loss and gradient scale, on cases worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from paceline.core.errors import DataError
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.optim.parts import Part, local
from paceline.optim.scale import LossScale, clip, global_norm
from paceline.plan.layout import Place, padded_share
from paceline.plan.mesh import MeshConfig

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
ALONE = World(MeshConfig(), 0, CPU)


def with_gradient(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(len(values), dtype=dtype))
    parameter.grad = torch.tensor(values, dtype=dtype)
    return parameter


def test_losses_are_divided_by_the_tokens_of_the_whole_step():
    scale = LossScale(8, ALONE)
    assert scale.count == 8
    weight = torch.tensor(3.0, requires_grad=True)
    for factor in (2.0, 6.0):  # two micro-batches
        scale.scaled(weight * factor).backward()
    assert weight.grad is not None
    assert weight.grad.item() == (2.0 + 6.0) / 8
    assert scale.mean_loss(torch.tensor(20.0, dtype=torch.float64)) == 2.5


def test_a_step_without_valid_tokens_is_refused():
    with pytest.raises(DataError, match="without a single valid token"):
        LossScale(0, ALONE)


@pytest.mark.ranks
def test_ranks_with_unequal_counts_share_one_scale():
    mesh = MeshConfig(dp_replicate=2, dp_shard=2)
    counts, sums = (1, 0, 5, 10), (2.0, 0.0, 10.0, 4.0)

    def work(rank: int) -> tuple[int, float, float]:
        world = World(mesh, rank, CPU)
        scale = LossScale(counts[rank], world)  # one rank without a token is nothing special
        mean = scale.mean_loss(torch.tensor(sums[rank], dtype=torch.float64))
        return scale.count, scale.scaled(torch.tensor(32.0)).item(), mean

    assert run_ranks(work, 4) == [(16, 2.0, 1.0)] * 4


def whole(*parameters: nn.Parameter) -> list[Part]:
    return [Part.of_whole(parameter) for parameter in parameters]


def test_the_norm_is_that_of_all_gradients_together():
    frozen = nn.Parameter(torch.ones(5), requires_grad=False)
    parameters = [with_gradient(3.0, -4.0), frozen, with_gradient(12.0), with_gradient(0.0, 84.0)]
    assert global_norm(whole(*parameters), (), ALONE) == 85.0
    assert global_norm(whole(frozen), (), ALONE) == 0.0


def test_squares_of_norms_are_summed_in_float64():
    parameters = [with_gradient(1e25, dtype=torch.float32) for _ in range(4)]
    assert global_norm(whole(*parameters), (), ALONE) == pytest.approx(2e25)


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    assert math.isnan(
        global_norm(whole(with_gradient(1.0, math.nan), with_gradient(2.0)), (), ALONE)
    )
    assert math.isinf(global_norm(whole(with_gradient(math.inf), with_gradient(2.0)), (), ALONE))


@pytest.mark.ranks
@pytest.mark.parametrize("rows", [4, 3, 1])  # 3 over 2 ranks is 2 + 1, 1 is 1 + 0
def test_the_norm_of_split_gradients_is_that_of_the_whole(rows):
    mesh = MeshConfig(dp_replicate=2, dp_shard=2)
    gradient = torch.arange(1.0, 2 * rows + 1).view(rows, 2)

    def work(rank: int) -> tuple[float, float]:
        world = World(mesh, rank, CPU)
        submesh = world.device_mesh("dp_shard")
        parameter = nn.Parameter(distribute_tensor(torch.zeros(rows, 2), submesh, [Shard(0)]))
        parameter.grad = distribute_tensor(gradient, submesh, [Shard(0)])
        place = Place.of_whole((rows, 2)).rows(padded_share(rows, 2, world.coordinate("dp_shard")))
        part = Part(parameter, place)
        norm = global_norm([part], ("dp_shard",), world)
        factor = clip([part], norm, norm / 2)
        assert factor == 0.5
        return norm, global_norm([part], ("dp_shard",), world)

    norm = math.sqrt(sum(value**2 for value in range(1, 2 * rows + 1)))
    assert run_ranks(work, 4) == [pytest.approx((norm, norm / 2), rel=1e-6)] * 4


@pytest.mark.ranks
def test_what_two_ranks_hold_counts_once():
    def work(rank: int) -> float:
        world = World(MeshConfig(tp=2), rank, CPU)
        copy = Part.of_whole(with_gradient(3.0, 4.0))
        shared = Part.of_whole(with_gradient(5.0, 12.0))  # the second element has another owner
        mine = copy if rank == 0 else Part(copy.tensor, copy.place.disowned())
        owned = shared.place.owned.narrowed(0, range(rank, rank + 1))
        theirs = Part(shared.tensor, replace(shared.place, owned=owned))
        return global_norm([mine, theirs], ("tp",), world)

    assert run_ranks(work, 2) == [pytest.approx(math.sqrt(194.0))] * 2


def test_a_norm_above_the_bound_is_scaled_down_to_it():
    parameters = [with_gradient(3.0, 0.0), with_gradient(4.0)]
    frozen = nn.Parameter(torch.ones(1))
    assert clip(whole(*parameters, frozen), 5.0, 1.25) == 0.25
    assert [p.grad.tolist() for p in parameters if p.grad is not None] == [[0.75, 0.0], [1.0]]
    assert frozen.grad is None


@pytest.mark.parametrize("max_norm", [5.0, 6.0, 0.0])  # at the bound, below it, and no bound
def test_other_norms_are_left_alone(max_norm):
    parameter = with_gradient(3.0, 4.0)
    assert clip(whole(parameter), 5.0, max_norm) == 1.0
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [3.0, 4.0]


@pytest.mark.ranks
def test_the_local_part_is_what_this_rank_holds():
    tensor = torch.arange(6.0).view(3, 2)
    assert local(tensor) is tensor

    def work(rank: int) -> list[list[float]]:
        world = World(MeshConfig(dp_shard=2), rank, CPU)
        return local(distribute_tensor(tensor, world.device_mesh("dp_shard"), [Shard(0)])).tolist()

    assert run_ranks(work, 2) == [tensor[:2].tolist(), tensor[2:].tolist()]
