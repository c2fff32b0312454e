"""Self-attention, and the seam behind which its core lies.

The module makes queries, keys and values and rotates them; what happens between them is an
`Attend`: the plain one below, a KV cache (`paceline.decode.cache`), later a ring over ranks.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional

from paceline.models.layout import Layout
from paceline.models.linear import Linear
from paceline.models.rope import rotate
from paceline.plan.model_spec import ModelSpec


class Attend(Protocol):
    """The core of attention.

    Args:
        q_BTNH: rotated queries.
        k_BTKH: rotated keys of the same tokens; K divides N.
        v_BTKH: values of the same tokens.
        layout: positions and documents of the tokens.
        layer: index of the calling layer, for cores that keep something for each.

    Returns:
        out_BTNH in the dtype of the queries; the softmax is at least in float32.
    """

    def __call__(
        self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, *, layout: Layout, layer: int
    ) -> Tensor: ...


def attend_within(
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    *,
    layout: Layout,
    layer: int,  # noqa: ARG001 (part of the seam)
) -> Tensor:
    """Causal attention inside each document of the batch, through torch's fused kernel."""
    mask_B1TT = layout.mask_B1TT
    return scaled_dot_product(q_BTNH, k_BTKH, v_BTKH, mask_B1TT, is_causal=mask_B1TT is None)


def scaled_dot_product(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Tensor | None, *, is_causal: bool
) -> Tensor:
    """Softmax(q k^T / sqrt(H)) v with N / K queries to each key head."""
    out_BNTH = functional.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=q_BTNH.shape[2] != k_BSKH.shape[2],
    )
    return out_BNTH.transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with grouped key and value heads and rotary positions."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = spec.head_dim
        bias = spec.attention_bias
        self.query = Linear(spec.d_model, spec.d_query, bias=bias)
        self.key = Linear(spec.d_model, spec.d_kv, bias=bias)
        self.value = Linear(spec.d_model, spec.d_kv, bias=bias)
        self.output = Linear(spec.d_query, spec.d_model, bias=bias)

    def forward(
        self, x_BTD: Tensor, layout: Layout, angles: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        heads = (-1, self.head_dim)
        q_BTNH = rotate(self.query(x_BTD).unflatten(-1, heads), *angles)
        k_BTKH = rotate(self.key(x_BTD).unflatten(-1, heads), *angles)
        v_BTKH = self.value(x_BTD).unflatten(-1, heads)
        out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, layout=layout, layer=self.layer)
        return self.output(out_BTNH.flatten(2))
