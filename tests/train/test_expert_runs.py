"""Runs whose experts are on several ranks: they learn, count, save and resume as one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.checkpoint.load import load_whole
from paceline.checkpoint.manifest import newest_checkpoint
from paceline.core.record import read_records
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.hub import resolve
from paceline.plan.check import require
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import (
    CheckpointConfig,
    ExpertConfig,
    OptimizerConfig,
    Plan,
    PrecisionConfig,
    TrainConfig,
    ZeroConfig,
)
from paceline.train.run import RunConfig, RunFolder
from paceline.train.trainer import Trainer

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

NUM_STEPS, SAVED_AT, LENGTH, SEQUENCES = 6, 3, 23, 12
BOUND = 1e-9  # float64 and six steps: a token near a tie is not sent elsewhere
MODELS = {"mixtral": (MeshConfig(dp_shard=2, ep=2), 2), "pangu-moe": (MeshConfig(tp=2, ep=2), None)}
"""Family to the ranks that share out its experts, and their ZeRO stage."""


def plan_of(mesh: MeshConfig, stage: Any = None) -> Plan:
    return Plan(
        mesh=mesh,
        zero=ZeroConfig(stage=stage),
        expert=ExpertConfig(balance_loss_weight=0.1),
        precision=PrecisionConfig(params="float64", compute="float64", reduce="float64"),
        train=TrainConfig(
            sequence_length=LENGTH,
            tokens_per_step=LENGTH * SEQUENCES,
            microbatch_tokens=2 * LENGTH,
            eval_interval_steps=SAVED_AT,
            eval_tokens=7 * LENGTH,
        ),
        optimizer=OptimizerConfig(lr=3e-3, eps=1e-4, clip_norm=0.5),
        checkpoint=CheckpointConfig(interval_steps=SAVED_AT),
    )


def train(name: str, plan: Plan, documents: Path, folder: Path, start: Path | None = None) -> None:
    """Trains a tiny model of a family, from a checkpoint if there is one."""
    source = resolve(f"random:{name}:tiny")
    require(plan, source.spec, num_ranks=plan.mesh.num_ranks)
    config = RunConfig(
        model=source.name, data=str(documents), steps=NUM_STEPS, eval_data=str(documents)
    )

    def run(rank: int) -> None:
        world = World(plan.mesh, rank, torch.device("cpu"))
        trainer = Trainer(source, config, plan, world, RunFolder(folder))
        if start is not None:
            trainer.restore(start)
        trainer.run()

    if plan.mesh.num_ranks == 1:
        run(0)
    else:
        run_ranks(run, plan.mesh.num_ranks)


def steps_of(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return list(read_records(RunFolder(folder).records(rank), "step"))


def distances(folder: Path, other: Path) -> dict[str, float]:
    """Of the parameters and moments of two runs' last checkpoints, relative."""
    found, expected = (load_whole(newest_checkpoint(run), "") for run in (folder, other))
    assert found.keys() == expected.keys()
    assert any(".experts." in name for name in found)
    named = {name: value.double() for name, value in expected.items() if value.ndim}
    return {
        name: float((found[name].double() - value).norm() / value.norm().clamp(min=1e-12))
        for name, value in named.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_shared_out_experts_train_as_whole_ones_and_go_on_whole(name, documents, tmp_path):
    alone, spread, after = tmp_path / "alone", tmp_path / "spread", tmp_path / "after"
    train(name, plan_of(MeshConfig()), documents, alone)
    train(name, plan_of(*MODELS[name]), documents, spread)
    for rank in range(2):
        for step, expected in zip(steps_of(spread, rank), steps_of(alone), strict=True):
            for key in ("loss", "grad_norm", "balance_loss", "expert_load"):
                assert step[key] == pytest.approx(expected[key], rel=BOUND), key
    evaluations = [
        [record["loss"] for record in read_records(RunFolder(run).records(0), "eval")]
        for run in (spread, alone)
    ]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=BOUND)
    assert max(distances(spread, alone).values()) <= 1e-6

    halfway = spread / "checkpoints" / f"step-{SAVED_AT}"
    train(name, plan_of(MeshConfig()), documents, after, halfway)
    assert [step["loss"] for step in steps_of(after)] == pytest.approx(
        [step["loss"] for step in steps_of(alone)[SAVED_AT:]], rel=BOUND
    )
    assert max(distances(after, alone).values()) <= 1e-6


def test_a_dense_model_has_no_statistics_of_experts(documents, tmp_path):
    plan = plan_of(MeshConfig()).with_overrides(["expert.balance_loss_weight=0.0"])
    train("llama", plan, documents, tmp_path)
    assert not {"expert_load", "balance_loss"} & steps_of(tmp_path)[0].keys()
    train("mixtral", plan, documents, tmp_path / "mixtral")
    steps = steps_of(tmp_path / "mixtral")
    assert all(1 <= step["expert_load"] <= 8 for step in steps)
    assert "balance_loss" not in steps[0]  # nothing asks for one
