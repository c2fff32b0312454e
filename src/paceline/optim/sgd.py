"""Stochastic gradient descent with momentum; ``betas[0]`` is the momentum.

Source: Sutskever et al., On the Importance of Initialization and Momentum, ICML 2013.
Replaces: adamw.  Needs: nothing.  Forbids: nothing.
Cost: one moment of the parameters' size and dtype.
Differs: heavy-ball momentum, no Nesterov step. Unlike Adam it does not hide a wrong gradient scale.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from paceline.optim.groups import parameter_groups
from paceline.plan.plan import OptimizerConfig


def build(parameters: Iterable[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over the trained parameters, its momentum in place and zero."""
    optimizer = torch.optim.SGD(
        parameter_groups(parameters, config), lr=config.lr, momentum=config.betas[0]
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
    return optimizer
