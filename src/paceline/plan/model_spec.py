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
    """How rotary frequencies are stretched to longer contexts.

    ``linear`` divides all of them by `factor`. ``llama3`` stretches wavelengths above
    ``original_positions / low_factor``, keeps those below ``original_positions / high_factor``,
    and blends between.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeSpec(Config):
    """A mixture of experts in place of the feed-forward.

    Attributes:
        num_experts: E.
        experts_per_token: how many each token goes to.
        d_expert: width of an expert's hidden layer.
        normalize_weights: whether the chosen experts' weights are made to sum to 1.
        dense_layers: layers that keep the plain feed-forward.
        num_groups: equal groups of neighbouring experts, in each of which a token chooses equally
            many; divides `num_experts` and `experts_per_token`.
        expert_scales: whether the weight of each expert is multiplied by one that is learned.
        d_shared: width of the hidden layer of what every token meets beside its experts; 0: none.
        shared_gate: whether that is multiplied by a sigmoid of the token.
    """

    num_experts: int
    experts_per_token: int
    d_expert: int
    normalize_weights: bool = True
    dense_layers: tuple[int, ...] = ()
    num_groups: int = 1
    expert_scales: bool = False
    d_shared: int = 0
    shared_gate: bool = False


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
        positions: rotated heads, or an embedding of the position added to the token's.
        rope_theta: base of the rotary frequencies.
        rope_scaling: see `RopeScaling`.
        window: tokens that a windowed layer attends to, the query's own among them.
        global_layers: layers without a window, where there is one. Absent: none.
        window_rope_theta: base of the rotary frequencies of windowed layers, never scaled; absent:
            as in the others.
        norm: root-mean-square norm, or layer norm with a bias.
        norm_eps: added to the mean square before its root.
        norm_offset: what is added to a norm's weight: 1 where weights are kept as differences.
        norm_placement: whether a block norms what goes into attention and feed-forward, what
            comes out of them, or both.
        qk_norm: whether queries and keys are normed: each head, or all heads as one.
        activation: of the feed-forward.
        gated_ffn: whether the feed-forward multiplies two projections.
        moe: mixture of experts, or None.
        tied_embeddings: whether the head is the embedding.
        embedding_scale: what embeddings are multiplied by.
        attention_scale: what scores are multiplied by; absent: ``head_dim ** -0.5``.
        qkv_bias: whether query, key and value projections have biases.
        output_bias: whether attention's output projection has one.
        ffn_bias: whether the feed-forward's projections have biases.
        initializer_std: of the weights of a random model.
        ladder_from: the first layer whose residual is a ladder (`paceline.models.ladder`), as are
            all after it; 0: every layer is, None: none.
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
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    global_layers: tuple[int, ...] = ()
    window_rope_theta: float | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    norm_placement: Literal["before", "after", "both"] = "before"
    qk_norm: Literal["none", "head", "all"] = "none"
    activation: Literal["silu", "gelu-tanh"] = "silu"
    gated_ffn: bool = True
    moe: MoeSpec | None = None
    tied_embeddings: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    initializer_std: float = 0.02
    ladder_from: int | None = None

    @property
    def d_query(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def d_kv(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    def window_of(self, layer: int) -> int | None:
        """The window of a layer, None where it sees the whole document."""
        return None if layer in self.global_layers else self.window

    def is_ladder(self, layer: int) -> bool:
        """Whether a layer's residual is a ladder."""
        return self.ladder_from is not None and layer >= self.ladder_from

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has a mixture of experts."""
        return self.moe is not None and layer not in self.moe.dense_layers

    # Parameters

    @property
    def attention_matrix_parameters(self) -> int:
        """Weights of one layer's projections to and from heads."""
        return 2 * self.d_model * self.d_query + 2 * self.d_model * self.d_kv

    def ffn_matrix_parameters(self, layer: int, *, active: bool) -> int:
        """Weights of one layer's feed-forward: all of them, or those that a token meets."""
        matrices = 3 if self.gated_ffn else 2
        if self.moe is None or layer in self.moe.dense_layers:
            return matrices * self.d_model * self.d_ffn
        experts = self.moe.experts_per_token if active else self.moe.num_experts
        router = self.d_model * self.moe.num_experts
        gate = self.d_model if self.moe.shared_gate else 0
        hidden = experts * self.moe.d_expert + self.moe.d_shared
        return router + gate + matrices * self.d_model * hidden

    def matrix_parameters(self, *, active: bool) -> int:
        """Weights of all blocks that multiply tokens."""
        ffn = sum(self.ffn_matrix_parameters(n, active=active) for n in range(self.num_layers))
        return self.num_layers * self.attention_matrix_parameters + ffn

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied head counts once."""
        return self._parameters(active=False)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token meets; all of them in a dense model."""
        return self._parameters(active=True)

    def _parameters(self, *, active: bool) -> int:
        embeddings = self.vocab_size * self.d_model * (1 if self.tied_embeddings else 2)
        if self.positions == "learned":
            embeddings += self.max_positions * self.d_model
        vectors = self.num_layers * self._layer_vector_parameters + self._norm_parameters
        vectors += self._expert_scales(active=active)
        return self.matrix_parameters(active=active) + embeddings + vectors

    def _expert_scales(self, *, active: bool) -> int:
        """Learned scales of experts: all of them, or those of the ones that a token meets."""
        if self.moe is None or not self.moe.expert_scales:
            return 0
        num_layers = sum(self.has_experts(layer) for layer in range(self.num_layers))
        return num_layers * (self.moe.experts_per_token if active else self.moe.num_experts)

    @property
    def _norm_parameters(self) -> int:
        return self.d_model * (2 if self.norm == "layer" else 1)

    @property
    def _layer_vector_parameters(self) -> int:
        """Norms and biases of one layer."""
        norms = self._norm_parameters * (4 if self.norm_placement == "both" else 2)
        per_head = {"none": 0, "head": 2 * self.head_dim, "all": self.d_query + self.d_kv}
        biases = (self.d_query + 2 * self.d_kv) * self.qkv_bias + self.d_model * self.output_bias
        biases += ((2 if self.gated_ffn else 1) * self.d_ffn + self.d_model) * self.ffn_bias
        return norms + per_head[self.qk_norm] + biases

    # FLOPs

    def attention_flops_per_token(self, sequence_length: int) -> float:
        """Scores and weighted values of all layers, forward, mean over a causal sequence."""
        keys = sum(
            _mean_keys(sequence_length, self.window_of(layer)) for layer in range(self.num_layers)
        )
        return 4.0 * self.d_query * keys

    def layer_flops_per_token(self, layer: int, sequence_length: int) -> float:
        """Forward FLOPs of one token in one layer."""
        ffn = self.ffn_matrix_parameters(layer, active=True)
        keys = _mean_keys(sequence_length, self.window_of(layer))
        return 2.0 * (self.attention_matrix_parameters + ffn) + 4.0 * self.d_query * keys

    @property
    def head_flops_per_token(self) -> float:
        """Forward FLOPs of one token in the output head."""
        return 2.0 * self.vocab_size * self.d_model

    def forward_flops_per_token(self, sequence_length: int) -> float:
        """Forward FLOPs of one token, the output head included."""
        matrices = self.matrix_parameters(active=True) + self.vocab_size * self.d_model
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

    def model_flops_per_token(self, sequence_length: int, *, trains_weights: bool = True) -> float:
        """Forward and backward without recomputation: the numerator of MFU.

        Args:
            sequence_length: tokens of a sequence.
            trains_weights: whether weights have gradients, which cost a forward, as inputs' do.
        """
        passes = 3.0 if trains_weights else 2.0
        return passes * self.forward_flops_per_token(sequence_length)

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


def _mean_keys(length: int, window: int | None) -> float:
    """Keys that a query sees, mean over a sequence."""
    if window is None or window >= length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length
