"""What a checkpoint says beside its tensors, and what it refuses to go on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paceline.checkpoint.manifest import Progress, newest_checkpoint, read_manifest
from paceline.core.errors import UsageError
from paceline.dist.world import World
from paceline.models.hub import resolve
from paceline.models.weights import build
from paceline.plan.declared import declare_decoder
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import CheckpointConfig, OptimizerConfig, Plan, TrainConfig
from paceline.train.run import RunConfig, RunFolder
from paceline.train.trainer import Trainer

pytestmark = pytest.mark.cpu

PLAN = Plan(
    train=TrainConfig(sequence_length=16, tokens_per_step=64, seed=3),
    optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.2),
    checkpoint=CheckpointConfig(interval_steps=2),
)


def trainer(folder: Path, documents: Path, plan: Plan = PLAN, model: str = "llama") -> Trainer:
    source = resolve(f"random:{model}:tiny", seed=plan.train.seed)
    config = RunConfig(model=source.name, data=str(documents), steps=2)
    world = World(MeshConfig(), 0, torch.device("cpu"))
    return Trainer(source, config, plan, world, RunFolder(folder))


@pytest.fixture
def checkpoint(documents, tmp_path) -> Path:
    trainer(tmp_path, documents).run()
    return newest_checkpoint(tmp_path)


def test_a_checkpoint_says_how_far_the_run_has_come(checkpoint, documents, tmp_path):
    manifest = read_manifest(checkpoint)
    progress = manifest.progress
    assert manifest.format == 2
    assert progress is not None
    identity = trainer(tmp_path, documents).config.data_identity[0]
    assert {key: value for key, value in progress.cursor.items() if key != "order"} == {
        "steps": 2,
        "rows": 8,
        "tokens": 128,
    }
    assert progress.cursor["order"]["sources"] == [{"identity": identity, "weight": 1.0}]
    assert progress.cursor["order"]["seed"] == 3
    assert (progress.streams["seed"], progress.streams["step"]) == (3, 2)
    assert progress.scaler is None
    groups = progress.optimizer["groups"]
    assert progress.optimizer["name"] == "adamw"
    assert {group["weight_decay"] for group in groups} == {0.2, 0.0}
    assert all(group["betas"] == [0.9, 0.95] for group in groups)
    assert all(0 < group["lr"] <= 1e-2 for group in groups)


def test_tensors_say_what_they_are_made_of(documents, tmp_path):
    trainer(tmp_path, documents, model="mixtral").run()
    tensors = read_manifest(newest_checkpoint(tmp_path)).tensors
    for name in ("model.{}", "optimizer.{}.exp_avg", "optimizer.{}.exp_avg_sq"):
        gate = tensors[name.format("blocks.0.ffn.experts.gate")]
        assert gate.axes == ("experts", "hidden", "model")
        assert [piece.name for piece in gate.pieces] == [f"expert {n}" for n in range(8)]
        assert gate.pieces[3].box.offsets == (3, 0, 0)
        assert gate.pieces[3].box.sizes == (1, *gate.shape[1:])
        assert tensors[name.format("blocks.1.attention.key.weight")].axes == ("key heads", "model")
    counter = tensors["optimizer.blocks.0.ffn.experts.gate.step"]
    assert (counter.shape, counter.axes, counter.pieces) == ((), (), ())


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "qwen3", "gemma3", "pangu-moe"])
def test_every_parameter_of_a_family_is_declared_with_its_dimensions(family):
    spec = resolve(f"random:{family}:tiny").spec
    declared = declare_decoder(spec)
    shapes = {name: tuple(p.shape) for name, p in build(spec).named_parameters()}
    assert declared.keys() == shapes.keys()
    for name, shape in shapes.items():
        assert len(declared[name].axes) == len(shape), name
        for piece in declared[name].pieces:
            assert piece.box.meet(piece.box.of_whole(shape)) == piece.box, name
        if declared[name].pieces:
            assert (
                sum(p.box.num_elements for p in declared[name].pieces) == torch.Size(shape).numel()
            )


CHANGES = {
    "seed": {"seed": 4},
    "sequence_length": {"sequence_length": 32},
    "rows_per_step": {"tokens_per_step": 128},
    "pack": {"pack": False},
    "long_documents": {"long_documents": "drop"},
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_order_of_data_is_refused(checkpoint, documents, tmp_path, key):
    plan = replace(PLAN, train=replace(PLAN.train, **CHANGES[key]))
    other = trainer(tmp_path / "other", documents, plan)
    with pytest.raises(UsageError, match=rf"order of which {key} is .*, but now it is") as caught:
        other.restore(checkpoint)
    assert "[train] table" in caught.value.hint
    assert other.state.step == 0


def test_other_data_is_refused(checkpoint, documents, tmp_path):
    changed = tmp_path / "changed.jsonl"
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    changed.write_text("".join(json.dumps({"text": text + "!"}) + "\n" for text in texts))
    with pytest.raises(UsageError, match="order of which sources is"):
        trainer(tmp_path / "other", changed).restore(checkpoint)


def test_the_state_of_a_scaler_is_refused(checkpoint, documents, tmp_path):
    manifest = read_manifest(checkpoint)
    assert manifest.progress is not None
    progress = replace(manifest.progress, scaler={"scale": 1024.0})
    assert isinstance(progress, Progress)
    replace(manifest, progress=progress).commit(checkpoint)
    with pytest.raises(UsageError, match="has the state of a gradient scaler"):
        trainer(tmp_path / "other", documents).restore(checkpoint)
