"""Adam with decoupled weight decay.

Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101, Alg. 2.
Replaces: nothing, it is the default.  Needs: nothing.  Forbids: nothing.
Cost: two moments of the parameters' size and dtype.
Differs: no; torch's fused implementation.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from paceline.optim.groups import parameter_groups
from paceline.plan.plan import OptimizerConfig


def build(parameters: Iterable[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over the trained parameters, its moments in place and zero."""
    beta1, beta2 = config.betas
    optimizer = torch.optim.AdamW(
        parameter_groups(parameters, config),
        lr=config.lr,
        betas=(beta1, beta2),
        eps=config.eps,
        fused=True,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                # The fused kernel wants its counter in float32 on the parameter's device.
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer
