"""A user's own module: what is a unit, what all ranks begin with, what a gradient is."""

from __future__ import annotations

import pytest
import torch
import torch.distributed
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from paceline.core.errors import ConfigError, DataError, RankError, UsageError
from paceline.dist.testing import run_ranks
from paceline.optim.scale import global_mean
from paceline.parallel.module import blocks_of, parallelize
from paceline.plan.plan import Plan

pytestmark = pytest.mark.cpu

BOUND = 1e-12


class Blocks(nn.Module):
    """A toy with a list of blocks, each with a list of its own, and a small list beside it."""

    def __init__(self, width: int = 6, num_blocks: int = 3):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"parts": nn.ModuleList([nn.Linear(width, width)])})
            for _ in range(num_blocks)
        )
        self.small = nn.ModuleList([nn.Linear(1, 1)])
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block["parts"][0](x))
        return self.head(x)


class Rows(nn.Module):
    """A block whose forward is called, for sharding."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Net(nn.Module):
    def __init__(self, seed: int, *, num_blocks: int = 2):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Rows() for _ in range(num_blocks))
        self.head = nn.Linear(6, 1, bias=False)
        self.register_buffer("offset", torch.full((6,), float(seed)))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x + self.offset)


def plan(precision="float64", **mesh):
    table = dict.fromkeys(("params", "compute", "reduce"), precision)
    stage = {"zero": {"stage": 0}} if mesh.pop("stage", None) == 0 else {}
    return Plan.from_dict({"mesh": mesh, "precision": table, **stage})


def staged(**zero):
    return Plan.from_dict({"mesh": {"dp_shard": 2}, "zero": zero})


def test_members_of_the_large_outermost_lists_are_units():
    module = Blocks()
    assert blocks_of(module) == list(module.blocks)
    assert blocks_of(nn.Sequential(nn.Linear(2, 2))) == []


def test_blocks_that_share_are_left_to_the_root():
    module = Blocks()
    module.blocks[2]["parts"][0].weight = module.blocks[0]["parts"][0].weight
    assert blocks_of(module) == [module.blocks[1]]
    module.blocks[1] = module.blocks[0]
    assert blocks_of(module) == []
    module = Blocks()
    module.head = module.blocks[1]["parts"][0]
    assert blocks_of(module) == [module.blocks[0], module.blocks[2]]


def test_alone_a_module_stays_as_it_is():
    module = Net(0)
    assert parallelize(module, Plan()) is module
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("module", "of", "error", "message"),
    [
        (Net(0), Plan.from_dict({"mesh": {"pp": 2}}), ConfigError, "mesh.pp = 2: is for models"),
        (Net(0), staged(stage=1), ConfigError, "zero.stage = 1: is for models.*use 0 or 3"),
        (Net(0), staged(stage=2), ConfigError, "zero.stage = 2: is for models.*use 0 or 3"),
        (Net(0), staged(sharder="own"), ConfigError, 'zero.sharder = "own": is for models'),
        (Net(0), plan("float32", dp_shard=2), UsageError, "needs 2 rank"),
        (Net(0), plan("float64"), ConfigError, "precision.params.*parameters are float32"),
        (Net(0).bfloat16(), Plan(), ConfigError, "precision.compute"),
        (nn.Linear(2, 2, device="meta"), Plan(), UsageError, "no memory behind"),
        (nn.Identity(), Plan(), UsageError, "has parameters on none"),
    ],
    ids=[
        "pipeline",
        "stage 1",
        "stage 2",
        "own stage 3",
        "ranks",
        "double",
        "bfloat16",
        "meta",
        "empty",
    ],
)
def test_refusals(module, of, error, message):
    with pytest.raises(error) as caught:
        parallelize(module, of)
    import re

    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.ranks
@pytest.mark.parametrize(
    "mesh",
    [{"dp_replicate": 2}, {"dp_shard": 2, "stage": 0}, {"dp_shard": 2}],
    ids=["replicas", "stage 0", "stage 3"],
)
def test_gradients_are_averages_and_ranks_begin_alike(mesh):
    of = plan(**mesh)
    rows_RBD = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    counts = (5, 2)  # ranks have unequal numbers of rows
    alone = Net(0).double()
    total = sum(counts)
    loss = sum(
        alone(rows_BD[:n]).square().sum() for rows_BD, n in zip(rows_RBD, counts, strict=True)
    )
    (loss / total).backward()
    expected = {name: p.grad.numpy() for name, p in alone.named_parameters()}
    expected_loss = float(loss.detach() / total)

    def run(rank):
        module = Net(rank).double()  # every rank has weights of its own, until they meet
        parallel = parallelize(module, of)
        kind = DistributedDataParallel if of.zero_stage == 0 else type(module)
        assert isinstance(parallel, kind)
        value = 0.0
        for rows_BD in rows_RBD[rank, : counts[rank]].split(3):  # two passes on rank 0, one on 1
            share = global_mean(parallel(rows_BD).square().sum(), counts[rank])
            share.backward()
            value += share.item()
        if rank == 1:  # passes are collective: as many on every rank
            share = global_mean(parallel(rows_RBD[1, :0]).square().sum(), counts[rank])
            share.backward()
            value += share.item()
        for name, parameter in module.named_parameters():
            is_split = isinstance(parameter, DTensor)
            assert is_split == (of.zero_stage == 3), name
        return value, {n: whole(p.grad).numpy() for n, p in module.named_parameters()}

    for value, found in run_ranks(run, 2):
        assert abs(value - expected_loss) <= BOUND * abs(expected_loss)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert abs(gradient - expected[name]).max() <= BOUND * abs(expected[name]).max(), name


@pytest.mark.ranks
def test_the_number_of_ranks_is_checked_when_a_group_is_up():
    with pytest.raises(RankError, match=r"needs 4 rank\(s\), but 2 were started"):
        run_ranks(lambda rank: parallelize(Net(rank).double(), plan(dp_shard=4)), 2)


def test_a_mean_alone_is_a_mean():
    losses = torch.arange(4.0, requires_grad=True)
    mean = global_mean(losses.sum(), 4)
    mean.backward()
    assert mean.item() == 1.5
    assert mean.dtype == torch.float32
    assert torch.equal(losses.grad, torch.full((4,), 0.25))
    with pytest.raises(DataError, match="single valid token"):
        global_mean(losses.sum(), 0)
