"""Softmax(scale q k^T) v: torch's fused kernel, and one query at the rate of memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from paceline.kernels import native


def scaled_dot_product(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Attention with N / K queries to each key head.

    Args:
        q_BTNH: queries.
        k_BSKH: keys.
        v_BSKH: values.
        mask: True where a query sees a key, broadcast to (B, N, T, S); None for all keys.
        is_causal: whether query t sees keys up to t; goes without a mask.
        scale: of the scores.

    Returns:
        out_BTNH; the softmax is at least in float32.
    """
    is_one_query = q_BTNH.shape[:2] == (1, 1) and mask is None and not is_causal
    if is_one_query and native.takes(q_BTNH, k_BSKH, v_BSKH):
        return _one_query(q_BTNH, k_BSKH, v_BSKH, scale)
    out_BNTH = functional.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q_BTNH.shape[2] != k_BSKH.shape[2],
    )
    return out_BNTH.transpose(1, 2)


def _one_query(q_11NH: Tensor, k_1SKH: Tensor, v_1SKH: Tensor, scale: float) -> Tensor:
    out_11NH = torch.empty_like(q_11NH)
    num_keys, num_kv_heads, head_dim = k_1SKH.shape[1:]
    sizes = (num_keys, q_11NH.shape[2], num_kv_heads, head_dim)
    threads = torch.get_num_threads()
    native.call("attend", q_11NH.dtype, q_11NH, k_1SKH, v_1SKH, out_11NH, *sizes, scale, threads)
    return out_11NH
