"""The feed-forward of a block: one hidden layer, gated or not."""

from __future__ import annotations

from torch import Tensor, nn

from paceline.kernels.gate import ACTIVATIONS, gated
from paceline.models.linear import Linear
from paceline.plan.model_spec import ModelSpec


class FeedForward(nn.Module):
    """Two layers (Vaswani et al., arXiv:1706.03762), or three with a gate (arXiv:2002.05202).

    Args:
        spec: of the model.
        width: of the hidden layer; absent: the spec's.
    """

    def __init__(self, spec: ModelSpec, width: int | None = None) -> None:
        super().__init__()
        self.activation = spec.activation
        self.is_gated = spec.gated_ffn
        width = spec.d_ffn if width is None else width
        if spec.gated_ffn:
            self.gate = Linear(spec.d_model, width, bias=spec.ffn_bias)
        self.gate_up: Linear | None = None  # in place of gate and up, once fused
        self.up = Linear(spec.d_model, width, bias=spec.ffn_bias)
        self.down = Linear(width, spec.d_model, bias=spec.ffn_bias)

    @property
    def inputs(self) -> tuple[Linear, Linear]:
        """The projections of the input of a gated one, in the order in which they are fused."""
        return self.gate, self.up

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gate_up is not None:
            return self.down(gated(self.gate_up(x_BTD), self.activation))
        activation = ACTIVATIONS[self.activation]
        if self.is_gated:
            return self.down(activation(self.gate(x_BTD)) * self.up(x_BTD))
        return self.down(activation(self.up(x_BTD)))
