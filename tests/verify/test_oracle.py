"""The oracle's formulas against torch's own loss, clip and optimizers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from paceline.data.batch import IGNORED, Batch
from paceline.data.loader import Loader
from paceline.data.store import TokenStore
from paceline.models.decoder import Decoder
from paceline.models.layout import Layout
from paceline.models.weights import RandomWeights, build, fill
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import (
    OptimizerConfig,
    PipelineConfig,
    Plan,
    ScheduleConfig,
    TrainConfig,
)
from paceline.verify.oracle import run_oracle

pytestmark = pytest.mark.cpu

NUM_STEPS = 5
SPEC = ModelSpec(
    family="llama",
    vocab_size=31,
    d_model=12,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=4,
    d_ffn=20,
    max_positions=32,
    tied_embeddings=True,
    qkv_bias=True,
    output_bias=True,
)


def plan_for(name: str, clip_norm: float) -> Plan:
    return Plan(
        train=TrainConfig(sequence_length=8, tokens_per_step=48, pack=False),
        pipeline=PipelineConfig(num_microbatches=3),
        optimizer=OptimizerConfig(
            name=name,
            lr=0.02,
            betas=(0.8, 0.9),
            eps=1e-5,
            weight_decay=0.3,
            clip_norm=clip_norm,
            schedule=ScheduleConfig(kind="linear", warmup_steps=2, final_fraction=0.0),
        ),
    )


@pytest.fixture(scope="module")
def store() -> TokenStore:
    generator = np.random.default_rng(5)
    lengths = generator.integers(2, 14, size=40)
    tokens = generator.integers(0, SPEC.vocab_size, size=int(lengths.sum()))
    return TokenStore(tokens.astype(np.uint32), np.cumsum(lengths))


def model() -> Decoder:
    decoder = build(SPEC, torch.float64)
    fill(decoder, RandomWeights(SPEC, seed=1), torch.device("cpu"))
    decoder.blocks[0].attention.key.requires_grad_(False)
    return decoder


def torch_optimizer(decoder: Decoder, config: OptimizerConfig) -> torch.optim.Optimizer:
    trained = [p for p in decoder.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.betas[0])
    return torch.optim.AdamW(groups, betas=config.betas[:2], eps=config.eps)


RATES = [0.01, 0.02, 0.02 * 2 / 3, 0.02 / 3, 0.0]  # by hand: two steps of warm-up, then to 0


def sum_of_losses(decoder: Decoder, batch: Batch) -> torch.Tensor:
    logits_BTV = decoder(batch.tokens_BT, Layout.of_documents(batch.documents_BT))
    labels = batch.labels_BT.flatten()
    return functional.cross_entropy(
        logits_BTV.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum"
    )


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("clip_norm", [0.05, 0.0])
def test_the_oracle_trains_as_torch_does(store, name, clip_norm):
    plan = plan_for(name, clip_norm)
    found = run_oracle(model(), Loader(store, plan, end_token=0), plan, NUM_STEPS)

    reference, loader = model(), Loader(store, plan, end_token=0)
    optimizer = torch_optimizer(reference, plan.optimizer)
    for step, result in enumerate(found, start=1):
        batches = loader.microbatches(step, 0)
        assert len(batches) == 3
        count = sum(int((batch.labels_BT != IGNORED).sum()) for batch in batches)
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            loss = sum_of_losses(reference, batch)
            (loss / count).backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip_norm or 1e9)
        factor = min(1.0, clip_norm / float(norm)) if clip_norm else 1.0
        assert (factor < 1) == bool(clip_norm)
        assert result.valid_tokens == count
        assert result.loss == pytest.approx(float(total) / count, rel=1e-13)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-13)
        assert result.clip_factor == pytest.approx(factor, rel=1e-13)
        trained = {n: p for n, p in reference.named_parameters() if p.requires_grad}
        assert result.gradients.keys() == trained.keys()
        for parameter_name, parameter in trained.items():
            assert parameter.grad is not None
            # torch adds 1e-6 to the norm that it clips by.
            bound = 1e-4 if clip_norm else 1e-12
            assert_close(result.gradients[parameter_name], parameter.grad, bound)
            parameter.grad = result.gradients[parameter_name].clone()
        for group in optimizer.param_groups:
            group["lr"] = RATES[step - 1]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            after = sum(sum_of_losses(reference, batch) for batch in batches)
        assert result.loss_after == pytest.approx(float(after) / count, rel=1e-13)
        assert result.weights.keys() == {n for n, _ in reference.named_parameters()}
        for parameter_name, parameter in reference.named_parameters():
            assert_close(result.weights[parameter_name], parameter, 1e-14)


@torch.no_grad()
def assert_close(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    assert float((found - expected).abs().max()) <= bound * float(expected.abs().max())


def test_frozen_weights_stay_and_trained_ones_move(store):
    plan = plan_for("adamw", 0.0)
    decoder = model()
    start = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    found = run_oracle(decoder, Loader(store, plan, end_token=0), plan, 2)
    for name, value in start.items():
        is_frozen = name.startswith("blocks.0.attention.key.")
        assert torch.equal(found[1].weights[name], value) == is_frozen, name
        assert (name in found[1].gradients) != is_frozen
    # Each step keeps its own copy.
    assert not torch.equal(found[0].weights["norm.weight"], found[1].weights["norm.weight"])
