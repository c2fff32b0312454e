"""The contract of context parallelism: attention over rows whose places the `cp` ranks share.

Every rank has the queries, keys and values of its own places, rotated, and wants the outputs of its
queries over all keys of the row. A method says which places ranks have, and how they come by the
rest. Everything else of a model works on each place alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paceline.dist.world import World
from paceline.models.attention import Attend, AttentionSite
from paceline.models.layout import Layout
from paceline.parallel.context.blocks import Blocks
from paceline.parallel.context.placement import Placement


class Attended(NamedTuple):
    """What a forward pass gives, and what its backward pass needs of it.

    Attributes:
        out_BTNH: in the dtype of the queries.
        kept: in whatever form the core wants it.
    """

    out_BTNH: Tensor
    kept: tuple[Tensor, ...]


class Core(ABC):
    """A `paceline.models.attention.Attend` over the ranks of the `cp` axis.

    All of them call it for the same layers in the same order, forward and backward.

    Args:
        world: the ranks.
        placement: which places each of them has.

    Attributes:
        needs_inputs: whether `backward` needs queries, keys and values; else what is kept of the
            forward pass will do, and they are empty.
    """

    needs_inputs: bool = True

    def __init__(self, world: World, placement: Placement) -> None:
        self.world = world
        self.placement = placement

    def __call__(
        self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, *, layout: Layout, site: AttentionSite
    ) -> Tensor:
        return _Attention.apply(q_BTNH, k_BTKH, v_BTKH, _Call(self, layout, site))

    def keeping(self) -> Attend:
        """For one attention of one pass: what it gives is kept, and is not computed again where
        the attention is.
        """
        return _Keeping(self)

    @abstractmethod
    def forward(
        self,
        q_BTNH: Tensor,
        k_BTKH: Tensor,
        v_BTKH: Tensor,
        blocks: Blocks,
        scale: float,
    ) -> Attended:
        """The attention of this rank's queries over all keys of their rows.

        Args:
            q_BTNH: of this rank's places.
            k_BTKH: of the same.
            v_BTKH: of the same.
            blocks: which queries see which keys.
            scale: of the scores.
        """

    @abstractmethod
    def backward(
        self,
        grad_BTNH: Tensor,
        inputs: tuple[Tensor, ...],
        attended: Attended,
        blocks: Blocks,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of queries, keys and values of this rank's places, over all ranks' losses.

        Args:
            grad_BTNH: of the output.
            inputs: queries, keys and values, or nothing: see `needs_inputs`.
            attended: what the forward pass gave.
            blocks: as forward.
            scale: as forward.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A method and its placement.

    Attributes:
        place: gives the placement for a number of ranks, and how many of them share heads where
            the method has a choice.
        core: makes the core, on all ranks at the same time.
    """

    place: Callable[[int, int], Placement]
    core: Callable[[World, Placement], Core]


@dataclass(slots=True)
class _Call:
    """One attention of one pass.

    Attributes:
        core: that attends.
        layout: of this rank's places.
        site: the calling attention.
        found: what the core has given; where it is there, the core is not called.
        is_kept: whether it is to be there for another call.
    """

    core: Core
    layout: Layout
    site: AttentionSite
    found: Attended | None = None
    is_kept: bool = False

    def blocks(self, q_BTNH: Tensor) -> Blocks:
        """Made once a micro-batch for each window; all layers share them."""
        whole, window, dtype = self.layout.whole, self.site.window, q_BTNH.dtype
        assert whole is not None, "the layout is of whole rows"
        placement, device = self.core.placement, q_BTNH.device
        make: Callable[[], Blocks] = lambda: Blocks(  # noqa: E731
            whole, placement, window=window, dtype=dtype, device=device
        )
        return self.layout.once((window, dtype), make)


class _Keeping:
    """Attends the first time and remembers it.

    Args:
        core: that attends.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._call: _Call | None = None

    def __call__(
        self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, *, layout: Layout, site: AttentionSite
    ) -> Tensor:
        if self._call is None:
            self._call = _Call(self._core, layout, site, is_kept=True)
        return _Attention.apply(q_BTNH, k_BTKH, v_BTKH, self._call)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, call: _Call) -> Tensor:
        blocks, scale = call.blocks(q_BTNH), call.site.scale
        found = call.found or call.core.forward(q_BTNH, k_BTKH, v_BTKH, blocks, scale)
        if call.is_kept:
            # Another tensor of the same memory: the output itself will hold on to the graph.
            call.found = Attended(found.out_BTNH.detach(), found.kept)
        out_BTNH = found.out_BTNH.detach()
        inputs = (q_BTNH, k_BTKH, v_BTKH) if call.core.needs_inputs else ()
        ctx.save_for_backward(out_BTNH, *inputs, *found.kept)
        ctx.call, ctx.blocks, ctx.num_inputs = call, blocks, len(inputs)
        return out_BTNH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        out_BTNH, *saved = ctx.saved_tensors
        inputs, kept = tuple(saved[: ctx.num_inputs]), tuple(saved[ctx.num_inputs :])
        attended, scale = Attended(out_BTNH, kept), ctx.call.site.scale
        gradients = ctx.call.core.backward(grad_outputs[0], inputs, attended, ctx.blocks, scale)
        return *gradients, None
