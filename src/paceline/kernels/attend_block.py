"""One block of attention: some queries over some keys, and how blocks make up the whole.

Source: Dao et al., FlashAttention, arXiv:2205.14135, Sec. 3.1 and Algorithm 4 (a softmax is put
    together from blocks by the logarithms of their sums; the gradients of a block follow from the
    output and the logarithm over all keys).
Replaces: nothing.  Needs: nothing.  Forbids: nothing.
Cost: on a CPU torch's fused kernel, which keeps no scores; elsewhere plain products, which keep
    those of one block at a time, in at least float32.
Differs: a row may see nothing in a block: its logarithm is -inf and it adds nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.kernels.compat import flash_backward, flash_forward


@dataclass(frozen=True, slots=True, eq=False)
class BlockMask:
    """Which keys of a block each of its queries sees.

    Attributes:
        bias_B1TS: 0 where a query sees a key, else -inf; B may be 1.
        is_blind_B1T: True for queries that see nothing.
    """

    bias_B1TS: Tensor
    is_blind_B1T: Tensor

    @classmethod
    def of(cls, seen_B1TS: Tensor, dtype: torch.dtype) -> BlockMask:
        """The mask that is True where a query sees a key, for queries of a dtype."""
        bias_B1TS = torch.zeros(seen_B1TS.shape, dtype=dtype, device=seen_B1TS.device)
        bias_B1TS.masked_fill_(~seen_B1TS, -math.inf)
        return cls(bias_B1TS, ~seen_B1TS.any(dim=-1))


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which blocks are added up: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def attend_block(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    mask: BlockMask | None,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of a block with N / K queries to each key head.

    Args:
        q_BTNH: queries.
        k_BSKH: keys.
        v_BSKH: values.
        mask: which keys queries see; None for all.
        is_causal: whether query t sees keys up to t; goes without a mask.
        scale: of the scores.

    Returns:
        out_BTNH in the dtype of the queries, and lse_BNT, at least in float32: the logarithm of the
        sum of each query's exponentials.
    """
    run = _flash if q_BTNH.device.type == "cpu" else attend_block_reference
    return run(q_BTNH, k_BSKH, v_BSKH, mask, is_causal=is_causal, scale=scale)


def attend_block_backward(
    grad_BTNH: Tensor,
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    out_BTNH: Tensor,
    lse_BNT: Tensor,
    mask: BlockMask | None,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a block adds to the gradients of its queries, keys and values.

    Args:
        grad_BTNH: the gradient of the whole output of these queries.
        q_BTNH: queries.
        k_BSKH: keys of the block.
        v_BSKH: values of the block.
        out_BTNH: output of these queries over all keys.
        lse_BNT: logarithm of the queries' sums over all keys; none may be -inf.
        mask: as forward.
        is_causal: as forward.
        scale: as forward.

    Returns:
        Gradients shaped as q, k and v.
    """
    run = _flash_backward if q_BTNH.device.type == "cpu" else attend_block_backward_reference
    tensors = (grad_BTNH, q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BNT, mask)
    return run(*tensors, is_causal=is_causal, scale=scale)


def merge(out_BTNH: Tensor, lse_BNT: Tensor, block_out_BTNH: Tensor, block_lse_BNT: Tensor) -> None:
    """Adds the keys of a block to an output, in place.

    Args:
        out_BTNH: over the keys so far, at least in float32.
        lse_BNT: of the same; -inf where there are none.
        block_out_BTNH: over other keys.
        block_lse_BNT: of these.
    """
    # A sigmoid of the difference: shares are exact however large both sums are. Where nothing was
    # seen and nothing is, -inf minus -inf would be no number.
    is_seen_BNT = block_lse_BNT > -math.inf
    share_BNT = (block_lse_BNT - lse_BNT).sigmoid().where(is_seen_BNT, 0.0)
    share_BTN1 = share_BNT.transpose(1, 2)[..., None].to(out_BTNH.dtype)
    out_BTNH.lerp_(block_out_BTNH.to(out_BTNH.dtype), share_BTN1)
    lse_BNT.copy_(torch.logaddexp(lse_BNT, block_lse_BNT))


def _flash(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    mask: BlockMask | None,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out_BNTH, lse_BNT = flash_forward(
        q_BTNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        0.0,
        is_causal,
        attn_mask=mask and mask.bias_B1TS,
        scale=scale,
    )
    if mask is not None:
        lse_BNT = lse_BNT.masked_fill(mask.is_blind_B1T, -math.inf)
    return out_BNTH.transpose(1, 2), lse_BNT


def _flash_backward(
    grad_BTNH: Tensor,
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    out_BTNH: Tensor,
    lse_BNT: Tensor,
    mask: BlockMask | None,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (grad_BTNH, q_BTNH, k_BSKH, v_BSKH, out_BTNH)
    grad_q, grad_k, grad_v = flash_backward(
        *(tensor.transpose(1, 2) for tensor in tensors),
        lse_BNT.contiguous(),
        0.0,
        is_causal,
        attn_mask=mask and mask.bias_B1TS,
        scale=scale,
    )
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2)


def attend_block_reference(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    mask: BlockMask | None,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`attend_block` in plain products."""
    scores_BNTS = _scores(q_BTNH, k_BSKH, mask, is_causal=is_causal, scale=scale)
    lse_BNT = scores_BNTS.logsumexp(dim=-1)
    probs_BNTS = (scores_BNTS - lse_BNT[..., None]).exp().nan_to_num(0.0)  # of rows that see none
    values_BSNH = _each_query(v_BSKH, q_BTNH.shape[2]).to(probs_BNTS.dtype)
    out_BTNH = torch.einsum("bnts,bsnh->btnh", probs_BNTS, values_BSNH)
    return out_BTNH.to(q_BTNH.dtype), lse_BNT


def attend_block_backward_reference(
    grad_BTNH: Tensor,
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    out_BTNH: Tensor,
    lse_BNT: Tensor,
    mask: BlockMask | None,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_block_backward` in plain products."""
    scores_BNTS = _scores(q_BTNH, k_BSKH, mask, is_causal=is_causal, scale=scale)
    dtype, num_heads, num_kv_heads = scores_BNTS.dtype, q_BTNH.shape[2], k_BSKH.shape[2]
    probs_BNTS = (scores_BNTS - lse_BNT[..., None]).exp()
    grad, out, q = (tensor.to(dtype) for tensor in (grad_BTNH, out_BTNH, q_BTNH))
    k_BSNH, v_BSNH = (_each_query(tensor, num_heads).to(dtype) for tensor in (k_BSKH, v_BSKH))
    grad_probs_BNTS = torch.einsum("btnh,bsnh->bnts", grad, v_BSNH)
    dot_BNT = (grad * out).sum(dim=-1).transpose(1, 2)
    grad_scores_BNTS = probs_BNTS * (grad_probs_BNTS - dot_BNT[..., None]) * scale
    grad_q = torch.einsum("bnts,bsnh->btnh", grad_scores_BNTS, k_BSNH)
    grad_k = torch.einsum("bnts,btnh->bsnh", grad_scores_BNTS, q)
    grad_v = torch.einsum("bnts,btnh->bsnh", probs_BNTS, grad)
    grad_k, grad_v = (g.unflatten(2, (num_kv_heads, -1)).sum(dim=3) for g in (grad_k, grad_v))
    return grad_q.to(q_BTNH.dtype), grad_k.to(k_BSKH.dtype), grad_v.to(v_BSKH.dtype)


def _scores(
    q_BTNH: Tensor, k_BSKH: Tensor, mask: BlockMask | None, *, is_causal: bool, scale: float
) -> Tensor:
    """(B, N, T, S), -inf where a query does not see a key."""
    dtype = wide(q_BTNH.dtype)
    k_BSNH = _each_query(k_BSKH, q_BTNH.shape[2])
    scores_BNTS = torch.einsum("btnh,bsnh->bnts", q_BTNH.to(dtype), k_BSNH.to(dtype)) * scale
    if is_causal:
        size = q_BTNH.shape[1], k_BSKH.shape[1]
        later_TS = torch.ones(size, dtype=torch.bool, device=q_BTNH.device).triu(1)
        scores_BNTS = scores_BNTS.masked_fill(later_TS, -math.inf)
    return scores_BNTS if mask is None else scores_BNTS + mask.bias_B1TS.to(dtype)


def _each_query(x_BSKH: Tensor, num_heads: int) -> Tensor:
    """Keys or values, once for every query head that reads them."""
    return x_BSKH.repeat_interleave(num_heads // x_BSKH.shape[2], dim=2)
