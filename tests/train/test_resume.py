"""Resumed equals uninterrupted, bit for bit: weights, optimizer state and logged losses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.checkpoint.manifest import newest_checkpoint
from paceline.core.record import read_records
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.hub import resolve
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import (
    CheckpointConfig,
    OptimizerConfig,
    Plan,
    ScheduleConfig,
    TrainConfig,
    ZeroConfig,
)
from paceline.train.objective.next_token import next_token
from paceline.train.run import RunConfig, RunFolder
from paceline.train.trainer import Trainer

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

NUM_STEPS, SAVED_AT, BROKEN_AT = 8, 4, 6
CASES = {
    "one rank, adamw": (MeshConfig(), ZeroConfig(), "adamw"),
    "one rank, sgd": (MeshConfig(), ZeroConfig(), "sgd"),
    "dp_shard 2, adamw": (MeshConfig(dp_shard=2), ZeroConfig(), "adamw"),
    "dp_shard 2, stage 1, sgd": (MeshConfig(dp_shard=2), ZeroConfig(stage=1), "sgd"),
    "dp_shard 2, stage 2, adamw": (MeshConfig(dp_shard=2), ZeroConfig(stage=2), "adamw"),
    "dp_shard 2, own stage 3": (MeshConfig(dp_shard=2), ZeroConfig(sharder="own"), "adamw"),
    "dp_replicate 2, sgd": (MeshConfig(dp_replicate=2), ZeroConfig(), "sgd"),
}


class PowerCutError(Exception):
    pass


def plan_for(mesh: MeshConfig, zero: ZeroConfig, optimizer: str) -> Plan:
    return Plan(
        mesh=mesh,
        zero=zero,
        train=TrainConfig(
            sequence_length=32,
            tokens_per_step=32 * 8,
            microbatch_tokens=64,  # so that every rank accumulates
            freeze=("blocks.2.attention.*",),
        ),
        optimizer=OptimizerConfig(
            name=optimizer, lr=1e-2, schedule=ScheduleConfig(warmup_steps=2, kind="cosine")
        ),
        checkpoint=CheckpointConfig(interval_steps=SAVED_AT),
    )


def power_cut(at_call: int) -> Callable[..., torch.Tensor]:
    """The plain objective, until it is called for the n-th time."""
    calls = 0

    def objective(model: Any, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == at_call:
            raise PowerCutError
        return next_token(model, batch)

    return objective


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_has_the_same_bits(documents, tmp_path, case):
    mesh, zero, optimizer = CASES[case]
    plan = plan_for(mesh, zero, optimizer)
    source = resolve("random:llama:tiny")
    pairs = [{"prompt": "on " * (n % 4), "completion": "off " * (n % 3)} for n in range(25)]
    completions = tmp_path / "completions.jsonl"
    completions.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = RunConfig(
        model=source.name,
        data=(f"{documents}=3", f"{completions}=1"),
        steps=NUM_STEPS,
        eval_data=str(completions),
    )

    def run(rank: int) -> dict[str, Any]:
        world = World(mesh, rank, torch.device("cpu"))

        def trainer(folder: str, **options: Any) -> Trainer:
            return Trainer(source, config, plan, world, RunFolder(tmp_path / folder), **options)

        whole = trainer("whole")
        whole.run()

        num_microbatches = whole.loader.shape.num_microbatches
        assert num_microbatches > 1
        # In the middle of accumulation, so that gradients are left lying about.
        assert whole.held_out is not None
        num_evaluations = len(list(whole.held_out.batches(world.data_index)))
        calls = (BROKEN_AT - 1) * num_microbatches + num_evaluations  # the first is before step 1
        cut = trainer("cut", objective=power_cut(calls + 2))
        with pytest.raises(PowerCutError):
            cut.run()
        world.barrier()

        resumed = trainer("cut")
        untrained = copies(resumed)
        resumed.restore(newest_checkpoint(tmp_path / "cut"))
        assert resumed.state.step == SAVED_AT
        resumed.run()
        return {
            "different": differences(copies(whole), copies(resumed)),
            "moved": differences(copies(whole), untrained),
            "names": set(resumed.state.parts()),
        }

    found = [run(0)] if mesh.num_ranks == 1 else run_ranks(run, mesh.num_ranks)
    for rank, result in enumerate(found):
        assert result["different"] == set()
        frozen = {name for name in result["names"] if "blocks.2.attention." in name}
        assert result["moved"] == result["names"] - frozen
        assert any(name.startswith("optimizer.embedding.weight.") for name in result["names"])
        whole, cut = (losses(tmp_path / folder, rank) for folder in ("whole", "cut"))
        assert [step for step, _, _ in whole] == [1, 2, 3, 4, 5, 6, 7, 8]
        # Step 5 is there twice: as it was before the cut, and as it was taken again.
        assert cut == [*whole[:5], *whole[4:]]


def copies(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: part.local.clone() for name, part in trainer.state.parts().items()}


def differences(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> set[str]:
    assert ours.keys() == others.keys()
    return {name for name, value in ours.items() if not torch.equal(value, others[name])}


def losses(folder: Path, rank: int) -> list[tuple[int, float, float]]:
    records = read_records(RunFolder(folder).records(rank), "step")
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records]


def test_a_run_that_is_done_takes_no_more_steps(documents, tmp_path):
    plan = plan_for(MeshConfig(), ZeroConfig(), "adamw")
    source = resolve("random:llama:tiny")
    config = RunConfig(model=source.name, data=str(documents), steps=SAVED_AT)
    world = World(plan.mesh, 0, torch.device("cpu"))
    Trainer(source, config, plan, world, RunFolder(tmp_path)).run()
    again = Trainer(source, config, plan, world, RunFolder(tmp_path))
    again.restore(newest_checkpoint(tmp_path))
    assert again.run() is None
    assert len(losses(tmp_path, 0)) == SAVED_AT
