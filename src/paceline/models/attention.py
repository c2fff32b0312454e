"""Self-attention, and the seam behind which its core lies.

The module makes queries, keys and values and rotates them; what happens between them is an
`Attend`: the plain one below, a KV cache (`paceline.decode.cache`), later a ring over ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from paceline.kernels.attend import scaled_dot_product
from paceline.kernels.rotate import rotate
from paceline.models.layout import Layout
from paceline.models.linear import Linear, make_norm
from paceline.plan.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One of a model's attentions.

    Attributes:
        layer: its index.
        window: tokens that a query sees, its own among them; None for all.
        scale: what scores are multiplied by.
    """

    layer: int
    window: int | None
    scale: float


class Attend(Protocol):
    """The core of attention.

    Args:
        q_BTNH: rotated queries.
        k_BTKH: rotated keys of the same tokens; K divides N.
        v_BTKH: values of the same tokens.
        layout: positions and documents of the tokens.
        site: the calling attention; cores that keep something for each layer key it by this.

    Returns:
        out_BTNH in the dtype of the queries; the softmax is at least in float32.
    """

    def __call__(
        self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, *, layout: Layout, site: AttentionSite
    ) -> Tensor: ...


def attend_within(
    q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, *, layout: Layout, site: AttentionSite
) -> Tensor:
    """Causal attention inside each document of the batch, through torch's fused kernel."""
    mask_B1TT = layout.mask_B1TT(site.window)
    is_causal = mask_B1TT is None
    return scaled_dot_product(
        q_BTNH, k_BTKH, v_BTKH, mask_B1TT, is_causal=is_causal, scale=site.scale
    )


Around = Callable[..., Tensor]
"""``around(function, *arguments) -> function(*arguments)``, computed in whatever way."""


def plainly(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Calls a function."""
    return function(*arguments)


class Attention(nn.Module):
    """Multi-head self-attention with grouped key and value heads.

    Attributes:
        key_of_query: for each query head the key head that it reads, where they are not in groups
            of equal size; else None.
        around_core: calls the core; another may recompute it in the backward pass.
    """

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
        self.site = AttentionSite(layer, spec.window_of(layer), scale)
        self.head_dim = spec.head_dim
        self.key_of_query: tuple[int, ...] | None = None
        self.around_core: Around = plainly
        self.query = Linear(spec.d_model, spec.d_query, bias=spec.qkv_bias)
        self.key = Linear(spec.d_model, spec.d_kv, bias=spec.qkv_bias)
        self.value = Linear(spec.d_model, spec.d_kv, bias=spec.qkv_bias)
        self.qkv: Linear | None = None  # in place of these three, once fused
        self.widths = (spec.d_query, spec.d_kv, spec.d_kv)
        self.output = Linear(spec.d_query, spec.d_model, bias=spec.output_bias)
        self.qk_norm = spec.qk_norm
        if spec.qk_norm != "none":
            is_whole = spec.qk_norm == "all"
            self.query_norm = make_norm(spec, spec.d_query if is_whole else spec.head_dim)
            self.key_norm = make_norm(spec, spec.d_kv if is_whole else spec.head_dim)

    def forward(
        self, x_BTD: Tensor, layout: Layout, angles: tuple[Tensor, Tensor] | None, attend: Attend
    ) -> Tensor:
        queries, keys, values = self._projected(x_BTD)
        q_BTNH, k_BTKH = self._normed(queries, keys)
        v_BTKH = self._heads(values)
        if angles is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, *angles), rotate(k_BTKH, *angles)
        if self.key_of_query is not None:
            k_BTKH, v_BTKH = k_BTKH[:, :, self.key_of_query], v_BTKH[:, :, self.key_of_query]
        core = partial(attend, layout=layout, site=self.site)
        out_BTNH = self.around_core(core, q_BTNH, k_BTKH, v_BTKH)
        return self.output(out_BTNH.flatten(2))

    @property
    def inputs(self) -> tuple[Linear, Linear, Linear]:
        """The projections of the input, in the order in which they are fused."""
        return self.query, self.key, self.value

    def _projected(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv is None:
            queries, keys, values = (project(x_BTD) for project in self.inputs)
            return queries, keys, values
        queries, keys, values = self.qkv(x_BTD).split(self.widths, dim=-1)
        return queries, keys, values

    def _normed(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys cut into heads, normed if the model does so."""
        if self.qk_norm == "all":
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        q_BTNH, k_BTKH = self._heads(queries), self._heads(keys)
        if self.qk_norm == "head":
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        return q_BTNH, k_BTKH

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))
