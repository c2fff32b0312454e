"""Every layout trains the same model: 20 steps through the real trainer, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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
    ZeroConfig,
)
from paceline.train.run import RunConfig, RunFolder
from paceline.train.trainer import Trainer
from wholes import whole_weights

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

NUM_STEPS, NUM_MICROBATCHES, LENGTH, SEQUENCES = 20, 3, 24, 36
FROZEN = "blocks.1."
ALONE = (MeshConfig(), ZeroConfig())
LAYOUTS = {
    "dp_shard 2": (MeshConfig(dp_shard=2), ZeroConfig()),
    "dp_shard 3": (MeshConfig(dp_shard=3), ZeroConfig()),
    "dp_shard 2, stage 0": (MeshConfig(dp_shard=2), ZeroConfig(stage=0)),
    "dp_shard 2, stage 1": (MeshConfig(dp_shard=2), ZeroConfig(stage=1)),
    "dp_shard 2, stage 2": (MeshConfig(dp_shard=2), ZeroConfig(stage=2)),
    "dp_shard 2, own stage 3": (MeshConfig(dp_shard=2), ZeroConfig(sharder="own")),
    "dp_replicate 2": (MeshConfig(dp_replicate=2), ZeroConfig()),
    "dp_replicate 2 x dp_shard 2": (MeshConfig(dp_replicate=2, dp_shard=2), ZeroConfig()),
}


def plan_of(mesh: MeshConfig, zero: ZeroConfig) -> Plan:
    return Plan(
        mesh=mesh,
        zero=zero,
        train=TrainConfig(
            sequence_length=LENGTH,
            tokens_per_step=LENGTH * SEQUENCES,
            pack=False,
            freeze=(f"{FROZEN}*",),
        ),
        pipeline=PipelineConfig(num_microbatches=NUM_MICROBATCHES),
        # A small eps amplifies rounding where gradients vanish.
        optimizer=OptimizerConfig(
            lr=3e-3, eps=1e-4, clip_norm=0.5, schedule=ScheduleConfig(warmup_steps=3)
        ),
        checkpoint=CheckpointConfig(interval_steps=1000),
    )


def train(plan: Plan, documents: Path, folder: Path) -> dict[str, Any]:
    """Trains on the plan's ranks; what the first of them has seen."""
    source = resolve("random:llama:tiny", seed=plan.train.seed)
    require(plan, source.spec, num_ranks=plan.mesh.num_ranks)
    config = RunConfig(model=source.name, data=str(documents), steps=NUM_STEPS)

    def run(rank: int) -> dict[str, Any]:
        world = World(plan.mesh, rank, torch.device("cpu"))
        trainer = Trainer(source, config, plan, world, RunFolder(folder))
        batches = [
            trainer.loader.microbatches(step, index)
            for step in range(1, NUM_STEPS + 1)
            for index in range(plan.mesh.num_data_ranks)
        ]
        start, last = weights_of(trainer), trainer.run()
        return {
            "start": start,
            "weights": weights_of(trainer),
            "microbatches": {len(rank_batches) for rank_batches in batches},
            "counts": [sum(batch.count for batch in rank_batches) for rank_batches in batches],
            "last_step": last.step if last else None,
        }

    found = [run(0)] if plan.mesh.num_ranks == 1 else run_ranks(run, plan.mesh.num_ranks)
    for rank, other in enumerate(found):
        other["steps"] = list(read_records(RunFolder(folder).records(rank), "step"))
    return {"ranks": found, **found[0]}


def weights_of(trainer: Trainer) -> dict[str, np.ndarray]:
    return whole_weights(trainer.state.model.parts, trainer.world)


@pytest.fixture(scope="module")
def alone(documents, tmp_path_factory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return train(plan_of(*ALONE), documents, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_as_one_rank_does(alone, documents, tmp_path, layout):
    found = train(plan_of(*LAYOUTS[layout]), documents, tmp_path)

    assert len(alone["steps"]) == len(found["steps"]) == NUM_STEPS == found["last_step"]
    for step, expected in zip(found["steps"], alone["steps"], strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert step["clip_factor"] == pytest.approx(expected["clip_factor"], rel=1e-5)
        for key in ("step", "learning_rate", "tokens", "valid_tokens"):
            assert step[key] == expected[key]

    assert found["weights"].keys() == alone["weights"].keys()
    for name, expected in alone["weights"].items():
        error = np.linalg.norm(found["weights"][name] - expected) / np.linalg.norm(expected)
        assert error <= 1e-5, (name, error)
        is_frozen = name.startswith(FROZEN)
        assert np.array_equal(found["weights"][name], found["start"][name]) == is_frozen, name

    # All ranks have come to the same.
    for other in found["ranks"]:
        for name, value in found["weights"].items():
            assert np.array_equal(other["weights"][name], value), name
        for mine, theirs in zip(found["steps"], other["steps"], strict=True):
            assert mine["loss"] == theirs["loss"]
            assert mine["clip_factor"] == theirs["clip_factor"]

    # The hard cases were in play.
    assert found["microbatches"] == {NUM_MICROBATCHES}
    num_ranks = len(found["ranks"])
    per_step = [
        found["counts"][i : i + num_ranks] for i in range(0, len(found["counts"]), num_ranks)
    ]
    assert all(len(set(counts)) > 1 for counts in per_step)
    assert [sum(counts) for counts in per_step] == [step["valid_tokens"] for step in found["steps"]]


def test_the_run_that_layouts_are_compared_with_is_a_hard_one(alone):
    steps = alone["steps"]
    assert all(step["clip_factor"] < 1 for step in steps)
    assert all(step["valid_tokens"] < step["tokens"] == LENGTH * SEQUENCES for step in steps)
    assert len({step["valid_tokens"] for step in steps}) > 10
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert "head.weight" not in alone["weights"]  # tied
    assert not np.array_equal(
        alone["weights"]["embedding.weight"], alone["start"]["embedding.weight"]
    )
    assert any(name.startswith(FROZEN) for name in alone["weights"])
