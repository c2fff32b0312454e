"""A decoder in a pipeline has, bit for bit, the gradients that one process adds up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paceline.data.batch import IGNORED, Batch
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.families.llama import PRESETS
from paceline.models.weights import RandomWeights
from paceline.optim import OPTIMIZERS
from paceline.parallel.apply import apply
from paceline.parallel.pipeline import SCHEDULES
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import PipelineConfig, Plan, PrecisionConfig, TrainConfig
from paceline.train.objective.next_token import next_token
from paceline.train.state import State
from paceline.train.step import compute_gradients

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

M, B, T = 6, 2, 11


def batches(vocab_size):
    """Micro-batches with unequal numbers of valid tokens."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for microbatch in range(M):
        tokens_BT = torch.randint(0, vocab_size, (B, T + 1), generator=generator)
        labels_BT = tokens_BT[:, 1:].clone()
        labels_BT[0, T - microbatch :] = IGNORED
        documents_BT = (torch.arange(T) > T // 2).long().expand(B, T)
        found.append(Batch(tokens_BT[:, :-1], labels_BT, documents_BT))
    return found


def gradients(plan, spec):
    """Every gradient that the ranks of a plan have, and the step's loss."""

    def run(rank):
        world = World(plan.mesh, rank, torch.device("cpu"))
        model = apply(spec, RandomWeights(spec, seed=3), plan, world)
        optimizer = OPTIMIZERS.load("sgd")(model.parameters(), plan.optimizer)
        state = State(model, optimizer)
        step = compute_gradients(state, batches(spec.vocab_size), next_token, world, max_norm=0.0)
        named = {name: part.gradient for name, part in model.parts.items()}
        return step.loss, {name: g.numpy() for name, g in named.items() if g is not None}

    return [run(0)] if plan.mesh.num_ranks == 1 else run_ranks(run, plan.mesh.num_ranks)


def plan_of(dtype, **pipeline):
    pp = pipeline.pop("pp", 1)
    return Plan(
        mesh=MeshConfig(pp=pp),
        pipeline=PipelineConfig(**pipeline),
        precision=PrecisionConfig(params=dtype, compute=dtype, reduce=dtype),
        train=TrainConfig(sequence_length=T),
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("pp", [2, 3])
def test_gradients_of_an_untied_model_are_the_same_bits(pp, name, dtype):
    per_rank = SCHEDULES.load(name).min_stages_per_rank
    spec = replace(PRESETS["tiny"], num_layers=pp * per_rank + 1, tied_embeddings=False)
    ((loss, expected),) = gradients(plan_of(dtype), spec)
    found = gradients(plan_of(dtype, pp=pp, schedule=name, stages_per_rank=per_rank), spec)
    named = {key: value for _, of_rank in found for key, value in of_rank.items()}
    assert named.keys() == expected.keys()
    assert {value for value, _ in found} == {loss}
    for key, value in expected.items():
        assert (named[key] == value).all(), key


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_tied_matrix_has_the_sum_of_both_ends(name):
    per_rank = SCHEDULES.load(name).min_stages_per_rank
    spec = replace(PRESETS["tiny"], num_layers=2 * per_rank, tied_embeddings=True)
    ((_, expected),) = gradients(plan_of("float64"), spec)
    found = gradients(plan_of("float64", pp=2, schedule=name, stages_per_rank=per_rank), spec)
    whole = expected["embedding.weight"]
    ends = [of_rank["embedding.weight"] for _, of_rank in found if "embedding.weight" in of_rank]
    assert len(ends) == (1 if SCHEDULES.load(name).placement == "v" else 2)
    for gradient in ends:
        assert abs(gradient - whole).max() <= 1e-12 * abs(whole).max()
        assert (gradient == ends[0]).all(), "both ends move their copies alike"
