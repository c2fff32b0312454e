"""A Llama in a page of plain PyTorch: what a user of torch alone would write.

Parameters have the names of ours, so that both sides can begin with the same weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from paceline.core.errors import UsageError
from paceline.plan.model_spec import ModelSpec

_LIKE_LLAMA = {
    "positions": "rotary",
    "norm": "rms",
    "norm_placement": "before",
    "qk_norm": "none",
    "activation": "silu",
    "gated_ffn": True,
    "tied_embeddings": True,
    "moe": None,
    "window": None,
    "rope_scaling": None,
    "qkv_bias": False,
    "output_bias": False,
    "ffn_bias": False,
}


def require_plain(spec: ModelSpec) -> None:
    """Raises UsageError for what this file does not compute."""
    for name, value in _LIKE_LLAMA.items():
        if getattr(spec, name) != value:
            rule = f"the plain baseline has {name} = {value}, not {getattr(spec, name)}"
            raise UsageError(rule, hint="--model random:llama:135m, or another small Llama")


class Attention(nn.Module):
    """Causal attention with grouped key heads."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.query = nn.Linear(spec.d_model, spec.d_query, bias=False)
        self.key = nn.Linear(spec.d_model, spec.d_kv, bias=False)
        self.value = nn.Linear(spec.d_model, spec.d_kv, bias=False)
        self.output = nn.Linear(spec.d_query, spec.d_model, bias=False)

    def forward(self, x_BTD: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        projected = (layer(x_BTD) for layer in (self.query, self.key, self.value))
        q_BNTH, k_BKTH, v_BKTH = (self.heads(x) for x in projected)
        out_BNTH = functional.scaled_dot_product_attention(
            turn(q_BNTH, cos_TH, sin_TH),
            turn(k_BKTH, cos_TH, sin_TH),
            v_BKTH,
            is_causal=True,
            enable_gqa=True,
        )
        return self.output(out_BNTH.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, heads x H) to (B, heads, T, H)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """Three matrices and a gate."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.d_model, spec.d_ffn, bias=False)
        self.up = nn.Linear(spec.d_model, spec.d_ffn, bias=False)
        self.down = nn.Linear(spec.d_ffn, spec.d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """Attention and feed-forward, each added to what goes in."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(spec.d_model, eps=spec.norm_eps)
        self.attention = Attention(spec)
        self.ffn_norm = nn.RMSNorm(spec.d_model, eps=spec.norm_eps)
        self.ffn = FeedForward(spec)

    def forward(self, x_BTD: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_TH, sin_TH)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Llama(nn.Module):
    """The model, or some of its consecutive blocks.

    Args:
        spec: sizes; what `require_plain` admits.
        layers: the blocks; with the first of the model comes the embedding, with the last norm
            and head. Absent: all of them.
    """

    def __init__(self, spec: ModelSpec, layers: range | None = None) -> None:
        super().__init__()
        layers = range(spec.num_layers) if layers is None else layers
        self.spec = spec
        self.is_first, self.is_last = layers.start == 0, layers.stop == spec.num_layers
        if self.is_first or self.is_last:
            self.embedding = nn.Embedding(spec.vocab_size, spec.d_model)
        self.blocks = nn.ModuleDict({str(layer): Block(spec) for layer in layers})
        if self.is_last:
            self.norm = nn.RMSNorm(spec.d_model, eps=spec.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T), or hidden states of blocks before, to logits or hidden states."""
        x_BTD = self.embedding(x) if self.is_first else x
        cos_TH, sin_TH = self.angles(x)
        for block in self.blocks.values():
            x_BTD = block(x_BTD, cos_TH, sin_TH)
        return self.predict(x_BTD) if self.is_last else x_BTD

    def predict(self, x_BTD: Tensor) -> Tensor:
        """Logits of the last hidden states."""
        return functional.linear(self.norm(x_BTD), self.embedding.weight)

    def angles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions, (T, H)."""
        exponents = torch.arange(0, self.spec.head_dim, 2) / self.spec.head_dim
        angles_Th = torch.arange(x.shape[1])[:, None] * self.spec.rope_theta**-exponents
        angles_TH = torch.cat([angles_Th, angles_Th], dim=-1)
        return angles_TH.cos(), angles_TH.sin()


def turn(x_BNTH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Heads turned by the angles of their positions."""
    first, second = x_BNTH.chunk(2, dim=-1)
    return x_BNTH * cos_TH + torch.cat([-second, first], dim=-1) * sin_TH


def mean_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross entropy, mean over the tokens."""
    return functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())
