"""A real model, SmolLM2-135M-Instruct, learns a small task with every method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from paceline.checkpoint.export import export_adapter
from paceline.checkpoint.manifest import newest_checkpoint
from paceline.data.loader import Loader
from paceline.dist.world import World
from paceline.models.hub import ModelSource, resolve
from paceline.models.peft.files import open_adapter
from paceline.models.weights import build, fill
from paceline.plan.plan import OptimizerConfig, PeftConfig, Plan, ScheduleConfig, TrainConfig
from paceline.train.objective.next_token import next_token
from paceline.train.run import RunConfig, RunFolder
from paceline.train.trainer import Trainer

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

NUM_STEPS = 12
RATES = {
    "lora": 1e-3,
    "dora": 1e-3,
    "ia3": 2e-2,
    "bottleneck": 1e-3,
    "prompt": 5e-2,
    "prefix": 2e-2,
}
PLACES = ["Arl", "Bem", "Cor", "Dun", "Esk", "Fal", "Gor", "Hul", "Ist", "Jor", "Kel", "Lun"]
ENDS = ["ovia", "mark", "land", "stan", "onia", "burg"]


def facts(first: int, count: int) -> list[str]:
    """Sentences of one form; no two say the same."""
    names = [place + end for end in ENDS for place in PLACES]
    return [
        f"{names[n]}: its capital is {names[-n][:4]}ton, its river is the {names[n][:3]}a, "
        f"and it has {n} ships."
        for n in range(first, first + count)
    ]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return resolve("smollm2-135m")


@torch.no_grad()
def loss_on(trainer: Trainer, loader: Loader) -> float:
    (batch,) = loader.microbatches(1, 0)
    return float(next_token(trainer.state.model.module, batch)) / batch.count


@torch.no_grad()
def plain_loss(source: ModelSource, loader: Loader) -> float:
    """Of the model without anything added: virtual tokens begin by making it worse."""
    model = build(source.spec)
    fill(model, source.weights, torch.device("cpu"))
    (batch,) = loader.microbatches(1, 0)
    return float(next_token(model, batch)) / batch.count


@pytest.mark.parametrize("method", RATES)
def test_the_loss_on_other_facts_falls(source, tmp_path, method):
    plan = Plan(
        train=TrainConfig(sequence_length=48, tokens_per_step=4 * 48),
        peft=PeftConfig(method=method),
        optimizer=OptimizerConfig(
            lr=RATES[method], weight_decay=0.0, schedule=ScheduleConfig(kind="constant")
        ),
    )
    world = World(plan.mesh, 0, torch.device("cpu"))
    data = write(tmp_path / "train.jsonl", facts(0, 48))
    config = RunConfig(model=source.name, data=str(data), steps=NUM_STEPS)
    trainer = Trainer(source, config, plan, world, RunFolder(tmp_path / "run"))
    other = RunConfig(
        model=source.name, data=str(write(tmp_path / "held.jsonl", facts(48, 20))), steps=1
    )
    held_out = Trainer(source, other, plan, world, RunFolder(tmp_path / "other")).loader
    before = loss_on(trainer, held_out)
    trainer.run()
    after = loss_on(trainer, held_out)
    assert after < min(before, plain_loss(source, held_out)) - 0.5

    module, added = trainer.state.model.module, trainer.state.model.added
    for name, parameter in module.named_parameters():
        if name not in added:
            assert torch.equal(parameter, source.weights.read(name)), name

    export_adapter(newest_checkpoint(tmp_path / "run"), source.name, tmp_path / "adapter")
    adapter = open_adapter(tmp_path / "adapter", source.spec)
    for name in added:
        assert torch.equal(adapter.read(name), module.get_parameter(name)), name
