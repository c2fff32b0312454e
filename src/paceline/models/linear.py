"""Parts that multiply: weights are cast to the dtype of what flows through them.

So one model serves master weights in float32 under bfloat16 compute, and weights that are
bfloat16 already, with no second code path.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Linear(nn.Linear):
    """``y = x W^T + b`` in the dtype of x."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, self.weight.to(input.dtype), bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, arXiv:1910.07467), at least in float32 inside."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        scale_BT1 = torch.rsqrt(wide_BTD.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x_BTD.dtype) * (wide_BTD * scale_BT1).to(x_BTD.dtype)
