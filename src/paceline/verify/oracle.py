"""The oracle: two training steps of one process in float64, written out plainly.

It shares the model's maths and the order of data with the trainer, and nothing else: the loss,
its scale, accumulation, the clip and the optimizers are written here once more, as formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from paceline.data.batch import IGNORED
from paceline.data.loader import Loader
from paceline.models.decoder import Decoder
from paceline.models.layout import Layout
from paceline.models.moe import MixtureOfExperts
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
        plan: of which the optimizer and the weight of the balance loss are used.
        num_steps: of the run.
    """
    update = _updates(plan.optimizer)[plan.optimizer.name]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in trained}
    steps: list[OracleStep] = []
    for step in range(1, num_steps + 1):
        weight = plan.expert.balance_loss_weight
        balance = _Balance(model if weight else None)
        loss, count = _mean_loss(model, loader, step, balance)
        aim = loss + weight * balance.mean()
        balance.close()
        gradients = torch.autograd.grad(aim, list(trained.values()))
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


def _mean_loss(
    model: Decoder, loader: Loader, step: int, balance: _Balance | None = None
) -> tuple[Tensor, int]:
    """``-sum(log p(label)) / count`` over all sequences of a step, and the count."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in loader.microbatches(step, 0):
        if balance is not None:
            balance.documents_BT = batch.documents_BT
        logits_BTV = model(batch.tokens_BT, Layout.of_documents(batch.documents_BT))
        log_probs_BTV = logits_BTV - logits_BTV.logsumexp(dim=-1, keepdim=True)
        is_valid_BT = batch.labels_BT != IGNORED
        labels_BT = batch.labels_BT.where(is_valid_BT, 0)
        chosen_BT = log_probs_BTV.gather(-1, labels_BT[..., None])[..., 0]
        total = total - (chosen_BT * is_valid_BT).sum()
        count += int(is_valid_BT.sum())
    return total / count, count


class _Balance:
    """The balance losses of a step, from the routers' scores, which hooks give.

    Args:
        model: whose routers; None for none.

    Attributes:
        documents_BT: of the batch that goes through the model; negative for padding.
    """

    def __init__(self, model: Decoder | None) -> None:
        self._handles: list[RemovableHandle] = []
        self._total = torch.zeros((), dtype=torch.float64)
        self._num_sequences: dict[nn.Module, int] = {}
        self.documents_BT = torch.zeros(0, 0)
        for module in model.modules() if model else ():
            if isinstance(module, MixtureOfExperts):
                hook = partial(self._add, module)
                self._handles.append(module.router.register_forward_hook(hook))

    def close(self) -> None:
        """Hears no more of the model."""
        for handle in self._handles:
            handle.remove()

    def mean(self) -> Tensor:
        """The sum over layers of the mean over sequences."""
        return self._total / max(self._num_sequences.values(), default=1)

    def _add(self, module: MixtureOfExperts, router: nn.Module, _x: Any, scores: Tensor) -> None:
        """``E / (k T) sum_i count_i 1/T sum_t p_ti`` of every sequence of a layer."""
        spec = module.moe
        in_group = spec.num_experts // spec.num_groups
        scores_BTE = scores.view(*self.documents_BT.shape, -1)
        for is_real_T, scores_TE in zip(self.documents_BT >= 0, scores_BTE, strict=True):
            probs_TE = scores_TE[is_real_T].exp()
            probs_TE = probs_TE / probs_TE.sum(dim=1, keepdim=True)
            counts_E = torch.zeros(spec.num_experts, dtype=torch.float64)
            for probs_E in probs_TE.tolist():
                for first in range(0, spec.num_experts, in_group):
                    group = range(first, first + in_group)
                    best = sorted(group, key=probs_E.__getitem__, reverse=True)
                    counts_E[best[: spec.experts_per_token // spec.num_groups]] += 1
            length = max(1, len(probs_TE))
            shares_E = counts_E * spec.num_experts / (spec.experts_per_token * length)
            self._total = self._total + (shares_E * probs_TE.sum(dim=0) / length).sum()
            self._num_sequences[router] = self._num_sequences.get(router, 0) + 1


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
