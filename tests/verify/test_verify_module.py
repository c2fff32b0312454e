"""Certification of users' modules: what is right passes, what is wrong is seen."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import paceline as pl
from paceline.core.errors import ConfigError, UsageError
from paceline.parallel import module as parallel_module
from paceline.verify import module as verify_module
from paceline.verify.certify import BOUND

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "llama, tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3-moe": transformers.Qwen3MoeConfig(
        **SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=61,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.1,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
PLANS = {
    "replicas": {"mesh": {"dp_replicate": 2}},
    "shards": {"mesh": {"dp_shard": 2}},
    "both": {"mesh": {"dp_shard": 2, "dp_replicate": 2}},
}


def hugging_face(name: str) -> nn.Module:
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name])


class Recurrent(nn.Module):
    """A module that is no transformer, with no list of blocks and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 8)
        self.cell = nn.GRU(8, 8, batch_first=True)
        self.twice = nn.Linear(8, 8)

    def forward(self, tokens_BT):
        x_BTD, _ = self.cell(self.embedding(tokens_BT))
        return self.twice(torch.tanh(self.twice(x_BTD))) @ self.embedding.weight.T


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", CONFIGS)
def test_hugging_face_models_are_certified(model, plan):
    module = hugging_face(model)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    certificate = pl.verify(module, pl.Plan.from_dict(PLANS[plan]))
    assert certificate.certified, certificate.worst
    assert certificate.per_parameter.keys() == dict(module.named_parameters()).keys()
    largest = max(e["gradient"] for e in certificate.per_parameter.values())
    assert 0 < largest == certificate.max_rel_grad_error <= BOUND
    # The module itself is left as it was.
    assert all(torch.equal(before[name], v) for name, v in module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("plan", ["replicas", "shards"])
def test_other_modules_are_certified(plan):
    for module in (Recurrent(), pl.load("random:gemma3:tiny", dtype="float32").model):
        certificate = pl.verify(module, pl.Plan.from_dict(PLANS[plan]))
        assert certificate.certified, certificate.worst


class Sparse(nn.Module):
    """What a pass reaches depends on its tokens; one parameter is never reached."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.unused = nn.Parameter(torch.ones(8))

    def forward(self, tokens_BT):
        chosen = int(tokens_BT[0, 0]) % 3
        x_BTD = self.embedding(tokens_BT)
        return (x_BTD + self.experts[chosen](x_BTD)) @ self.embedding.weight.T


def test_passes_that_reach_other_parameters(recwarn):
    certificate = pl.verify(Sparse(), pl.Plan.from_dict(PLANS["replicas"]))
    assert certificate.certified, certificate.worst
    assert certificate.per_parameter["unused"] == {"gradient": 0.0, "weight": 0.0}
    assert len(recwarn) == 0


def test_a_parameter_that_no_pass_reaches():
    module = hugging_face("llama, tied")
    module.register_parameter("unused", nn.Parameter(torch.ones(3)))
    for plan in ("replicas", "shards"):
        certificate = pl.verify(module, pl.Plan.from_dict(PLANS[plan]))
        assert certificate.certified, certificate.worst


def test_one_process_is_itself():
    certificate = pl.verify(hugging_face("llama, tied"))
    assert certificate.certified
    assert certificate.max_rel_grad_error == certificate.max_rel_param_error == 0.0


class Summing(DistributedDataParallel):
    """Gradients summed where they should be averaged."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits.register_hook(lambda gradient: 2 * gradient)
        return output


def mean_of_means(loss_sum, count):
    """Weighs ranks alike, whatever they hold."""
    return loss_sum / count


def only_mine(module, **options):  # noqa: ARG001
    """No rank hears of another."""
    return module


@pytest.mark.parametrize(
    ("where", "name", "defect"),
    [
        (parallel_module, "DistributedDataParallel", Summing),
        (parallel_module, "DistributedDataParallel", only_mine),
        (verify_module, "global_mean", mean_of_means),
    ],
    ids=["sum", "alone", "mean of means"],
)
def test_defects_are_seen(monkeypatch, where, name, defect):
    monkeypatch.setattr(where, name, defect)
    certificate = pl.verify(hugging_face("llama, tied"), pl.Plan.from_dict(PLANS["replicas"]))
    assert not certificate.certified
    assert certificate.max_rel_grad_error > 1e-3


def test_a_block_that_forgets_its_tie_is_seen(monkeypatch):
    """Sharding blocks that share a parameter one by one would part them."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(31, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.layers[1].weight = self.layers[0].weight

        def forward(self, tokens_BT):
            x_BTD = self.embedding(tokens_BT)
            for layer in self.layers:
                x_BTD = torch.tanh(layer(x_BTD))
            return x_BTD @ self.embedding.weight.T

    plan = pl.Plan.from_dict(PLANS["shards"])
    assert pl.verify(Tied(), plan).certified
    monkeypatch.setattr(parallel_module, "blocks_of", lambda module: list(module.layers))
    try:
        certificate = pl.verify(Tied(), plan)
    except pl.PacelineError:
        return  # torch refuses it outright
    assert not certificate.certified


def test_a_call_of_ones_own():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(31, 8)

        def forward(self, *, tokens):
            return {"scores": self.embedding(tokens) @ self.embedding.weight.T}

    plan = pl.Plan.from_dict(PLANS["shards"])
    with pytest.raises(UsageError, match="cannot call Odd") as caught:
        pl.verify(Odd(), plan)
    assert "forward=" in caught.value.hint
    called = lambda module, tokens_BT, is_text_BT: module(tokens=tokens_BT)["scores"]  # noqa: E731, ARG005
    assert pl.verify(Odd(), plan, forward=called).certified


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Embedding(5, 3), nn.Flatten()), r"gives \(2, 39\), not logits"),
        (nn.Linear(3, 3), "Linear has no nn.Embedding"),
    ],
)
def test_what_cannot_be_verified(module, message):
    with pytest.raises(UsageError, match=message):
        pl.verify(module)


def test_plans_are_checked():
    with pytest.raises(ConfigError, match=r"tensor\.sequence_parallel = true"):
        pl.verify(Recurrent(), pl.Plan.from_dict({"mesh": {"tp": 2}}))
    with pytest.raises(UsageError, match="forward is for modules"):
        pl.verify("random:llama:tiny", forward=lambda module, *_: module)
