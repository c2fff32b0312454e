"""Sizes of a model, and what follows from them: parameters, FLOPs, bytes. No torch.

One multiply-add is two FLOPs. Attention counts the query-key pairs that the causal mask admits,
(T + 1) / 2 a token on average; element-wise work is left out, as is the field's custom.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from paceline.core.config import Config

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling(Config):
    """Llama 3's stretching of rotary frequencies to longer contexts.

    Wavelengths above ``original_positions / low_factor`` are stretched by `factor`, those below
    ``original_positions / high_factor`` are kept, those between are blended.
    """

    factor: float
    low_factor: float
    high_factor: float
    original_positions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec(Config):
    """Sizes and flags of a decoder-only transformer.

    Attributes:
        family: the table of weight names and defaults that it belongs to.
        vocab_size: V, rows of the embedding.
        d_model: D, width of the residual stream.
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: K, key and value heads; divides `num_heads`.
        head_dim: H.
        d_ffn: F, width of the feed-forward's hidden layer.
        max_positions: the longest context in tokens.
        rope_theta: base of the rotary frequencies.
        rope_scaling: see `RopeScaling`.
        norm_eps: added to the mean square before its root.
        tied_embeddings: whether the head is the embedding.
        attention_bias: whether query, key, value and output projections have biases.
        ffn_bias: whether the feed-forward's projections have biases.
        initializer_std: of the weights of a random model.
    """

    family: str
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ffn: int
    max_positions: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    attention_bias: bool = False
    ffn_bias: bool = False
    initializer_std: float = 0.02

    @property
    def d_query(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def d_kv(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    # Parameters

    @property
    def layer_matrix_parameters(self) -> int:
        """Weights of one block that multiply every token."""
        attention = 2 * self.d_model * self.d_query + 2 * self.d_model * self.d_kv
        return attention + 3 * self.d_model * self.d_ffn

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied head counts once."""
        attention_biases = (self.d_query + 2 * self.d_kv + self.d_model) * self.attention_bias
        ffn_biases = (2 * self.d_ffn + self.d_model) * self.ffn_bias
        norms = 2 * self.d_model
        layer = self.layer_matrix_parameters + attention_biases + ffn_biases + norms
        embeddings = self.vocab_size * self.d_model * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.d_model

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token uses; all of them in a dense model."""
        return self.num_parameters

    # FLOPs

    def attention_flops_per_token(self, sequence_length: int) -> float:
        """Scores and weighted values of all layers, forward, mean over a causal sequence."""
        return 4.0 * self.num_layers * self.d_query * (sequence_length + 1) / 2

    def forward_flops_per_token(self, sequence_length: int) -> float:
        """Forward FLOPs of one token, the output head included."""
        matrices = self.num_layers * self.layer_matrix_parameters + self.vocab_size * self.d_model
        return 2.0 * matrices + self.attention_flops_per_token(sequence_length)

    def backward_flops_per_token(
        self, sequence_length: int, *, remat: Literal["none", "selective", "full"] = "none"
    ) -> float:
        """Backward FLOPs of one token, recomputation included.

        Gradients for inputs and for weights cost a forward each. Selective rematerialisation
        recomputes the attention core (Korthikanti et al., arXiv:2205.05198), full the forward.
        """
        forward = self.forward_flops_per_token(sequence_length)
        attention = self.attention_flops_per_token(sequence_length)
        recomputed = {"none": 0.0, "selective": attention, "full": forward}[remat]
        return 2.0 * forward + recomputed

    def model_flops_per_token(self, sequence_length: int) -> float:
        """Forward and backward without recomputation: the numerator of MFU."""
        return 3.0 * self.forward_flops_per_token(sequence_length)

    # Bytes

    def parameter_bytes(self, dtype: str) -> int:
        return self.num_parameters * DTYPE_BYTES[dtype]

    def gradient_bytes(self, dtype: str) -> int:
        return self.num_parameters * DTYPE_BYTES[dtype]

    def optimizer_bytes(self, dtype: str) -> int:
        """AdamW's two moments."""
        return 2 * self.num_parameters * DTYPE_BYTES[dtype]

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.d_kv * DTYPE_BYTES[dtype]
