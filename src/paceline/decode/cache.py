"""Keys and values of the tokens that have been computed: the contract, and its plain form."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from paceline.kernels.attend import scaled_dot_product
from paceline.kernels.attend_paged import causal_mask_TS
from paceline.models.attention import AttentionSite
from paceline.models.layout import Layout
from paceline.plan.model_spec import ModelSpec

_FIRST_CAPACITY = 256


class KVCache(Protocol):
    """Keys and values of one sequence.

    A forward pass over the next tokens calls `attend` once a layer (it is the model's `Attend`)
    and then `commit`. Until it is committed a pass may be repeated or dropped.
    """

    @property
    def num_tokens(self) -> int:
        """Tokens committed; the next token's position."""
        ...

    def attend(
        self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, *, layout: Layout, site: AttentionSite
    ) -> Tensor:
        """Stores the keys and values of T new tokens and attends over all tokens; B is 1."""
        ...

    def commit(self, num_tokens: int) -> None:
        """Keeps the first `num_tokens` of the pass."""
        ...


class ContiguousCache:
    """One tensor a layer, doubled when it is full.

    Args:
        spec: sizes.
        dtype: of keys and values.
        device: where they are kept.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        self._limit = spec.max_positions
        shape = (spec.num_layers, 2, 1, _FIRST_CAPACITY, spec.num_kv_heads, spec.head_dim)
        self._store_L2BSKH = torch.empty(shape, dtype=dtype, device=device)
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def attend(
        self,
        q_BTNH: Tensor,
        k_BTKH: Tensor,
        v_BTKH: Tensor,
        *,
        layout: Layout,  # noqa: ARG002 (part of the seam)
        site: AttentionSite,
    ) -> Tensor:
        start, end = self._num_tokens, self._num_tokens + q_BTNH.shape[1]
        self._reserve(end)
        store_2BSKH = self._store_L2BSKH[site.layer]
        store_2BSKH[0, :, start:end] = k_BTKH
        store_2BSKH[1, :, start:end] = v_BTKH
        first = 0 if site.window is None else max(0, start + 1 - site.window)
        mask_TS = causal_mask_TS(start - first, end - start, site.window, q_BTNH.device)
        return scaled_dot_product(
            q_BTNH,
            store_2BSKH[0, :, first:end],
            store_2BSKH[1, :, first:end],
            mask_TS,
            is_causal=mask_TS is None and end - start > 1,
            scale=site.scale,
        )

    def commit(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens

    def _reserve(self, num_tokens: int) -> None:
        capacity = self._store_L2BSKH.shape[3]
        if num_tokens <= capacity:
            return
        assert num_tokens <= self._limit, f"{num_tokens} tokens exceed a context of {self._limit}"
        capacity = min(max(2 * capacity, num_tokens), self._limit)
        old = self._store_L2BSKH
        shape = (*old.shape[:3], capacity, *old.shape[4:])
        self._store_L2BSKH = torch.empty(shape, dtype=old.dtype, device=old.device)
        self._store_L2BSKH[:, :, :, : old.shape[3]] = old
