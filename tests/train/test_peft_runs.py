"""Runs that train an adapter: what moves, what is saved, and that resumed is uninterrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.checkpoint.export import export_adapter
from paceline.checkpoint.manifest import newest_checkpoint, read_manifest
from paceline.core.errors import UsageError
from paceline.core.record import read_records
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.hub import resolve
from paceline.models.peft import PEFT
from paceline.models.peft.files import open_adapter
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import CheckpointConfig, OptimizerConfig, PeftConfig, Plan, TrainConfig
from paceline.train.run import RunConfig, RunFolder
from paceline.train.trainer import Trainer

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

NUM_STEPS, SAVED_AT = 4, 2
METHODS = [name for name in PEFT if name != "none"]
MESHES = {"one rank": MeshConfig(), "dp_shard 2": MeshConfig(dp_shard=2)}


def plan_for(mesh: MeshConfig, method: str) -> Plan:
    return Plan(
        mesh=mesh,
        train=TrainConfig(sequence_length=32, tokens_per_step=32 * 8, microbatch_tokens=64),
        peft=PeftConfig(method=method),
        optimizer=OptimizerConfig(lr=1e-2),
        checkpoint=CheckpointConfig(interval_steps=SAVED_AT),
    )


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        name: getattr(p, "_local_tensor", p).detach().clone()
        for name, p in trainer.state.model.module.named_parameters()
    }


def different(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> set[str]:
    assert left.keys() == right.keys()
    return {name for name, value in left.items() if not torch.equal(value, right[name])}


def losses(folder: Path, rank: int) -> list[tuple[int, float, float]]:
    records = read_records(RunFolder(folder).records(rank), "step")
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_resumed_run_has_the_same_bits_and_the_model_never_moves(
    documents, tmp_path, mesh, method
):
    plan = plan_for(MESHES[mesh], method)
    source = resolve("random:llama:tiny")

    def run(rank: int) -> dict[str, Any]:
        world = World(plan.mesh, rank, torch.device("cpu"))

        def trainer(folder: str, steps: int) -> Trainer:
            config = RunConfig(model=source.name, data=str(documents), steps=steps)
            return Trainer(source, config, plan, world, RunFolder(tmp_path / folder))

        whole = trainer("whole", NUM_STEPS)
        before = parameters(whole)
        whole.run()
        after = parameters(whole)
        half = trainer("half", NUM_STEPS)
        half.restore(tmp_path / "whole" / "checkpoints" / f"step-{SAVED_AT}")
        assert half.state.step == SAVED_AT
        half.run()
        return {
            "different": different(after, parameters(half)),
            "moved": different(before, after),
            "added": whole.state.model.added,
            "saved": set(whole.state.parts()),
        }

    found = [run(0)] if plan.mesh.num_ranks == 1 else run_ranks(run, plan.mesh.num_ranks)
    for rank, result in enumerate(found):
        assert result["different"] == set()
        assert result["moved"] <= result["added"]
        assert result["saved"] == {
            key
            for name in result["added"]
            for key in (
                f"model.{name}",
                *(f"optimizer.{name}.{part}" for part in ("exp_avg", "exp_avg_sq", "step")),
            )
        }
        assert losses(tmp_path / "half", rank) == losses(tmp_path / "whole", rank)[SAVED_AT:]
    moved = set.union(*(result["moved"] for result in found))
    assert moved == found[0]["added"]  # a rank may hold nothing of a small parameter
    manifest = read_manifest(newest_checkpoint(tmp_path / "whole"))
    assert manifest.tensors.keys() == found[0]["saved"]
    assert manifest.plan["peft"]["method"] == method
    export_adapter(newest_checkpoint(tmp_path / "whole"), source.name, tmp_path / "adapter")
    adapter = open_adapter(tmp_path / "adapter", source.spec)
    assert adapter.config.method == method
    assert adapter.tensors.keys() == found[0]["added"]


def test_a_run_on_two_ranks_goes_on_with_one(documents, tmp_path):
    """The adapter is re-laid; the model itself comes from MODEL again."""
    source = resolve("random:llama:tiny")
    config = RunConfig(model=source.name, data=str(documents), steps=SAVED_AT)

    def run(rank: int) -> None:
        plan = plan_for(MeshConfig(dp_shard=2), "lora")
        world = World(plan.mesh, rank, torch.device("cpu"))
        Trainer(source, config, plan, world, RunFolder(tmp_path)).run()

    run_ranks(run, 2)
    plan = plan_for(MeshConfig(), "lora")
    alone = Trainer(
        source, config, plan, World(plan.mesh, 0, torch.device("cpu")), RunFolder(tmp_path)
    )
    start = parameters(alone)
    alone.restore(newest_checkpoint(tmp_path))
    assert different(start, parameters(alone)) == alone.state.model.added


@pytest.mark.parametrize("method", ["lora", "none"])
def test_additions_to_a_model_that_has_changed_are_refused(documents, tmp_path, method):
    plan, folder = plan_for(MeshConfig(), method), RunFolder(tmp_path)
    world = World(plan.mesh, 0, torch.device("cpu"))
    before, after = (resolve("random:llama:tiny", seed=seed) for seed in (0, 1))
    config = RunConfig(model=before.name, data=str(documents), steps=SAVED_AT)
    trainer = Trainer(before, config, plan, world, folder)
    trainer.run()
    assert trainer.config.model_identity == before.identity
    resumed = Trainer(after, trainer.config, plan, world, folder)
    if method == "none":  # the checkpoint holds the whole model
        resumed.restore(newest_checkpoint(tmp_path))
        return
    with pytest.raises(UsageError, match="other weights than when the run began"):
        resumed.restore(newest_checkpoint(tmp_path))
