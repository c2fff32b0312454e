"""How the ranks of the `cp` axis share sequences: each has some places of every row.

Parameters are whole on all of them, and every rank's gradient is one term of a sum over them; this
is where it is made, once a step.

Cost: an all-reduce over cp of the gradients that a rank holds once data ranks have summed theirs,
    so of 1 / dp_shard of them from ZeRO stage 1 on, in the dtype of reductions. State is not shared
    over cp.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from paceline.data.batch import IGNORED, Batch
from paceline.dist.world import World
from paceline.models.layout import PADDING
from paceline.optim.parts import Part
from paceline.parallel.buckets import sum_in_buckets
from paceline.parallel.context import METHODS
from paceline.parallel.context.base import Method
from paceline.parallel.context.placement import AXIS
from paceline.plan.plan import Plan

GRADIENTS = "context parallel gradients"


class SharedSequences:
    """This rank's share of every sequence.

    Every rank makes one at the same time.

    Args:
        plan: whose `cp` ranks share sequences.
        world: the ranks.

    Attributes:
        attend: the core of attention over all of them.
    """

    def __init__(self, plan: Plan, world: World) -> None:
        method: Method = METHODS.load(plan.context.method)
        self._world = world
        self._placement = method.place(plan.mesh.cp, plan.ulysses_degree)
        self.attend = method.core(world, self._placement)

    def share(self, batch: Batch) -> Batch:
        """The places of a batch that this rank has; every rank has equally many.

        Rows are padded to a multiple of what the placement needs: with places that have no label
        and no document.
        """
        length = batch.tokens_BT.shape[1]
        missing = self._placement.padded(length) - length
        ranges = self._placement.places(self._world.coordinate(AXIS), length + missing)
        device = batch.tokens_BT.device
        places_T = torch.cat([torch.arange(r.start, r.stop, device=device) for r in ranges])

        def padded(x_BT: Tensor, value: int) -> Tensor:
            return functional.pad(x_BT, (0, missing), value=value)

        return Batch(
            padded(batch.tokens_BT, 0)[:, places_T],
            padded(batch.labels_BT, IGNORED)[:, places_T],
            padded(batch.documents_BT, PADDING),
            places_T,
        )

    def finish_gradients(
        self, parts: Mapping[str, Part], names: Iterable[str], dtype: torch.dtype
    ) -> None:
        """Makes terms of gradients to sums over the ranks.

        Args:
            parts: of this rank, their gradients summed over data ranks.
            names: of the parameters whose gradients are terms.
            dtype: in which sums are made.

        Comm: an all-reduce over cp of these parts' gradients.
        """
        held = [parts[name] for name in names if parts[name].tensor.requires_grad]
        gradients = [part.ensured_gradient() for part in held]
        sum_in_buckets(gradients, self._world, (AXIS,), purpose=GRADIENTS, dtype=dtype)
