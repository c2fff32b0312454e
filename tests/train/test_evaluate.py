"""Held-out evaluation: the same number on every layout, and no trace in the run itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from paceline.checkpoint.manifest import newest_checkpoint, read_manifest
from paceline.core.errors import DataError, PacelineError
from paceline.core.record import read_records
from paceline.data.batch import IGNORED, Batch
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.hub import locate, resolve
from paceline.models.layout import Layout
from paceline.models.weights import RandomWeights
from paceline.parallel.apply import apply
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import CheckpointConfig, OptimizerConfig, Plan, TrainConfig
from paceline.train.evaluate import evaluate
from paceline.train.inputs import open_inputs
from paceline.train.objective.next_token import next_token
from paceline.train.run import RunConfig, RunFolder
from paceline.train.trainer import Trainer

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

STEPS, INTERVAL, LENGTH = 5, 2, 32
LAYOUTS = {
    "dp_shard 2": MeshConfig(dp_shard=2),
    "dp_replicate 2": MeshConfig(dp_replicate=2),
    "dp_shard 4": MeshConfig(dp_shard=4),
}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("held-out") / "chats.jsonl"
    chats = [
        [
            {"role": "user", "content": "x" * (n % 7)},
            {"role": "assistant", "content": "line " * (n % 5)},
        ]
        for n in range(12)
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


def plan_for(mesh: MeshConfig | None = None, **options: Any) -> Plan:
    sizes = {"sequence_length": LENGTH * 4, "tokens_per_step": LENGTH * 4 * 4}
    return Plan(
        mesh=mesh or MeshConfig(),
        train=TrainConfig(**sizes, eval_interval_steps=INTERVAL, **options),
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-4),
        checkpoint=CheckpointConfig(interval_steps=3),
    )


def train(plan: Plan, data: Path, folder: Path, eval_data: Path | None) -> list[dict[str, Any]]:
    """The evaluations and the losses of every rank."""
    source = resolve("random:llama:tiny")
    config = RunConfig(
        model=source.name,
        data=str(data),
        steps=STEPS,
        eval_data=str(eval_data) if eval_data else None,
    )

    def run(rank: int) -> dict[str, Any]:
        world = World(plan.mesh, rank, torch.device("cpu"))
        trainer = Trainer(source, config, plan, world, RunFolder(folder))
        names = set(trainer.state.parts())
        trainer.run()
        assert trainer.state.model.module.training
        assert set(trainer.state.parts()) == names
        (trained,) = {type(p) for p in trainer.state.model.module.parameters()}
        return {"parameters": trained.__name__}

    found = [run(0)] if plan.mesh.num_ranks == 1 else run_ranks(run, plan.mesh.num_ranks)
    for rank, result in enumerate(found):
        path = RunFolder(folder).records(rank)
        result["evals"] = list(read_records(path, "eval"))
        result["losses"] = [record["loss"] for record in read_records(path, "step")]
    return found


@pytest.fixture(scope="module")
def alone(documents, held_out, tmp_path_factory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        (found,) = train(plan_for(), documents, tmp_path_factory.mktemp("alone"), held_out)
        return found


def test_evaluations_are_before_between_and_after_the_steps(alone):
    assert [record["step"] for record in alone["evals"]] == [0, 2, 4, 5]
    for record in alone["evals"]:
        assert record.keys() == {"kind", "step", "loss", "perplexity", "tokens", "time_s"}
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
        assert record["time_s"] > 0
    # Of the chats the answers alone: content, in bytes, and an end.
    assert {record["tokens"] for record in alone["evals"]} == {
        sum(5 * (n % 5) + 1 for n in range(12))
    }
    losses = [record["loss"] for record in alone["evals"]]
    assert losses[0] == pytest.approx(math.log(259), abs=0.2)  # of a hundred tokens
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_finds_the_same(alone, documents, held_out, tmp_path, layout):
    found = train(plan_for(LAYOUTS[layout]), documents, tmp_path, held_out)
    for rank in found:
        assert len(rank["evals"]) == len(alone["evals"])
        for ours, expected in zip(rank["evals"], alone["evals"], strict=True):
            assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            assert (ours["step"], ours["tokens"]) == (expected["step"], expected["tokens"])
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert read_manifest(newest_checkpoint(tmp_path)).step == STEPS


def test_an_evaluation_leaves_no_trace_in_the_run(alone, documents, tmp_path):
    (without,) = train(plan_for(), documents, tmp_path, None)
    assert without["evals"] == []
    assert without["losses"] == alone["losses"]  # to the bit


def test_a_resumed_run_evaluates_the_same_rows(alone, documents, held_out, tmp_path):
    train(plan_for(), documents, tmp_path, held_out)
    source, plan = resolve("random:llama:tiny"), plan_for()
    config = RunConfig(model=source.name, data=str(documents), steps=STEPS, eval_data=str(held_out))
    world = World(plan.mesh, 0, torch.device("cpu"))
    resumed = Trainer(source, config, plan, world, RunFolder(tmp_path))
    resumed.restore(tmp_path / "checkpoints" / "step-3")
    resumed.run()
    evals = list(read_records(RunFolder(tmp_path).records(0), "eval"))
    found = [(record["step"], record["loss"]) for record in evals]
    expected = [(record["step"], record["loss"]) for record in alone["evals"]]
    assert found == [*expected, *expected[2:]]


def model_for(plan: Plan, world: World):
    spec = resolve("random:llama:tiny").spec
    return apply(spec, RandomWeights(spec), plan, world)


def test_every_token_weighs_the_same():
    world = World(MeshConfig(), 0, torch.device("cpu"))
    model = model_for(Plan(), world)
    tokens = torch.arange(24).view(2, 12)
    labels = tokens + 1
    labels[0, :10] = IGNORED
    documents = torch.zeros_like(tokens)
    batches = [Batch(tokens[i : i + 1], labels[i : i + 1], documents[i : i + 1]) for i in range(2)]
    result = evaluate(model, batches, next_token, world)
    with torch.no_grad():
        logits = model.module(tokens, Layout.of_documents(documents)).double()
        expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert result.tokens == 14
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected.item()), rel=1e-6)
    assert all(p.grad is None for p in model.module.parameters())


def test_what_gives_no_number_is_an_error():
    world = World(MeshConfig(), 0, torch.device("cpu"))
    model = model_for(Plan(), world)
    tokens = torch.ones(1, 4, dtype=torch.long)
    batch = Batch(tokens, torch.full_like(tokens, IGNORED), tokens)
    with pytest.raises(DataError, match="no valid token"):
        evaluate(model, [batch], next_token, world)
    with torch.no_grad():
        model.module.norm.weight[0] = math.nan
    with pytest.raises(PacelineError, match="the loss on held-out data is nan"):
        evaluate(model, [Batch(tokens, tokens, tokens)], next_token, world)


@pytest.mark.slow
def test_the_loss_on_chats_equals_that_of_transformers(tmp_path):
    """SmolLM2, in float32, its answers found by the text around them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = locate("smollm2-135m")
    pairs = [("What is the capital of France?", "Paris."), ("Say it twice: ha", "Ha ha \U0001f600")]
    chats = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        for asked, answer in pairs
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    source, plan = resolve("smollm2-135m"), Plan(train=TrainConfig(sequence_length=128))
    config = RunConfig(model=source.name, data=str(path), steps=1, eval_data=str(path))
    world = World(plan.mesh, 0, torch.device("cpu"))
    held_out = open_inputs(config, plan, source).held_out
    assert held_out is not None
    model = apply(source.spec, source.weights, plan, world)
    found = evaluate(model, held_out.batches(0), next_token, world)
    del model

    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for chat, (_, answer) in zip(chats, pairs, strict=True):
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        lead, rest = text.split("assistant\n" + answer)
        assert rest == "<|im_end|>\n"
        ids = tokenizer(text)["input_ids"]
        first = len(tokenizer(lead + "assistant\n")["input_ids"])
        labels = [IGNORED] * first + ids[first:-1] + [IGNORED]  # the last is the line's end
        with torch.no_grad():
            loss = reference(torch.tensor([ids]), labels=torch.tensor([labels])).loss
        total, count = total + loss.item() * (len(ids) - 1 - first), count + len(ids) - 1 - first
    assert found.tokens == count
    assert found.loss == pytest.approx(total / count, rel=1e-5)
