"""The decoder: embedding, blocks, norm, head. A family is a `ModelSpec` and a table of names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from paceline.models.attention import Attend, Attention, attend_within
from paceline.models.layout import Layout
from paceline.models.linear import Linear, RMSNorm
from paceline.models.rope import rotary_angles
from paceline.plan.model_spec import ModelSpec


class GatedFeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv:2002.05202)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate = Linear(spec.d_model, spec.d_ffn, bias=spec.ffn_bias)
        self.up = Linear(spec.d_model, spec.d_ffn, bias=spec.ffn_bias)
        self.down = Linear(spec.d_ffn, spec.d_model, bias=spec.ffn_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """Attention and feed-forward, each on a normed copy of the residual stream."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(spec.d_model, spec.norm_eps)
        self.attention = Attention(spec, layer)
        self.ffn_norm = RMSNorm(spec.d_model, spec.norm_eps)
        self.ffn = GatedFeedForward(spec)

    def forward(
        self, x_BTD: Tensor, layout: Layout, angles: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), layout, angles, attend)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Decoder(nn.Module):
    """A decoder-only transformer.

    Args:
        spec: sizes and flags.

    Attributes:
        compute_dtype: dtype of activations; None is that of the embedding. Weights are cast to
            it as they are used, so it may differ from theirs.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.compute_dtype: torch.dtype | None = None
        self.embedding = nn.Embedding(spec.vocab_size, spec.d_model)
        self.blocks = nn.ModuleList(Block(spec, layer) for layer in range(spec.num_layers))
        self.norm = RMSNorm(spec.d_model, spec.norm_eps)
        if not spec.tied_embeddings:
            self.head = Linear(spec.d_model, spec.vocab_size, bias=False)

    def forward(
        self,
        tokens_BT: Tensor,
        layout: Layout | None = None,
        *,
        attend: Attend = attend_within,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens_BT: token ids.
            layout: where the tokens stand; by default every row is one document from position 0.
            attend: the core of attention.
            last_only: whether only the last position of each row is wanted.

        Returns:
            logits_BTV, or logits_B1V, in the compute dtype.
        """
        layout = layout or Layout.whole_rows(tokens_BT)
        x_BTD = self.embedding(tokens_BT)
        x_BTD = x_BTD.to(self.compute_dtype or x_BTD.dtype)
        angles = rotary_angles(self.spec, layout.positions_BT, x_BTD.dtype)
        for block in self.blocks:
            x_BTD = block(x_BTD, layout, angles, attend)
        x_BTD = self.norm(x_BTD[:, -1:] if last_only else x_BTD)
        if self.spec.tied_embeddings:
            return functional.linear(x_BTD, self.embedding.weight.to(x_BTD.dtype))
        return self.head(x_BTD)
