"""The feed-forward of a block: one hidden layer, gated or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from paceline.models.linear import Linear
from paceline.plan.model_spec import ModelSpec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu-tanh": partial(functional.gelu, approximate="tanh"),
}


class FeedForward(nn.Module):
    """Two layers (Vaswani et al., arXiv:1706.03762), or three with a gate (arXiv:2002.05202)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        self.is_gated = spec.gated_ffn
        if spec.gated_ffn:
            self.gate = Linear(spec.d_model, spec.d_ffn, bias=spec.ffn_bias)
        self.up = Linear(spec.d_model, spec.d_ffn, bias=spec.ffn_bias)
        self.down = Linear(spec.d_ffn, spec.d_model, bias=spec.ffn_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.is_gated:
            return self.down(self.activation(self.gate(x_BTD)) * self.up(x_BTD))
        return self.down(self.activation(self.up(x_BTD)))
