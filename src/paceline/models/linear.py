"""Parts that multiply: weights are cast to the dtype of what flows through them.

So one model serves master weights in float32 under bfloat16 compute, and weights that are
bfloat16 already, with no second code path.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from paceline.kernels.linear import linear
from paceline.kernels.norm import rms_norm
from paceline.plan.model_spec import ModelSpec

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``product(x, weight, bias) -> x W^T + b`` in the dtype of x; the weights are of any dtype."""


def cast_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The plain product, of weights cast to the dtype of x."""
    return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Linear(nn.Linear):
    """``y = x W^T + b`` in the dtype of x.

    Attributes:
        product: what multiplies; another may sum its result over ranks, or put off the gradient of
            the weight.
    """

    product: Product = staticmethod(cast_product)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
        return self.product(input, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, arXiv:1910.07467), at least in float32 inside.

    Args:
        width: of the last dimension.
        eps: added to the mean square.
        offset: added to the weight, which is then applied in the wide dtype too, as Gemma does.
    """

    def __init__(self, width: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.offset = offset

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight, self.eps, self.offset)


class LayerNorm(nn.LayerNorm):
    """Layer norm (Ba et al., arXiv:1607.06450) in the dtype of x."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


def make_norm(spec: ModelSpec, width: int) -> nn.Module:
    """The norm that a model uses, over `width` values."""
    if spec.norm == "layer":
        return LayerNorm(width, spec.norm_eps)
    return RMSNorm(width, spec.norm_eps, spec.norm_offset)
