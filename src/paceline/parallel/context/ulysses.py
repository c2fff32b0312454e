"""Ulysses: an all-to-all gives each rank some heads of all tokens, and another takes them back.

Source: Jacobs et al., DeepSpeed Ulysses, arXiv:2309.14509, Sec. 3.1.
Replaces: ring.  Needs: mesh.cp > 1, at most as many ranks as a tensor rank's query heads.
Forbids: peft, train.compile.
Cost: activations of 1 / cp of each row a rank. With T the tokens of a micro-batch on a rank, H the
    size of a head, n_r and k_r the query and key heads of rank r, a rank sends of a layer, in
    numbers of the compute dtype, T H (sum of n + 2 k of the others) of queries, keys and values and
    (cp - 1) T H n_r of outputs; backward T H (sum of n of the others) of gradients of outputs, and
    (cp - 1) T H (n_r + 2 k_r) of those of queries, keys and values.
Differs: heads go round as evenly as they can, whatever their number; a key head is copied to every
    rank whose query heads read it. One all-to-all carries queries, keys and values. The core is the
    block kernel on whole rows, which on a CPU is what torch's own attention runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.dist.world import World
from paceline.parallel.context.base import Attended, Core, Method, Work
from paceline.parallel.context.blocks import Queries, wide
from paceline.parallel.context.placement import AXIS, Placement
from paceline.parallel.context.ring import PURPOSES, ring_backward, ring_forward
from paceline.parallel.context.travel import Ring
from paceline.plan.tensor_rules import HeadShare, head_share

HEADS = "heads"


class UlyssesCore(Core):
    """Exchanges heads among the ranks of a part, then rings its keys round the other parts."""

    needs_inputs = False

    def __init__(self, world: World, placement: Placement) -> None:
        super().__init__(world, placement)
        self._ring = Ring(world, placement, PURPOSES)

    def forward(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, work: Work) -> Attended:
        exchange = Exchange(self.world, self.placement, work)
        q_BSnH, *keys = exchange.to_heads(q_BTNH, k_BTKH, v_BTKH)
        kv_2BSkH = torch.stack([exchange.for_queries(x_BSkH) for x_BSkH in keys])
        found = ring_forward(self._ring, q_BSnH, kv_2BSkH, work)
        (out_BTNH,) = exchange.to_tokens(found.out_BTNH)
        return Attended(out_BTNH, (q_BSnH, kv_2BSkH, found.out_BTNH, *found.kept))

    def backward(
        self,
        grad_BTNH: Tensor,
        inputs: tuple[Tensor, ...],
        attended: Attended,
        work: Work,
    ) -> tuple[Tensor, Tensor, Tensor]:
        del inputs
        q_BSnH, kv_2BSkH, out_BSnH, lse_BnS = attended.kept
        exchange = Exchange(self.world, self.placement, work)
        (grad_BSnH,) = exchange.to_heads(grad_BTNH)
        queries = Queries(q_BSnH, grad_BSnH, out_BSnH, lse_BnS)
        grad_q, grad_kv = ring_backward(self._ring, queries, kv_2BSkH, work)
        grad_k, grad_v = (exchange.of_keys(grad).to(grad_q.dtype) for grad in grad_kv)
        gradients = exchange.to_tokens(grad_q, grad_k, grad_v)
        return gradients[0], gradients[1], gradients[2]


class Exchange:
    """All-to-alls between tokens of all heads and heads of all tokens, among the ranks of a part.

    Tensors of as many heads as there are queries are shared out as these are, others as keys are.

    Args:
        world: the ranks.
        placement: which of them have a part in common.
        work: with the number of heads that all tokens have.
    """

    def __init__(self, world: World, placement: Placement, work: Work) -> None:
        self._world = world
        degree, rank = placement.ranks_per_part, world.coordinate(AXIS)
        self._first, self._me = rank - rank % degree, rank % degree
        self._num_heads, self._num_kv_heads = work.num_heads, work.num_kv_heads
        heads = work.num_heads, work.num_kv_heads
        self._shares = [head_share(*heads, degree, member) for member in range(degree)]

    def to_heads(self, *tensors: Tensor) -> list[Tensor]:
        """Of (B, T, all heads, H) tensors of this rank's tokens (B, S, this rank's heads, H)."""
        batch, length, _, _ = tensors[0].shape
        is_keys = [index > 0 for index in range(len(tensors))]
        sent = [
            [x[:, :, _heads(share, keys)] for x, keys in zip(tensors, is_keys, strict=True)]
            for share in self._shares
        ]
        widths = [len(_range(self._shares[self._me], keys)) for keys in is_keys]
        came = self._exchange(sent, [batch * length * sum(widths)] * len(self._shares))
        per_rank = (_cut(rows_RH, batch, length, widths) for rows_RH in came)
        return [torch.cat(parts, dim=1) for parts in zip(*per_rank, strict=True)]

    def to_tokens(self, *tensors: Tensor) -> list[Tensor]:
        """Of (B, S, this rank's heads, H) tensors (B, T, all heads, H) of this rank's tokens.

        What several ranks have of one key head is summed.
        """
        degree, is_keys = len(self._shares), [index > 0 for index in range(len(tensors))]
        batch, length = tensors[0].shape[0], tensors[0].shape[1] // degree
        sent = [list(pieces) for pieces in zip(*(x.chunk(degree, 1) for x in tensors), strict=True)]
        widths = [[len(_range(share, keys)) for keys in is_keys] for share in self._shares]
        came = self._exchange(sent, [batch * length * sum(of_rank) for of_rank in widths])
        totals = [
            torch.zeros(
                (batch, length, self._num_kv_heads if keys else self._num_heads, x.shape[3]),
                dtype=wide(x.dtype),
                device=x.device,
            )
            for x, keys in zip(tensors, is_keys, strict=True)
        ]
        for share, of_rank, rows_RH in zip(self._shares, widths, came, strict=True):
            found = _cut(rows_RH, batch, length, of_rank)
            for total, keys, x in zip(totals, is_keys, found, strict=True):
                total[:, :, _heads(share, keys)] += x
        return [total.to(x.dtype) for total, x in zip(totals, tensors, strict=True)]

    def for_queries(self, x_BSkH: Tensor) -> Tensor:
        """This rank's keys or values, one for each query where they are not in equal groups."""
        share = self._shares[self._me]
        return x_BSkH if share.is_grouped else x_BSkH[:, :, share.key_of_query]

    def of_keys(self, grad_BSkH: Tensor) -> Tensor:
        """The gradient of what `for_queries` took."""
        share = self._shares[self._me]
        if share.is_grouped:
            return grad_BSkH
        shape = (*grad_BSkH.shape[:2], len(share.key), grad_BSkH.shape[3])
        index = torch.tensor(share.key_of_query, device=grad_BSkH.device)
        return grad_BSkH.new_zeros(shape).index_add_(2, index, grad_BSkH)

    def _exchange(
        self, tensors: Sequence[Sequence[Tensor]], received: Sequence[int]
    ) -> Sequence[Tensor]:
        """What each rank of the part sends, as rows of one head's numbers.

        Args:
            tensors: for each of these ranks.
            received: rows from each of them.
        """
        flat = [torch.cat([x.flatten(0, 2) for x in of_rank]) for of_rank in tensors]
        outside = self._world.degree(AXIS) - self._first - len(flat)
        before, after = [0] * self._first, [0] * outside
        rows_RH = self._world.all_to_all(
            torch.cat(flat),
            AXIS,
            [*before, *map(len, flat), *after],
            [*before, *received, *after],
            purpose=HEADS,
        )
        return rows_RH.split(list(received))


def _range(share: HeadShare, is_keys: bool) -> range:
    return share.key if is_keys else share.query


def _heads(share: HeadShare, is_keys: bool) -> slice:
    heads = _range(share, is_keys)
    return slice(heads.start, heads.stop)


def _cut(rows_RH: Tensor, batch: int, length: int, widths: Sequence[int]) -> list[Tensor]:
    """Rows that one rank has sent as tensors (B, T, heads, H)."""
    parts = rows_RH.split([batch * length * width for width in widths])
    pairs = zip(parts, widths, strict=True)
    return [part.unflatten(0, (batch, length, width)) for part, width in pairs]


def _place(num_ranks: int, _ulysses_degree: int) -> Placement:
    return Placement(1, ranks_per_part=num_ranks)


METHOD = Method(place=_place, core=UlyssesCore)
