"""One step and its objective, on one rank, against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from paceline.core.errors import DataError, PacelineError
from paceline.data.batch import IGNORED, Batch
from paceline.dist.world import World
from paceline.models.families.llama import PRESETS
from paceline.models.weights import RandomWeights
from paceline.optim import OPTIMIZERS
from paceline.parallel.apply import apply
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import OptimizerConfig, Plan, PrecisionConfig
from paceline.train.objective.next_token import next_token
from paceline.train.state import State
from paceline.train.step import compute_gradients, train_step

pytestmark = pytest.mark.cpu

SPEC = PRESETS["tiny"]
WORLD = World(MeshConfig(), 0, torch.device("cpu"))


def state_of(plan: Plan) -> State:
    model = apply(SPEC, RandomWeights(SPEC), plan, WORLD)
    return State(model, OPTIMIZERS.load(plan.optimizer.name)(model.parameters(), plan.optimizer))


def batch_of(*labels_T: list[int]) -> Batch:
    labels_BT = torch.tensor(labels_T)
    return Batch(labels_BT.clip(min=0) + 1, labels_BT, torch.zeros_like(labels_BT))


FIRST, SECOND = batch_of([4, IGNORED, 9]), batch_of([IGNORED, IGNORED, 2])


def test_a_loss_is_the_sum_over_the_labels_that_count():
    model = state_of(Plan()).model.module
    with torch.no_grad():
        log_probs = functional.log_softmax(model(FIRST.tokens_BT), dim=-1)
        expected = -(log_probs[0, 0, 4] + log_probs[0, 2, 9])
        torch.testing.assert_close(next_token(model, FIRST), expected)
        assert next_token(model, batch_of([IGNORED, IGNORED])).item() == 0.0


def test_a_loss_is_in_float32_under_bfloat16():
    model = state_of(Plan(precision=PrecisionConfig(compute="bfloat16"))).model.module
    loss = next_token(model, FIRST)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2 * math.log(259), rel=0.02)


def test_a_token_does_not_see_other_documents():
    model = state_of(Plan()).model.module
    tokens = torch.tensor([[5, 6, 7, 8], [1, 2, 7, 8]])
    labels = torch.tensor([[IGNORED, IGNORED, 3, 4]] * 2)
    apart, together = torch.tensor([[0, 0, 1, 1]] * 2), torch.zeros(2, 4, dtype=torch.long)

    def losses(documents: torch.Tensor) -> list[float]:
        rows = [Batch(tokens[i : i + 1], labels[:1], documents[:1]) for i in range(2)]
        return [next_token(model, row).item() for row in rows]

    first, second = losses(apart)
    assert first == pytest.approx(second, rel=1e-6)
    first, second = losses(together)
    assert first != pytest.approx(second, rel=1e-6)


def test_gradients_are_of_the_mean_over_the_step_and_clipped():
    state = state_of(Plan())
    result = compute_gradients(state, [FIRST, SECOND], next_token, WORLD, max_norm=0.25)
    reference = state_of(Plan()).model.module
    loss = (next_token(reference, FIRST) + next_token(reference, SECOND)) / 3
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
    assert result.valid_tokens == 3
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    assert result.clip_factor == pytest.approx(0.25 / norm.item(), rel=1e-6)
    for found, expected in zip(
        state.model.module.parameters(), reference.parameters(), strict=True
    ):
        assert expected.grad is not None
        largest = float(expected.grad.abs().max()) * result.clip_factor
        assert found.grad is not None
        error = (found.grad - expected.grad * result.clip_factor).abs().max()
        assert float(error) <= 1e-5 * largest


def test_a_step_moves_the_weights_at_its_rate_and_leaves_no_gradient():
    plan = Plan(optimizer=OptimizerConfig(name="sgd", lr=123.0, weight_decay=0.0))
    state, reference = state_of(plan), state_of(plan)
    compute_gradients(reference, [FIRST], next_token, WORLD, max_norm=0.5)
    train_step(state, [FIRST], next_token, WORLD, learning_rate=0.1, max_norm=0.5)
    assert state.step == 1
    for found, start in zip(
        state.model.module.parameters(), reference.model.module.parameters(), strict=True
    ):
        assert found.grad is None
        assert start.grad is not None
        torch.testing.assert_close(found, start - 0.1 * start.grad)


def test_a_step_without_a_label_is_refused():
    state = state_of(Plan())
    with pytest.raises(DataError, match="without a single valid token"):
        train_step(state, [batch_of([IGNORED])], next_token, WORLD, learning_rate=1, max_norm=1)
    assert state.step == 0


def test_a_gradient_that_is_not_finite_stops_the_run_before_a_weight_moves():
    state = state_of(Plan())
    before = {name: p.detach().clone() for name, p in state.model.module.named_parameters()}
    with torch.no_grad():
        state.model.module.norm.weight[0] = math.inf
    before["norm.weight"][0] = math.inf
    with pytest.raises(PacelineError, match="step 1: the gradient's norm is nan"):
        train_step(state, [FIRST], next_token, WORLD, learning_rate=0.1, max_norm=1.0)
    assert state.step == 0
    for name, parameter in state.model.module.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_state_s_tensors_are_named_and_live():
    plan = Plan(optimizer=OptimizerConfig(name="adamw"))
    state = state_of(plan)
    parts = state.parts()
    names = [name for name, _ in state.model.module.named_parameters()]
    assert parts.keys() == {f"model.{name}" for name in names} | {
        f"optimizer.{name}.{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")
    }
    train_step(state, [FIRST], next_token, WORLD, learning_rate=0.1, max_norm=1.0)
    assert parts["optimizer.norm.weight.step"].local.item() == 1
    assert parts["optimizer.norm.weight.exp_avg"].local.abs().sum() > 0
    assert torch.equal(parts["model.norm.weight"].local, state.model.module.norm.weight)
