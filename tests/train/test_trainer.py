from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from paceline.checkpoint.manifest import complete_checkpoints
from paceline.core.errors import DataError, UsageError
from paceline.core.record import read_records
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.hub import ModelSource, resolve
from paceline.models.tokenizer import Tokenizer
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import (
    CheckpointConfig,
    OptimizerConfig,
    Plan,
    PrecisionConfig,
    ScheduleConfig,
    TrainConfig,
)
from paceline.train.records import StepRecord
from paceline.train.run import RunConfig, RunFolder
from paceline.train.trainer import Trainer, log_line

pytestmark = pytest.mark.cpu

LENGTH, SEQUENCES = 32, 8
CONTRACT_KEYS = {"step", "loss", "grad_norm", "tokens", "tokens_per_s", "time_s"}


def plan_with(**tables: Any) -> Plan:
    train = TrainConfig(sequence_length=LENGTH, tokens_per_step=LENGTH * SEQUENCES)
    optimizer = OptimizerConfig(lr=3e-3, schedule=ScheduleConfig(kind="constant"))
    return Plan(**{"train": train, "optimizer": optimizer, **tables})


def trainer_for(
    plan: Plan, documents: Path, folder: Path, *, steps: int, rank: int = 0, source: Any = None
) -> Trainer:
    source = source or resolve("random:llama:tiny")
    config = RunConfig(model=source.name, data=str(documents), steps=steps)
    world = World(plan.mesh, rank, torch.device("cpu"))
    return Trainer(source, config, plan, world, RunFolder(folder))


def records_of(folder: Path, kind: str, rank: int = 0) -> list[dict[str, Any]]:
    return list(read_records(RunFolder(folder).records(rank), kind))


def test_records_say_what_happened(documents, tmp_path, capsys):
    plan = plan_with(checkpoint=CheckpointConfig(interval_steps=2))
    last = trainer_for(plan, documents, tmp_path, steps=5).run()

    (run,) = records_of(tmp_path, "run")
    assert (run["model"], run["first_step"], run["num_steps"]) == ("random:llama:tiny", 1, 5)
    assert run["num_ranks"] == 1
    assert run["peak_flops"] > 1e8

    steps = records_of(tmp_path, "step")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    for step in steps:
        assert step.keys() >= CONTRACT_KEYS
        # A dense model has no statistics.
        assert step.keys() == {field.name for field in fields(StepRecord)} - {"statistics"} | {
            "kind"
        }
        assert step["tokens"] == LENGTH * SEQUENCES >= step["valid_tokens"] > 0
        assert step["time_s"] > 0
        assert step["tokens_per_s"] == pytest.approx(step["tokens"] / step["time_s"])
        assert step["memory_bytes"] > 1 << 26
        assert step["clip_factor"] == pytest.approx(min(1.0, 1.0 / step["grad_norm"]))
        assert step["learning_rate"] == 3e-3
        spec = resolve("random:llama:tiny").spec
        flops_per_s = spec.model_flops_per_token(LENGTH) * step["tokens_per_s"]
        assert step["peak_share"] == pytest.approx(flops_per_s / run["peak_flops"])
    assert last is not None
    assert last.to_dict() == steps[-1]

    saves = records_of(tmp_path, "save")
    assert [save["step"] for save in saves] == [2, 4, 5]  # each interval, and the end
    checkpoints = complete_checkpoints(tmp_path / "checkpoints")
    assert [str(path) for path in checkpoints] == [save["path"] for save in saves]

    shown, printed = capsys.readouterr()
    assert shown == ""  # stdout is for results
    assert printed.count("step ") == 5
    assert printed.count("saved ") == 3


def test_the_loss_falls(documents, tmp_path):
    trainer_for(plan_with(), documents, tmp_path, steps=15).run()
    losses = [step["loss"] for step in records_of(tmp_path, "step")]
    assert losses[0] == pytest.approx(5.55, abs=0.1)  # log 259
    assert losses[-1] < losses[0] - 1


@pytest.mark.ranks
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(dp_shard=2)], ids=["1", "dp_shard 2"])
def test_bfloat16_trains_with_float32_state(documents, tmp_path, mesh):
    plan = plan_with(mesh=mesh, precision=PrecisionConfig(compute="bfloat16"))

    def run(rank: int) -> dict[str, Any]:
        trainer = trainer_for(plan, documents, tmp_path, steps=15, rank=rank)
        seen = []
        module = trainer.state.model.module
        module.blocks[1].register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
        module.norm.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
        trainer.run()
        tensors = [part.tensor for part in trainer.state.parts().values()]
        return {
            "activations": {str(dtype) for dtype in seen},
            "state": {str(tensor.dtype) for tensor in tensors},
            "split": {isinstance(p, DTensor) for p in module.parameters()},
        }

    found = [run(0)] if mesh.num_ranks == 1 else run_ranks(run, mesh.num_ranks)
    for rank, result in enumerate(found):
        assert result["activations"] == {"torch.bfloat16"}
        assert result["state"] == {"torch.float32"}
        assert result["split"] == {mesh.dp_shard > 1}
        losses = [step["loss"] for step in records_of(tmp_path, "step", rank)]
        assert losses[-1] < losses[0] - 1


def test_bfloat16_stays_near_float32(documents, tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        plan = plan_with(precision=PrecisionConfig(compute=dtype))
        trainer_for(plan, documents, tmp_path / dtype, steps=5).run()
        losses[dtype] = [step["loss"] for step in records_of(tmp_path / dtype, "step")]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=2e-2)


@pytest.mark.ranks
def test_every_rank_writes_its_own_records(documents, tmp_path):
    plan = plan_with(mesh=MeshConfig(dp_replicate=2))
    run_ranks(
        lambda rank: (trainer_for(plan, documents, tmp_path, steps=2, rank=rank).run(), None)[1], 2
    )
    first, second = (records_of(tmp_path, "step", rank) for rank in range(2))
    assert [r["loss"] for r in first] == [r["loss"] for r in second]
    assert [r["tokens"] for r in first] == [LENGTH * SEQUENCES] * 2
    assert records_of(tmp_path, "run", 1)[0]["num_ranks"] == 2


def test_a_tokenizer_without_an_end_is_refused(documents, tmp_path):
    source = resolve("random:llama:tiny")
    endless = Tokenizer(source.tokenizer.backend, eos_ids=[])
    source = ModelSource("endless", source.spec, source.weights, endless, source.files)
    with pytest.raises(UsageError, match="endless: its tokenizer has no token that ends a text"):
        trainer_for(plan_with(), documents, tmp_path, steps=1, source=source)


def test_too_little_data_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(UsageError, match=r"short\.txt has 6 tokens"):
        trainer_for(plan_with(), tmp_path / "short.txt", tmp_path, steps=1)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="holds no text"):
        trainer_for(plan_with(), tmp_path / "empty.txt", tmp_path, steps=1)


def test_a_log_line_says_all_that_a_person_wants_to_know():
    record = StepRecord(
        step=7,
        loss=3.14159,
        grad_norm=0.5,
        clip_factor=1.0,
        learning_rate=1e-3,
        tokens=4096,
        valid_tokens=4000,
        tokens_per_s=1234.5,
        time_s=2.0,
        peak_share=0.456,
        memory_bytes=3 << 29,
    )
    assert log_line(record, 100) == (
        "step 7/100  loss 3.1416  norm 0.500  1,234 tokens/s  46% of peak  1.50 GiB  eta 0:03:06"
    )
    with_experts = replace(record, statistics={"expert_load": 1.25})
    assert "norm 0.500  expert load 1.250  1,234 tokens/s" in log_line(with_experts, 100)
    assert with_experts.to_dict() == record.to_dict() | {"expert_load": 1.25}
