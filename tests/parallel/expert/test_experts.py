"""Experts that ranks share out: rows go where they should, their bytes and loads are counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from paceline.data.batch import Batch
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.families import family
from paceline.models.layout import Layout
from paceline.models.moe import MixtureOfExperts
from paceline.models.weights import RandomWeights
from paceline.parallel.apply import ParallelModel, apply
from paceline.parallel.expert.all_to_all import COUNTS, ROWS, AllToAll, by_expert
from paceline.parallel.expert.experts import GRADIENTS
from paceline.parallel.expert.load import BALANCE, LOAD
from paceline.plan.batch import batch_shape
from paceline.plan.mesh import MeshConfig
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import ExpertConfig, MemoryConfig, Plan, PrecisionConfig, ZeroConfig
from paceline.train.objective.next_token import next_token

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

CPU = torch.device("cpu")
B, T, M = 2, 7, 3
"""Sequences of a micro-batch, their tokens, and micro-batches."""
FLOAT64 = 8
SPECS = {name: family(name).PRESETS["tiny"] for name in ("mixtral", "pangu-moe")}


def plan_of(**options: Any) -> Plan:
    """Everything in float64; a mesh, and whatever else."""
    precision = PrecisionConfig(params="float64", compute="float64", reduce="float64")
    return Plan(precision=precision, **options)


def batches(index: int) -> list[Batch]:
    """Of a data rank; the last place of each row is padding."""
    found: list[Batch] = []
    for number in range(M):
        places_BT = torch.arange(B * T).view(B, T)
        tokens_BT = (places_BT * places_BT * (index + 2) + 31 * number) % 251
        documents_BT = torch.zeros(B, T, dtype=torch.int64)
        documents_BT[:, -1] = -1
        labels_BT = tokens_BT.roll(-1, dims=1).where(documents_BT == 0, -100)
        found.append(Batch(tokens_BT, labels_BT, documents_BT))
    return found


class Seen(NamedTuple):
    """What a rank has seen in a step.

    Attributes:
        traffic: bytes by operation, axes and purpose.
        leaving: rows of each dispatch that left the rank.
        coming: rows of each dispatch that came from others.
        rows: of each dispatch, for the experts that are here.
        statistics: of the step.
    """

    traffic: Counter[tuple[str, tuple[str, ...], str]]
    leaving: list[int]
    coming: list[int]
    rows: list[int]
    statistics: dict[str, float]


def step_of(plan: Plan, spec: ModelSpec) -> list[Seen]:
    """A step of every rank of a plan, watched."""

    def work(rank: int) -> tuple[Any, ...]:
        world = World(plan.mesh, rank, CPU)
        model = apply(spec, RandomWeights(spec, seed=3), plan, world)
        leaving: list[int] = []
        coming: list[int] = []
        rows: list[int] = []
        watch(model, world, leaving, coming, rows)
        model.passes.train(batches(world.data_index), next_token, lambda loss: loss)
        model.finish_gradients()
        found: Counter[Any] = Counter()
        for operation, axes, size_bytes, purpose in world.traffic.transfers:
            found[operation, axes, purpose] += size_bytes
        return dict(found), leaving, coming, rows, model.statistics()

    return [Seen(Counter(found[0]), *found[1:]) for found in run_ranks(work, plan.mesh.num_ranks)]


def watch(
    model: ParallelModel, world: World, leaving: list[int], coming: list[int], rows: list[int]
) -> None:
    """Has a model's dispatches written down."""
    for module in model.module.modules():
        if isinstance(module, MixtureOfExperts):
            exchange = module.dispatch

            def dispatch(rows_RD: Tensor, counts_E: Tensor, exchange: Any = exchange) -> Any:
                arrived = exchange(rows_RD, counts_E)
                own = counts_E.view(world.degree("ep"), -1)[world.coordinate("ep")].sum()
                leaving.append(len(rows_RD) - int(own))
                coming.append(len(arrived.rows_RD) - int(own))
                rows.append(len(arrived.rows_RD))
                return arrived

            module.dispatch = dispatch


def num_sparse(spec: ModelSpec) -> int:
    return sum(spec.has_experts(layer) for layer in range(spec.num_layers))


def test_rows_by_rank_are_brought_into_the_order_of_experts():
    counts_PE = torch.tensor([[2, 0, 1], [1, 1, 0]])  # experts 0 0 2, then 0 1
    assert by_expert(counts_PE).tolist() == [0, 1, 3, 4, 2]
    assert by_expert(torch.zeros(2, 3, dtype=torch.int64)).tolist() == []


def test_a_dispatch_over_ranks_is_one_without():
    """Values and gradients, of counts with an expert and a rank that get nothing."""
    counts = [[2, 0, 1, 1], [0, 0, 0, 3], [4, 0, 0, 0], [1, 0, 2, 0]]
    mesh = MeshConfig(dp_shard=4, ep=4)

    def rows_of(rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(rank)
        return torch.randn(sum(counts[rank]), 3, generator=generator, requires_grad=True)

    def factor(expert: int) -> float:
        return 2.0 + expert

    def work(rank: int) -> tuple[list[int], bool, bool]:
        rows_RD = rows_of(rank)
        arrived = AllToAll(World(mesh, rank, CPU))(rows_RD, torch.tensor(counts[rank]))
        outputs_RD = arrived.combine(arrived.rows_RD * factor(rank))
        factors = [factor(expert) for expert, n in enumerate(counts[rank]) for _ in range(n)]
        factors_R1 = torch.tensor(factors)[:, None]
        outputs_RD.backward(torch.full_like(outputs_RD, 1 + rank))
        assert rows_RD.grad is not None
        is_gradient = torch.equal(rows_RD.grad, (factors_R1 * (1 + rank)).expand(-1, 3))
        return list(arrived.counts), torch.equal(outputs_RD, rows_RD * factors_R1), is_gradient

    assert run_ranks(work, 4) == [(counts, True, True) for counts in ([7], [0], [3], [4])]


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", SPECS)
def test_ranks_send_what_the_formula_says(name, remat):
    spec, plan = SPECS[name], plan_of(mesh=MeshConfig(dp_shard=2, ep=2), zero=ZeroConfig(stage=0))
    plan = replace(plan, memory=MemoryConfig(remat=remat))
    passes = 2 if remat == "full" else 1  # forward; a watched dispatch is one of them
    for seen in step_of(plan, spec):
        assert spec.moe is not None
        num_calls = num_sparse(spec) * M * passes
        assert len(seen.leaving) == num_calls
        sent, back = sum(seen.leaving), sum(seen.coming)
        row_bytes = spec.d_model * FLOAT64
        # Forward, out and back, in each pass; in the one backward pass the converse of both.
        expected = (sent + back) * row_bytes + (sent + back) // passes * row_bytes
        assert seen.traffic["all-to-all", ("ep",), ROWS] == expected
        counts_bytes = spec.moe.num_experts // 2 * 8
        assert seen.traffic["all-to-all", ("ep",), COUNTS] == num_calls * counts_bytes
        assert ("all-reduce", ("ep_replicate",), GRADIENTS) not in seen.traffic


def test_gradients_of_experts_are_summed_where_there_are_copies_of_them():
    spec = SPECS["mixtral"]
    mesh = MeshConfig(dp_replicate=2, dp_shard=4, ep=2)
    assert spec.moe is not None
    of_rank = num_sparse(spec) * 3 * 4 * spec.d_model * spec.moe.d_expert * FLOAT64
    for seen in step_of(plan_of(mesh=mesh, zero=ZeroConfig(stage=1)), spec):
        for axis in ("dp_replicate", "ep_replicate"):
            assert seen.traffic["all-reduce", (axis,), GRADIENTS] == of_rank


def test_a_balance_loss_sums_counts_where_ranks_have_rows_of_one_sequence():
    spec, expert = SPECS["pangu-moe"], ExpertConfig(balance_loss_weight=0.1)
    plan = plan_of(mesh=MeshConfig(tp=2, ep=2), expert=expert)
    each = M * num_sparse(spec) * B * (8 + 1) * FLOAT64
    for seen in step_of(plan, spec):
        assert seen.traffic["all-reduce", ("tp",), BALANCE] == each
    for seen in step_of(plan_of(mesh=MeshConfig(dp_shard=2, ep=2), expert=expert), spec):
        assert not any(purpose == BALANCE for _, _, purpose in seen.traffic)


@pytest.mark.parametrize("ep", [2, 4])
def test_groups_give_every_rank_the_same_load_and_plain_routing_does_not(ep):
    """Rows of every layer and micro-batch, counted where they arrive."""
    plan = plan_of(mesh=MeshConfig(dp_shard=ep, ep=ep))
    spec = SPECS["pangu-moe"]
    assert spec.moe is not None
    assert spec.moe.num_groups % ep == 0
    choices = B * T * spec.moe.experts_per_token
    for seen in step_of(plan, spec):
        assert seen.rows == [choices] * (num_sparse(spec) * M)
    plain = replace(spec, moe=replace(spec.moe, num_groups=1))
    rows = [seen.rows for seen in step_of(plan, plain)]
    assert all(sum(of_all) == ep * choices for of_all in zip(*rows, strict=True))
    assert any(len(set(of_all)) > 1 for of_all in zip(*rows, strict=True))


# Statistics


def alone(spec: ModelSpec, num_data_ranks: int, plan: Plan) -> dict[str, float]:
    """The statistics of a step of the same batches in one process."""
    model = apply(spec, RandomWeights(spec, seed=3), plan, World(MeshConfig(), 0, CPU))
    for index in range(num_data_ranks):
        model.passes.train(batches(index), next_token, lambda loss: loss)
    return model.statistics()


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(dp_shard=2, ep=2),
        MeshConfig(tp=2, ep=2),
        MeshConfig(tp=2),
        MeshConfig(pp=2, dp_shard=2, ep=2),
    ],
    ids=["dp_shard", "rows", "tp", "stages"],
)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_every_rank_knows_the_load_of_all(mesh, remat):
    spec, expert = SPECS["mixtral"], ExpertConfig(balance_loss_weight=0.1)
    expected = alone(spec, mesh.num_data_ranks, plan_of(expert=expert))
    assert expected.keys() == {"expert_load", "balance_loss"}
    assert 1 < expected["expert_load"] < 8
    assert 1 <= expected["balance_loss"] / spec.num_layers < 8
    plan = plan_of(mesh=mesh, expert=expert, memory=MemoryConfig(remat=remat))
    for seen in step_of(plan, spec):
        assert seen.statistics == pytest.approx(expected, rel=1e-9)
        assert not any(purpose == LOAD for _, _, purpose in seen.traffic)  # not before it is asked


def test_statistics_are_of_the_passes_since_they_were_asked_for_and_of_training_alone():
    spec = SPECS["mixtral"]
    plan = plan_of()
    model = apply(spec, RandomWeights(spec, seed=3), plan, World(MeshConfig(), 0, CPU))
    model.passes.train(batches(0), next_token, lambda loss: loss)
    first = model.statistics()
    model.module.eval()
    model.passes.evaluate(batches(1), next_token)
    model.module.train()
    assert model.statistics() == {"expert_load": 0.0}
    model.passes.train(batches(0), next_token, lambda loss: loss)
    assert model.statistics() == first
    dense = family("llama").PRESETS["tiny"]
    assert apply(dense, RandomWeights(dense), plan, World(MeshConfig(), 0, CPU)).statistics() == {}


def test_the_scale_of_the_balance_loss_is_of_the_plan_alone():
    """A weight over the sequences of a step: the same on all ranks, whatever they read."""
    plan = plan_of(expert=ExpertConfig(balance_loss_weight=0.5))
    spec = SPECS["mixtral"]
    model = apply(spec, RandomWeights(spec, seed=3), plan, World(MeshConfig(), 0, CPU))
    router = model.module.blocks[0].ffn.router.weight
    x_BTD = torch.randn(B, T, spec.d_model, dtype=torch.float64)
    layout = Layout.whole_rows(x_BTD[..., 0])
    (model.module.blocks[0].ffn(x_BTD, layout).sum() * 0.0).backward()
    found = router.grad
    router.grad = None
    assert found is not None
    moe = model.module.blocks[0].ffn
    probs_RE = moe.probabilities(x_BTD.flatten(0, 1))
    counts_BE = torch.zeros(B, 8, dtype=torch.float64)
    for row, chosen in enumerate(moe.choose(probs_RE)[1].view(B, -1)):
        counts_BE[row] = chosen.bincount(minlength=8).double()
    loss = (counts_BE * probs_RE.view(B, T, 8).sum(dim=1)).sum() * 8 / (2 * T * T)
    (loss * 0.5 / batch_shape(plan).sequences_per_step).backward()
    assert router.grad is not None
    assert float((found - router.grad).abs().max()) <= 1e-14 * float(found.abs().max()) * 10
