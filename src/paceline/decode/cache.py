"""Keys and values of the tokens that have been computed: the contract, and its plain form."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from paceline.models.attention import scaled_dot_product
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
        self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, *, layout: Layout, layer: int
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
        layer: int,
    ) -> Tensor:
        start, end = self._num_tokens, self._num_tokens + q_BTNH.shape[1]
        self._reserve(end)
        store_2BSKH = self._store_L2BSKH[layer]
        store_2BSKH[0, :, start:end] = k_BTKH
        store_2BSKH[1, :, start:end] = v_BTKH
        mask_TS = None
        if start and end - start > 1:  # a chunk after the first: torch's causal flag is for squares
            mask_TS = torch.ones(end - start, end, dtype=torch.bool, device=q_BTNH.device).tril(
                start
            )
        return scaled_dot_product(
            q_BTNH,
            store_2BSKH[0, :, :end],
            store_2BSKH[1, :, :end],
            mask_TS,
            is_causal=start == 0 and end > 1,
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
