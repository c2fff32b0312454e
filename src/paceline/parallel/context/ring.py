"""Ring attention: keys and values go round the ranks, queries stay.

Source: Li et al., Sequence Parallelism (ring self-attention), arXiv:2105.13120, Sec. 3.2; Liu et
    al., Ring Attention, arXiv:2310.01889, Sec. 3 (blocks of a softmax while the next keys travel).
Replaces: nothing.  Needs: mesh.cp > 1.  Forbids: peft, train.compile.
Cost: activations of 1 / cp of each row a rank. With E the bytes of a rank's keys and values of a
    layer, and G those of their gradients, which are at least in float32, a rank sends its next one
    (cp - 1) E forward and (cp - 1)(E + G) backward. A causal mask leaves the first rank one block
    of work and the last one cp.
Differs: no scores are exchanged (2105.13120 sends them in two stages). A rank's own share of the
    gradients of its keys and values does not travel. Blocks that nobody sees are not computed,
    though their keys travel on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.dist.p2p import PendingTensor
from paceline.dist.world import World
from paceline.parallel.context.base import Attended, Core, Method, Work
from paceline.parallel.context.blocks import Queries, Sums, zeros_for
from paceline.parallel.context.placement import Placement
from paceline.parallel.context.travel import Ring

KEYS, GRADIENTS = "keys and values", "gradients of keys and values"
PURPOSES = KEYS, GRADIENTS


class RingCore(Core):
    """Has the keys and values of every part pass by this rank's queries."""

    def __init__(self, world: World, placement: Placement) -> None:
        super().__init__(world, placement)
        self._ring = Ring(world, placement, PURPOSES)

    def forward(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, work: Work) -> Attended:
        kv_2BSKH = torch.stack([k_BTKH, v_BTKH])
        return ring_forward(self._ring, q_BTNH, kv_2BSKH, work)

    def backward(
        self,
        grad_BTNH: Tensor,
        inputs: tuple[Tensor, ...],
        attended: Attended,
        work: Work,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q_BTNH, k_BTKH, v_BTKH = inputs
        queries = Queries(q_BTNH, grad_BTNH, attended.out_BTNH, *attended.kept)
        kv_2BSKH = torch.stack([k_BTKH, v_BTKH])
        grad_q_BTNH, grad_kv_2BSKH = ring_backward(self._ring, queries, kv_2BSKH, work)
        grad_k_BTKH, grad_v_BTKH = grad_kv_2BSKH.to(k_BTKH.dtype)
        return grad_q_BTNH, grad_k_BTKH, grad_v_BTKH


def ring_forward(ring: Ring, q_BTNH: Tensor, kv_2BSKH: Tensor, work: Work) -> Attended:
    """The output of this rank's queries over all parts; what is kept is lse_BNT.

    Args:
        ring: the ranks that have the other parts.
        q_BTNH: of this rank's part.
        kv_2BSKH: keys and values of the same.
        work: what they see.
    """
    sums = Sums(q_BTNH)
    for step in range(ring.size):
        passed = _pass_on(ring, kv_2BSKH, step)
        sums.meet(kv_2BSKH, work.blocks.between(ring.index, ring.part(-step)), work.scale)
        if passed is not None:
            kv_2BSKH = passed.wait()
            ring.finish()  # at most two parts are here at a time
    return Attended(sums.out_BTNH.to(q_BTNH.dtype), (sums.lse_BNT,))


def ring_backward(
    ring: Ring, queries: Queries, kv_2BSKH: Tensor, work: Work
) -> tuple[Tensor, Tensor]:
    """Gradients of queries, in their dtype, and of keys and values, at least in float32.

    What a part's keys and values get on other ranks travels one step behind them, and comes home
    from the last of these.
    """
    grad_q_BTNH = zeros_for(queries.q_BTNH)
    grad_kv_2BSKH = own_2BSKH = zeros_for(kv_2BSKH)
    coming = None
    for step in range(ring.size):
        passed = _pass_on(ring, kv_2BSKH, step)
        queries.meet(
            kv_2BSKH,
            work.blocks.between(ring.index, ring.part(-step)),
            work.scale,
            grad_q_BTNH=grad_q_BTNH,
            grad_kv_2BSKH=grad_kv_2BSKH,
        )
        if coming is not None:  # what the ranks before have given to the same part
            grad_kv_2BSKH += coming.wait()
        if step:
            coming = ring.receive(grad_kv_2BSKH, -1, GRADIENTS)
            ring.send(grad_kv_2BSKH, 1, GRADIENTS)
        if passed is not None:
            kv_2BSKH = passed.wait()
            grad_kv_2BSKH = zeros_for(kv_2BSKH)
        ring.finish()
    if coming is not None:
        own_2BSKH += coming.wait()
    return grad_q_BTNH.to(queries.q_BTNH.dtype), own_2BSKH


def _pass_on(ring: Ring, kv_2BSKH: Tensor, step: int) -> PendingTensor | None:
    """Begins to give a part's keys and values to the next rank, and to take the next part's."""
    if step == ring.size - 1:
        return None
    passed = ring.receive(kv_2BSKH, -1, KEYS)
    ring.send(kv_2BSKH, 1, KEYS)
    return passed


def _place(num_ranks: int, _ulysses_degree: int) -> Placement:
    return Placement(num_ranks)


METHOD = Method(place=_place, core=RingCore)
