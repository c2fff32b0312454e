"""TokenRing: keys and values stay, queries go round one way and their outputs come back the other.

Source: Wang et al., TokenRing, arXiv:2412.20501, Sec. 3 (queries to the next rank, outputs and
    logarithms of sums straight to their owner while the next block is computed).
Replaces: ring.  Needs: mesh.cp > 1, links between all ranks of the axis to be as fast.
Forbids: peft, train.compile.
Cost: work as zigzag-ring. With A the bytes of a rank's queries of a layer, in the dtype of compute,
    and L those of one number a query and head, at least in float32, a rank sends forward (cp - 1) A
    to its next one and A + L to every other one, backward (cp - 1)(3 A + L) and A. So the busiest
    link, to the next rank, has cp A + L forward and (cp - 1)(3 A + L) + A backward. With as many
    key heads as query heads that is below the ring's 2 (cp - 1) A and 4 (cp - 1) A (float32) from
    three ranks on; with fewer key heads it is above.
Differs: queries go back with their output and its gradient, from which each rank finds what they
    need to meet its keys. Outputs travel whole, also where a rank's keys are not seen.
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

QUERIES, OUTPUTS = "queries", "outputs"
GUESTS, GRADIENTS = "queries and output gradients", "query gradients"


class TokenRingCore(Core):
    """Has the queries of every part pass by this rank's keys and values."""

    def __init__(self, world: World, placement: Placement) -> None:
        super().__init__(world, placement)
        purposes = QUERIES, OUTPUTS, GUESTS, GRADIENTS
        self._ring = Ring(world, placement, purposes, is_full=True)

    def forward(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, work: Work) -> Attended:
        ring, kv_2BSKH = self._ring, torch.stack([k_BTKH, v_BTKH])
        own, guest_BTNH = Sums(q_BTNH), q_BTNH
        coming: list[PendingTensor] = []
        for step in range(ring.size):
            (passed,) = self._pass_on((guest_BTNH,), step, QUERIES)
            sums = Sums(guest_BTNH) if step else own
            sums.meet(kv_2BSKH, work.blocks.between(ring.part(-step), ring.index), work.scale)
            if coming:  # from the step before: it has travelled meanwhile
                own.add(coming[0].wait(), coming[1].wait())
            if step:
                home = sums.out_BTNH.to(q_BTNH.dtype), sums.lse_BNT
                coming = [ring.receive(tensor, step, OUTPUTS) for tensor in home]
                for tensor in home:
                    ring.send(tensor, -step, OUTPUTS)
            guest_BTNH = passed.wait() if passed else guest_BTNH
            ring.finish()
        if coming:
            own.add(coming[0].wait(), coming[1].wait())
        return Attended(own.out_BTNH.to(q_BTNH.dtype), (own.lse_BNT,))

    def backward(
        self,
        grad_BTNH: Tensor,
        inputs: tuple[Tensor, ...],
        attended: Attended,
        work: Work,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ring, (q_BTNH, k_BTKH, v_BTKH) = self._ring, inputs
        kv_2BSKH = torch.stack([k_BTKH, v_BTKH])
        guest = torch.stack([q_BTNH, grad_BTNH, attended.out_BTNH]), *attended.kept
        own_BTNH, grad_kv_2BSKH = zeros_for(q_BTNH), zeros_for(kv_2BSKH)
        coming: PendingTensor | None = None
        for step in range(ring.size):
            passed = self._pass_on(guest, step, GUESTS)
            (visitor_BTNH, grad_BTNH, out_BTNH), lse_BNT = guest
            grad_q_BTNH = zeros_for(q_BTNH) if step else own_BTNH
            Queries(visitor_BTNH, grad_BTNH, out_BTNH, lse_BNT).meet(
                kv_2BSKH,
                work.blocks.between(ring.part(-step), ring.index),
                work.scale,
                grad_q_BTNH=grad_q_BTNH,
                grad_kv_2BSKH=grad_kv_2BSKH,
            )
            if coming is not None:
                own_BTNH += coming.wait()
            if step:
                home_BTNH = grad_q_BTNH.to(q_BTNH.dtype)
                coming = ring.receive(home_BTNH, step, GRADIENTS)
                ring.send(home_BTNH, -step, GRADIENTS)
            guest = tuple(x.wait() if x else y for x, y in zip(passed, guest, strict=True))
            ring.finish()
        if coming is not None:
            own_BTNH += coming.wait()
        grad_k_BTKH, grad_v_BTKH = grad_kv_2BSKH.to(k_BTKH.dtype)
        return own_BTNH.to(q_BTNH.dtype), grad_k_BTKH, grad_v_BTKH

    def _pass_on(
        self, guest: tuple[Tensor, ...], step: int, purpose: str
    ) -> tuple[PendingTensor | None, ...]:
        """Begins to give visiting queries to the next rank, and to take the next visitors."""
        if step == self._ring.size - 1:
            return (None,) * len(guest)
        passed = tuple(self._ring.receive(tensor, -1, purpose) for tensor in guest)
        for tensor in guest:
            self._ring.send(tensor, 1, purpose)
        return passed


def _place(num_ranks: int, _ulysses_degree: int) -> Placement:
    return Placement(num_ranks, is_zigzag=True)


METHOD = Method(place=_place, core=TokenRingCore)
