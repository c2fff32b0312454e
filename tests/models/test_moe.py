"""Mixtures of experts: the rules of routing, the balance loss, and Pangu's files."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from paceline.core.errors import ConfigError
from paceline.models.balance import Balance
from paceline.models.dispatch import Arrived, dispatch_here
from paceline.models.families import family, spec_from_config
from paceline.models.hf import WEIGHTS_FILE, FolderWeights, published_shapes, write_weights
from paceline.models.layout import PADDING, Layout
from paceline.models.moe import MixtureOfExperts
from paceline.models.weights import RandomWeights, TensorWeights, build, fill
from paceline.plan.model_spec import ModelSpec, MoeSpec

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
BOUND = 1e-14  # float64
PANGU = family("pangu-moe").PRESETS["tiny"]


def mixture(spec: ModelSpec) -> MixtureOfExperts:
    """In float64, every weight drawn, scales of experts among them."""
    module = MixtureOfExperts(spec).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module


def inputs(rows: int, length: int) -> tuple[Tensor, Layout]:
    generator = torch.Generator().manual_seed(6)
    x_BTD = torch.randn(rows, length, PANGU.d_model, generator=generator, dtype=torch.float64)
    return x_BTD, Layout.whole_rows(x_BTD[..., 0])


def spec_of(**moe: Any) -> ModelSpec:
    assert PANGU.moe is not None
    return replace(PANGU, moe=replace(PANGU.moe, **moe))


@pytest.mark.parametrize(("num_groups", "chosen"), [(1, 4), (2, 4), (4, 4), (2, 2), (8, 8)])
@torch.no_grad()
def test_a_token_chooses_the_best_of_every_group(num_groups, chosen):
    """The paper's rule, token by token: a softmax over all, then the best of each group.

    arXiv:2505.21411, Sec. 2; weights times the learned scales, as the published model has them.
    """
    spec = spec_of(num_groups=num_groups, experts_per_token=chosen)
    module = mixture(spec)
    x_BTD, layout = inputs(2, 3)
    expected = torch.zeros_like(x_BTD)
    experts = module.experts
    for place in [(row, column) for row in range(2) for column in range(3)]:
        x_D = x_BTD[place]
        probs_E = (module.router.weight @ x_D).softmax(dim=0)
        size = 8 // num_groups
        for first in range(0, 8, size):
            best = sorted(range(first, first + size), key=lambda n: -float(probs_E[n]))
            for expert in best[: chosen // num_groups]:
                hidden_F = torch.nn.functional.silu(experts.gate[expert] @ x_D)
                output_D = experts.down[expert] @ (hidden_F * (experts.up[expert] @ x_D))
                expected[place] += probs_E[expert] * module.expert_scales[expert] * output_D
        assert module.shared is not None
        expected[place] += module.shared(x_D)
    assert float((module(x_BTD, layout) - expected).abs().max()) <= BOUND * 10


@torch.no_grad()
def test_every_group_has_the_same_load_whatever_the_tokens():
    module = mixture(spec_of(num_groups=4))
    seen: list[Tensor] = []

    def dispatch(rows_RD: Tensor, counts_E: Tensor) -> Arrived:
        seen.append(counts_E)
        return dispatch_here(rows_RD, counts_E)

    module.dispatch = dispatch
    module(*inputs(3, 7))
    module.moe = replace(module.moe, num_groups=1)
    module(*inputs(3, 7))
    grouped_GE, plain_GE = (counts_E.view(4, 2) for counts_E in seen)
    assert grouped_GE.sum(dim=1).tolist() == [21] * 4
    assert len(set(plain_GE.sum(dim=1).tolist())) > 1
    assert len(set(grouped_GE.flatten().tolist())) > 1  # inside a group they differ


# The balance loss


def formula(probs_RE: Tensor, experts_RC: Tensor, rows: list[list[int]]) -> Tensor:
    """The sum over sequences, given the rows of each."""
    total = torch.zeros((), dtype=torch.float64)
    num_experts, num_choices = probs_RE.shape[1], experts_RC.shape[1]
    for own in rows:
        for expert in range(num_experts):
            frequency = float((experts_RC[own] == expert).sum()) / (num_choices * len(own))
            total = total + num_experts * frequency * probs_RE[own, expert].mean()
    return total


def test_the_balance_loss_is_the_formula_and_so_is_its_gradient():
    module = mixture(PANGU)
    x_BTD, _ = inputs(2, 5)
    documents_BT = torch.tensor([[0, 0, 1, 1, PADDING], [PADDING, 0, 0, PADDING, PADDING]])
    layout = Layout.of_documents(documents_BT)
    module.balance = Balance(8, 4, scale=0.7)
    plain = mixture(PANGU)(x_BTD, layout)
    output = module(x_BTD, layout)
    assert torch.equal(output, plain)
    output.sum().backward()
    found = module.router.weight.grad
    load = module.balance.take(CPU)

    again = mixture(PANGU)
    probs_RE = again.probabilities(x_BTD.flatten(0, 1))
    _, experts_RC = again.choose(probs_RE)
    loss = formula(probs_RE, experts_RC, [[0, 1, 2, 3], [6, 7]])
    (again(x_BTD, layout).sum() + 0.7 * loss).backward()
    expected = again.router.weight.grad
    assert found is not None
    assert expected is not None
    assert float((found - expected).abs().max()) <= BOUND * float(expected.abs().max()) * 10
    assert float(load.loss_sum) == pytest.approx(loss.item(), rel=1e-12)
    assert float(load.num_sequences) == pytest.approx(2)
    assert load.counts_E.sum() == 4 * 6  # choices of the six tokens that are no padding


def test_the_least_balance_loss_is_that_of_an_even_load():
    even_RE = torch.full((8, 8), 1 / 8, dtype=torch.float64)
    balance, layout = Balance(8, 1, scale=1.0), Layout.whole_rows(torch.zeros(1, 8))
    balance(torch.zeros(8, 1), even_RE, torch.arange(8)[:, None], layout)
    assert float(balance.take(CPU).loss_sum) == pytest.approx(1)
    uneven_RE = torch.eye(8, dtype=torch.float64)[:1].expand(8, 8)
    balance(torch.zeros(8, 1), uneven_RE, torch.zeros(8, 1, dtype=torch.int64), layout)
    assert float(balance.take(CPU).loss_sum) == pytest.approx(8)


def test_nothing_is_counted_or_added_in_evaluation():
    module = mixture(PANGU).eval()
    module.balance = Balance(8, 4, scale=0.7)
    module(*inputs(2, 5))
    assert module.balance.load is None
    assert float(module.balance.take(CPU).counts_E.sum()) == 0


def test_without_a_weight_tokens_are_counted_and_no_loss():
    module = mixture(PANGU)
    module.balance = Balance(8, 4)
    module(*inputs(2, 5))
    load = module.balance.take(CPU)
    assert float(load.counts_E.sum()) == 4 * 10
    assert float(load.num_sequences) == 0


# Sizes


def test_parameters_are_counted_with_what_is_shared():
    for name in ("pangu-moe", "qwen2-moe"):
        spec = family(name).PRESETS["tiny"]
        model = build(spec)
        assert sum(p.numel() for p in model.parameters()) == spec.num_parameters
        assert spec.moe is not None
        wider = replace(spec, moe=replace(spec.moe, d_shared=spec.moe.d_shared + 1))
        layers = sum(spec.has_experts(layer) for layer in range(spec.num_layers))
        assert wider.num_active_parameters - spec.num_active_parameters == layers * 3 * spec.d_model
        extra = wider.forward_flops_per_token(8) - spec.forward_flops_per_token(8)
        assert extra == 2 * layers * 3 * spec.d_model


@pytest.mark.parametrize(
    ("moe", "path"),
    [
        (MoeSpec(num_experts=8, experts_per_token=3, d_expert=4, num_groups=2), "moe.num_groups"),
        (MoeSpec(num_experts=9, experts_per_token=2, d_expert=4, num_groups=2), "moe.num_groups"),
        (MoeSpec(num_experts=8, experts_per_token=2, d_expert=4, d_shared=-1), "moe.d_shared"),
        (
            MoeSpec(num_experts=8, experts_per_token=2, d_expert=4, shared_gate=True),
            "moe.shared_gate",
        ),
    ],
)
def test_sizes_that_make_no_mixture_are_refused(moe, path, monkeypatch):
    module = family("mixtral")
    config = module.config_from_spec(module.PRESETS["tiny"])
    monkeypatch.setattr(module, "spec_from_config", lambda _: replace(PANGU, moe=moe))
    with pytest.raises(ConfigError, match=path.replace(".", r"\.")):
        spec_from_config(config, source="a config")


# Pangu's files


@torch.no_grad()
def test_pangu_goes_out_as_it_came_in(tmp_path):
    module = family("pangu-moe")
    config = module.config_from_spec(PANGU)
    assert spec_from_config(json.loads(json.dumps(config)), source="a config") == PANGU
    stored = module.weight_map(PANGU)
    names = {name for place in stored.values() for name in place.names}
    prefix = "model.layers.1.mlp"
    published = {  # as the published files have them
        f"{prefix}.gate.weight": (8, PANGU.d_model),
        f"{prefix}.router_scale": (1, 8),
        f"{prefix}.experts.7.down_proj.weight": (PANGU.d_model, 40),
        f"{prefix}.shared_expert.up_proj.weight": (56, PANGU.d_model),
        "model.layers.0.mlp.up_proj.weight": (PANGU.d_ffn, PANGU.d_model),
        "model.layers.1.self_attn.o_proj.bias": (PANGU.d_model,),
    }
    assert published.keys() <= names
    shapes = published_shapes(PANGU, stored)
    assert {name: shapes[name] for name in published} == published

    model = build(PANGU)
    fill(model, RandomWeights(PANGU, seed=2), CPU)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    write_weights(tmp_path / WEIGHTS_FILE, PANGU, weights.items(), torch.float32)
    back = build(PANGU)
    fill(back, FolderWeights(tmp_path, PANGU), CPU)
    again = build(PANGU)
    fill(again, TensorWeights(weights), CPU)
    tokens_BT = torch.arange(12).view(2, 6)
    assert torch.equal(back(tokens_BT), again(tokens_BT))
