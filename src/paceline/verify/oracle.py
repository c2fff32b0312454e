"""The oracle: two training steps of one process in float64, written out plainly.

It shares the model's maths and the order of data with the trainer, and nothing else: the loss,
its scale, accumulation, the clip and the optimizers are written here once more, as formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.data.batch import IGNORED
from paceline.data.loader import Loader
from paceline.models.decoder import Decoder
from paceline.models.layout import Layout
from paceline.optim.schedule import learning_rate
from paceline.plan.plan import OptimizerConfig, Plan

Update = Callable[[Tensor, Tensor, dict[str, Tensor], int, float], None]


@dataclass(frozen=True, slots=True)
class OracleStep:
    """What one step gives.

    Attributes:
        loss: mean over valid tokens.
        valid_tokens: how many they are.
        grad_norm: before the clip.
        clip_factor: what gradients were multiplied by.
        gradients: after the clip, of the trained parameters.
        weights: after the step, of all parameters.
        loss_after: the loss of the same tokens with these.
    """

    loss: float
    valid_tokens: int
    grad_norm: float
    clip_factor: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    loss_after: float


def run_oracle(model: Decoder, loader: Loader, plan: Plan, num_steps: int) -> list[OracleStep]:
    """Trains a float64 model for a few steps.

    Args:
        model: changed in place; parameters without gradients stay as they are.
        loader: of a plan of one rank.
        plan: of which the optimizer is used.
        num_steps: of the run.
    """
    update = _updates(plan.optimizer)[plan.optimizer.name]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in trained}
    steps: list[OracleStep] = []
    for step in range(1, num_steps + 1):
        loss, count = _mean_loss(model, loader, step)
        gradients = torch.autograd.grad(loss, list(trained.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        limit = plan.optimizer.clip_norm
        factor = limit / norm if 0 < limit < norm else 1.0
        clipped = {name: g * factor for name, g in zip(trained, gradients, strict=True)}
        rate = learning_rate(plan.optimizer, step, num_steps)
        with torch.no_grad():
            for name, parameter in trained.items():
                update(parameter, clipped[name], moments[name], step, rate)
            after, _ = _mean_loss(model, loader, step)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        found = OracleStep(loss.item(), count, norm, factor, clipped, weights, after.item())
        steps.append(found)
    return steps


def _mean_loss(model: Decoder, loader: Loader, step: int) -> tuple[Tensor, int]:
    """``-sum(log p(label)) / count`` over all sequences of a step, and the count."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in loader.microbatches(step, 0):
        logits_BTV = model(batch.tokens_BT, Layout.of_documents(batch.documents_BT))
        log_probs_BTV = logits_BTV - logits_BTV.logsumexp(dim=-1, keepdim=True)
        is_valid_BT = batch.labels_BT != IGNORED
        labels_BT = batch.labels_BT.where(is_valid_BT, 0)
        chosen_BT = log_probs_BTV.gather(-1, labels_BT[..., None])[..., 0]
        total = total - (chosen_BT * is_valid_BT).sum()
        count += int(is_valid_BT.sum())
    return total / count, count


def _updates(config: OptimizerConfig) -> dict[str, Update]:
    beta1, beta2 = config.betas

    def sgd(p: Tensor, g: Tensor, moments: dict[str, Tensor], _step: int, rate: float) -> None:
        velocity = beta1 * moments.get("velocity", torch.zeros_like(p)) + g + _decay(p, config) * p
        moments["velocity"] = velocity
        p -= rate * velocity

    def adamw(p: Tensor, g: Tensor, moments: dict[str, Tensor], step: int, rate: float) -> None:
        zero = torch.zeros_like(p)
        mean = beta1 * moments.get("mean", zero) + (1 - beta1) * g
        square = beta2 * moments.get("square", zero) + (1 - beta2) * g * g
        moments["mean"], moments["square"] = mean, square
        unbiased_mean = mean / (1 - beta1**step)
        unbiased_square = square / (1 - beta2**step)
        p -= rate * _decay(p, config) * p
        p -= rate * unbiased_mean / (unbiased_square.sqrt() + config.eps)

    return {"sgd": sgd, "adamw": adamw}


def _decay(parameter: Tensor, config: OptimizerConfig) -> float:
    return config.weight_decay if parameter.ndim >= 2 else 0.0
