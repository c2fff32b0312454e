"""The blocks of attention between parts of rows: which there are, and what each of them needs.

A query at place t of a row sees the keys from the first place of its document, or of its window
where that begins later, to t. So the queries of one chunk of places see of another chunk nothing,
all, a causal square, or what a mask says; and what nobody sees at a chunk's ends is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.kernels.attend_block import (
    BlockMask,
    attend_block,
    attend_block_backward,
    merge,
    wide,
)
from paceline.models.layout import Layout
from paceline.parallel.context.placement import Placement


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Some queries of a part and the keys that they see of another.

    Attributes:
        queries: where they are among the queries of their part.
        keys: where they are among the keys of theirs.
        is_causal: whether query t sees keys up to t; goes without a mask.
        mask: which keys queries see; None for all.
        num_pairs: of a query and a key that it sees, over the rows that differ.
    """

    queries: slice
    keys: slice
    is_causal: bool
    mask: BlockMask | None
    num_pairs: int


class Blocks:
    """The blocks between the parts of a micro-batch's rows, each made once.

    Args:
        layout: of the whole rows.
        placement: how they are cut.
        window: tokens that a query sees, its own among them; None for all.
        dtype: of queries.
        device: of masks.
    """

    def __init__(
        self,
        layout: Layout,
        placement: Placement,
        *,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._placement = placement
        self._dtype, self._device = dtype, device
        self._first_BS = _first_seen(layout, window)
        self._made: dict[tuple[int, int], tuple[Block, ...]] = {}

    def between(self, query_part: int, key_part: int) -> tuple[Block, ...]:
        """What the queries of a part see of the keys of another, or of their own."""
        key = query_part, key_part
        if key not in self._made:
            self._made[key] = self._between(query_part, key_part)
        return self._made[key]

    def _between(self, query_part: int, key_part: int) -> tuple[Block, ...]:
        length = self._first_BS.shape[1]
        found: list[Block] = []
        query_start = 0
        for queries in self._placement.part(query_part, length):
            key_start = 0
            for keys in self._placement.part(key_part, length):
                block = self._of(queries, keys, query_start, key_start)
                found += [block] if block else []
                key_start += len(keys)
            query_start += len(queries)
        return tuple(found)

    def _of(self, queries: range, keys: range, query_start: int, key_start: int) -> Block | None:
        """The block of two chunks, which begin at these tokens of their parts."""
        places_T = torch.arange(queries.start, queries.stop)
        low_BT = self._first_BS[:, queries.start : queries.stop].clamp(min=keys.start)
        high_BT = (places_T + 1).clamp(max=keys.stop).expand_as(low_BT)
        num_seen_BT = (high_BT - low_BT).clamp(min=0)
        is_seeing_BT = num_seen_BT > 0
        if not bool(is_seeing_BT.any()):
            return None
        rows = is_seeing_BT.any(dim=0).nonzero()[:, 0]
        t = slice(int(rows[0]), int(rows[-1]) + 1)
        seen = range(int(low_BT[is_seeing_BT].min()), int(high_BT[is_seeing_BT].max()))
        num_seen_BT, first = num_seen_BT[:, t], int(places_T[t.start])
        is_square = first == seen.start and num_seen_BT.shape[1] == len(seen)
        is_causal = is_square and bool((num_seen_BT == torch.arange(1, len(seen) + 1)).all())
        is_full = bool((num_seen_BT == len(seen)).all())
        keys_at = key_start + seen.start - keys.start
        return Block(
            queries=slice(query_start + t.start, query_start + t.stop),
            keys=slice(keys_at, keys_at + len(seen)),
            is_causal=is_causal and not is_full,
            mask=None if is_causal or is_full else self._mask(low_BT[:, t], high_BT[:, t], seen),
            num_pairs=int(num_seen_BT.sum()),
        )

    def _mask(self, low_BT: Tensor, high_BT: Tensor, keys: range) -> BlockMask:
        places_S = torch.arange(keys.start, keys.stop)
        seen_BTS = (low_BT[..., None] <= places_S) & (places_S < high_BT[..., None])
        return BlockMask.of(seen_BTS[:, None].to(self._device), self._dtype)


def _first_seen(layout: Layout, window: int | None) -> Tensor:
    """The first place that the query at each place sees, (B, S); B is 1 where rows are alike."""
    positions_BS = layout.positions_BT.cpu()
    if layout.documents_BT is None:
        positions_BS = positions_BS[:1]
    places_S = torch.arange(positions_BS.shape[1])
    first_BS = places_S - positions_BS
    return first_BS if window is None else torch.maximum(first_BS, places_S - window + 1)


class Sums:
    """The output of some queries over the keys that they have met so far.

    Args:
        q_BTNH: the queries.

    Attributes:
        out_BTNH: at least in float32.
        lse_BNT: logarithm of each query's sum; -inf before it has met a key.
    """

    def __init__(self, q_BTNH: Tensor) -> None:
        dtype = wide(q_BTNH.dtype)
        batch, length, num_heads, _ = q_BTNH.shape
        self._q_BTNH = q_BTNH
        self.out_BTNH = torch.zeros_like(q_BTNH, dtype=dtype)
        self.lse_BNT = self.out_BTNH.new_full((batch, num_heads, length), -torch.inf)

    def meet(self, kv_2BSKH: Tensor, blocks: tuple[Block, ...], scale: float) -> None:
        """Adds the keys and values of a part."""
        for block in blocks:
            k_BSKH, v_BSKH = kv_2BSKH[:, :, block.keys]
            out_BTNH, lse_BNT = attend_block(
                self._q_BTNH[:, block.queries],
                k_BSKH,
                v_BSKH,
                block.mask,
                is_causal=block.is_causal,
                scale=scale,
            )
            self.add(out_BTNH, lse_BNT, block.queries)

    def add(self, out_BTNH: Tensor, lse_BNT: Tensor, queries: slice = slice(None)) -> None:
        """Adds an output of some of the queries over other keys."""
        merge(self.out_BTNH[:, queries], self.lse_BNT[:, :, queries], out_BTNH, lse_BNT)


@dataclass(frozen=True, slots=True, eq=False)
class Queries:
    """Queries on their way back: what the gradients of a block follow from.

    Attributes:
        q_BTNH: the queries.
        grad_BTNH: the gradient of their output.
        out_BTNH: their output over all keys.
        lse_BNT: logarithm of their sums over all keys.
    """

    q_BTNH: Tensor
    grad_BTNH: Tensor
    out_BTNH: Tensor
    lse_BNT: Tensor

    def meet(
        self,
        kv_2BSKH: Tensor,
        blocks: tuple[Block, ...],
        scale: float,
        *,
        grad_q_BTNH: Tensor,
        grad_kv_2BSKH: Tensor,
    ) -> None:
        """Adds what they and the keys and values of a part give to both's gradients, in place."""
        for block in blocks:
            k_BSKH, v_BSKH = kv_2BSKH[:, :, block.keys]
            grad_q, grad_k, grad_v = attend_block_backward(
                self.grad_BTNH[:, block.queries],
                self.q_BTNH[:, block.queries],
                k_BSKH,
                v_BSKH,
                self.out_BTNH[:, block.queries],
                self.lse_BNT[:, :, block.queries],
                block.mask,
                is_causal=block.is_causal,
                scale=scale,
            )
            grad_q_BTNH[:, block.queries] += grad_q
            grad_kv_2BSKH[0, :, block.keys] += grad_k
            grad_kv_2BSKH[1, :, block.keys] += grad_v


def zeros_for(x: Tensor) -> Tensor:
    """Where gradients of a tensor are added up: at least in float32."""
    return torch.zeros(x.shape, dtype=wide(x.dtype), device=x.device)
