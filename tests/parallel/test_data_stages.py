"""Every way in which data ranks share state: gradients are sums, and traffic is what it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from paceline.core.errors import ConfigError, UnknownNameError
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.families.llama import PRESETS
from paceline.models.weights import RandomWeights
from paceline.parallel import buckets
from paceline.parallel.apply import apply
from paceline.parallel.data import STAGES
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import Plan, TrainConfig, ZeroConfig
from wholes import whole, whole_weights

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

CPU = torch.device("cpu")
SPEC = PRESETS["tiny"]
FROZEN = ("blocks.1.*", "norm.weight")
MESHES = [MeshConfig(dp_shard=3), MeshConfig(dp_replicate=2, dp_shard=2)]
ZEROS = {
    "0": ZeroConfig(stage=0),
    "1": ZeroConfig(stage=1),
    "2": ZeroConfig(stage=2),
    "3": ZeroConfig(stage=3),
    "3-own": ZeroConfig(stage=3, sharder="own"),
}
LAYOUTS = [
    Plan(),
    Plan(mesh=MeshConfig(dp_replicate=2)),
    *(Plan(mesh=mesh, zero=zero) for zero in ZEROS.values() for mesh in MESHES),
]
NAMES = [f"{p.mesh.dp_replicate}x{p.mesh.dp_shard} ranks, {p.zero_technique}" for p in LAYOUTS]


def test_every_stage_is_laid_out():
    assert {plan.zero_technique for plan in LAYOUTS} == set(STAGES) == set(ZEROS)


def on_ranks(plan: Plan, work: Any) -> list[Any]:
    """Runs ``work(model, world)`` on the ranks of a plan, on the same weights everywhere."""

    def run(rank: int) -> Any:
        world = World(plan.mesh, rank, CPU)
        return work(apply(SPEC, RandomWeights(SPEC, seed=3), plan, world), world)

    return run_ranks(run, plan.mesh.num_ranks)


@pytest.mark.parametrize("plan", LAYOUTS, ids=NAMES)
def test_weights_are_whole_wherever_they_lie(plan):
    def work(model, world):
        return whole_weights(model.parts, world)

    expected = RandomWeights(SPEC, seed=3)
    for found in on_ranks(plan, work):
        for name, value in found.items():
            np.testing.assert_array_equal(value, expected.read(name).numpy(), err_msg=name)


@pytest.mark.parametrize("plan", LAYOUTS, ids=NAMES)
def test_gradients_are_summed_over_ranks_and_micro_batches(plan):
    def loss(model, index: int) -> torch.Tensor:
        tokens_BT = torch.arange(8).view(1, 8) * (index + 1) % SPEC.vocab_size
        return model.module(tokens_BT).square().sum() * (index + 1)

    def work(model, world):
        for microbatch in range(2):
            loss(model, 2 * world.data_index + microbatch).backward()
            model.data.finish_pass(model.module)
        model.data.finish_gradients(model.module)
        return {name: whole(part, world, gradient=True) for name, part in model.parts.items()}

    alone = apply(SPEC, RandomWeights(SPEC, seed=3), Plan(), World(MeshConfig(), 0, CPU))
    for index in range(2 * plan.mesh.num_data_ranks):
        loss(alone, index).backward()
    expected = {name: p.grad.numpy() for name, p in alone.module.named_parameters()}
    for found in on_ranks(plan, work):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            error = np.abs(value - expected[name]).max() / np.abs(expected[name]).max()
            assert error < 1e-5, (name, error)


@pytest.mark.parametrize("plan", LAYOUTS, ids=NAMES)
def test_split_axes_say_what_a_rank_holds(plan):
    def work(model, _world):
        parts = model.parts.values()
        held, owned = (
            sum(box.num_elements for box in boxes)
            for boxes in ([p.place.box for p in parts], [p.place.owned for p in parts])
        )
        assert held == sum(part.local.numel() for part in parts)
        return held, owned, model.data.spread_axes

    found = on_ranks(plan, work)
    (spread_axes,) = {axes for _, _, axes in found}
    copies = plan.mesh.num_ranks // (plan.mesh.dp_shard if spread_axes else 1)
    assert spread_axes == (("dp_shard",) if plan.zero_stage else ())
    assert sum(held for held, _, _ in found) == copies * SPEC.num_parameters
    assert [held for held, _, _ in found] == [owned for _, owned, _ in found]


@pytest.mark.parametrize("bucket_bytes", [1, 4096, 25 << 20])
def test_the_gradient_all_reduce_sends_each_trained_gradient_once(monkeypatch, bucket_bytes):
    monkeypatch.setattr(buckets, "BUCKET_BYTES", bucket_bytes)
    plan = Plan(mesh=MeshConfig(dp_replicate=2), train=TrainConfig(freeze=FROZEN))

    def work(model, world):
        model.module(torch.arange(8).view(1, 8) + world.rank).square().sum().backward()
        model.data.finish_gradients(model.module)
        trained = [p for p in model.parameters() if p.requires_grad]
        num_trained = sum(p.numel() for p in trained)
        gradients = [t for t in world.traffic.transfers if t.purpose == "gradients"]
        norms = [float(p.grad.norm()) for p in trained]
        return num_trained, len(trained), gradients, norms

    first, second = on_ranks(plan, work)
    assert first == second
    num_trained, num_tensors, gradients, norms = first
    matrices = SPEC.attention_matrix_parameters + SPEC.ffn_matrix_parameters(0, active=True)
    layer = matrices + 2 * SPEC.d_model
    assert num_trained == SPEC.num_parameters - layer - SPEC.d_model
    assert sum(transfer.size_bytes for transfer in gradients) == 4 * num_trained
    assert {transfer[:2] for transfer in gradients} == {
        ("all-reduce", ("dp_replicate", "dp_shard"))
    }
    assert len(gradients) == {1: num_tensors, 25 << 20: 1}.get(bucket_bytes, len(gradients))
    assert 1 <= len(gradients) <= num_tensors
    assert all(norm > 0 for norm in norms)


def test_one_rank_sends_nothing():
    world = World(MeshConfig(), 0, CPU)
    model = apply(SPEC, RandomWeights(SPEC), Plan(), world)
    model.module(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    model.data.finish_gradients(model.module)
    assert not world.traffic.transfers


@pytest.mark.parametrize("bucket_bytes", [1, 25 << 20])
@pytest.mark.parametrize(
    "plan", [p for p in LAYOUTS if p.zero_technique in ("1", "2", "3-own") and p.mesh.dp_shard == 3]
)
def test_a_pass_that_misses_a_parameter_on_some_ranks_counts_as_zero_there(
    monkeypatch, plan, bucket_bytes
):
    monkeypatch.setattr(buckets, "BUCKET_BYTES", bucket_bytes)
    missed = ("blocks.1.ffn_norm.weight", "embedding.weight", "norm.weight")

    def loss(model, index: int) -> torch.Tensor:
        for name in missed:  # without a gradient on all ranks but the first
            owner = model.get_submodule(name.removesuffix(".weight"))
            owner.weight.requires_grad_(index == 0)
        tokens_BT = torch.arange(8).view(1, 8) * (index + 1) % SPEC.vocab_size
        return model(tokens_BT).square().sum()

    def work(model, world):
        loss(model.module, world.data_index).backward()
        model.data.finish_pass(model.module)
        model.data.finish_gradients(model.module)
        return {name: whole(part, world, gradient=True) for name, part in model.parts.items()}

    alone = apply(SPEC, RandomWeights(SPEC, seed=3), Plan(), World(MeshConfig(), 0, CPU))
    for index in range(plan.mesh.num_data_ranks):
        loss(alone.module, index).backward()
    for found in on_ranks(plan, work):
        for name, parameter in alone.module.named_parameters():
            expected = parameter.grad.numpy()
            error = np.abs(found[name] - expected).max() / np.abs(expected).max()
            assert error < 1e-5, (name, error)


def test_a_gradient_that_only_some_ranks_have_is_summed_all_the_same():
    plan = Plan(mesh=MeshConfig(dp_replicate=2))

    def work(model, world):
        norm = model.module.norm.weight
        if world.rank == 1:
            norm.grad = torch.full_like(norm, 2.0)
        model.data.finish_gradients(model.module)
        return norm.grad.tolist()

    assert on_ranks(plan, work) == [[2.0] * SPEC.d_model] * 2


@pytest.mark.parametrize("plan", LAYOUTS, ids=NAMES)
def test_frozen_parameters_have_no_gradient(plan):
    frozen_plan = replace(plan, train=TrainConfig(freeze=FROZEN))

    def work(model, world):
        model.module(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
        model.data.finish_pass(model.module)
        model.data.finish_gradients(model.module)
        owned = sum(part.place.owned.num_elements for part in model.parts.values())
        without = {name for name, part in model.parts.items() if part.gradient is None}
        return without, sum(world.collect(owned))

    names = {name for name, _ in apply_alone(frozen_plan).module.named_parameters()}
    expected = {name for name in names if name.startswith("blocks.1.")} | {"norm.weight"}
    copies = plan.mesh.num_ranks // (plan.mesh.dp_shard if plan.zero_stage else 1)
    found = on_ranks(frozen_plan, work)
    assert found == [(expected, copies * SPEC.num_parameters)] * plan.mesh.num_ranks


def apply_alone(plan: Plan):
    alone = Plan(train=plan.train)
    return apply(SPEC, RandomWeights(SPEC), alone, World(MeshConfig(), 0, CPU))


def test_a_freeze_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError) as caught:
        apply_alone(Plan(train=TrainConfig(freeze=("norm.*", "blocks.9.*"))))
    (problem,) = caught.value.problems
    assert (problem.path, problem.value) == ("train.freeze", "blocks.9.*")
    assert "names look like blocks.0.attention" in problem.hint


def test_an_unknown_stage_is_refused():
    with pytest.raises(UnknownNameError, match="unknown ZeRO stage '7'"):
        STAGES.load("7")
