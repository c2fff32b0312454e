"""Runs of a model that is spread over ranks: they learn, evaluate, save and resume as one rank."""

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
    OptimizerConfig,
    PipelineConfig,
    Plan,
    ScheduleConfig,
    TrainConfig,
)
from paceline.train.run import RunConfig, RunFolder
from paceline.train.trainer import Trainer

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

NUM_STEPS, SAVED_AT, LENGTH, SEQUENCES = 12, 6, 23, 12
LAYOUTS = {
    "tp 2": (MeshConfig(tp=2), PipelineConfig()),
    "tp 4": (MeshConfig(tp=4), PipelineConfig()),
    "pp 2": (MeshConfig(pp=2), PipelineConfig()),
    "pp 2, zero-bubble": (MeshConfig(pp=2), PipelineConfig(schedule="zero-bubble")),
    "pp 2, words spread": (
        MeshConfig(pp=2),
        PipelineConfig(schedule="zero-bubble", vocabulary="spread"),
    ),
    "pp 2 x tp 2 x dp_replicate 2": (
        MeshConfig(pp=2, tp=2, dp_replicate=2),
        PipelineConfig(schedule="one-f-one-b"),
    ),
    "tp 2 x dp_shard 2": (MeshConfig(tp=2, dp_shard=2), PipelineConfig()),
    "cp 2": (MeshConfig(cp=2), PipelineConfig()),
    "pp 2 x cp 2": (MeshConfig(pp=2, cp=2), PipelineConfig()),
}


def plan_of(mesh: MeshConfig, pipeline: PipelineConfig) -> Plan:
    return Plan(
        mesh=mesh,
        pipeline=pipeline,
        train=TrainConfig(
            sequence_length=LENGTH,
            tokens_per_step=LENGTH * SEQUENCES,
            microbatch_tokens=2 * LENGTH,
            freeze=("blocks.1.ffn.*",),
            eval_interval_steps=SAVED_AT,
            eval_tokens=7 * LENGTH,
        ),
        # A small eps amplifies rounding where gradients vanish.
        optimizer=OptimizerConfig(
            lr=3e-3, eps=1e-4, clip_norm=0.5, schedule=ScheduleConfig(warmup_steps=3)
        ),
        checkpoint=CheckpointConfig(interval_steps=SAVED_AT),
    )


def train(plan: Plan, documents: Path, folder: Path, *, resumes: bool = False) -> None:
    source = resolve("random:llama:tiny", seed=plan.train.seed)
    require(plan, source.spec, num_ranks=plan.mesh.num_ranks)
    config = RunConfig(
        model=source.name, data=str(documents), steps=NUM_STEPS, eval_data=str(documents)
    )

    def run(rank: int) -> None:
        world = World(plan.mesh, rank, torch.device("cpu"))
        trainer = Trainer(source, config, plan, world, RunFolder(folder))
        if resumes:
            trainer.restore(folder / "checkpoints" / f"step-{SAVED_AT}")
        trainer.run()

    if plan.mesh.num_ranks == 1:
        run(0)
    else:
        run_ranks(run, plan.mesh.num_ranks)


def outcome(folder: Path) -> dict[str, Any]:
    records = RunFolder(folder).records(0)
    return {
        "steps": list(read_records(records, "step")),
        "evaluations": [record["loss"] for record in read_records(records, "eval")],
        "whole": load_whole(newest_checkpoint(folder), ""),
    }


@pytest.fixture(scope="module")
def alone(documents, tmp_path_factory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("alone")
        train(plan_of(MeshConfig(), PipelineConfig()), documents, folder)
        return outcome(folder)


SLOW = ("tp 4", "pp 2 x tp 2 x dp_replicate 2")  # more ranks than most machines have cores


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS],
)
def test_a_spread_model_trains_as_a_whole_one(alone, documents, tmp_path, layout):
    plan = plan_of(*LAYOUTS[layout])
    train(plan, documents, tmp_path / "run")
    found = outcome(tmp_path / "run")

    assert len(found["steps"]) == NUM_STEPS
    for step, expected in zip(found["steps"], alone["steps"], strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert found["evaluations"] == pytest.approx(alone["evaluations"], rel=1e-6)
    assert found["whole"].keys() == alone["whole"].keys()
    for name, expected in alone["whole"].items():
        if name.startswith("model."):
            error = (found["whole"][name] - expected).norm() / expected.norm()
            assert error <= 1e-5, name

    train(plan, documents, tmp_path / "run", resumes=True)
    again = outcome(tmp_path / "run")
    assert [step["loss"] for step in again["steps"][NUM_STEPS:]] == [
        step["loss"] for step in found["steps"][SAVED_AT:]
    ]
    for name, value in found["whole"].items():
        assert torch.equal(again["whole"][name], value), name
