"""The contract of context parallelism: attention over rows whose places the `cp` ranks share.

Every rank has the queries, keys and values of its own places, rotated, and wants the outputs of its
queries over all keys of the row. A method says which places ranks have, and how they come by the
rest. Everything else of a model works on each place alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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


class Work(NamedTuple):
    """What an attention has to do.

    Attributes:
        blocks: which queries see which keys.
        scale: of the scores.
        num_heads: queries of each of this rank's tokens.
        num_kv_heads: keys of the same.
    """

    blocks: Blocks
    scale: float
    num_heads: int
    num_kv_heads: int


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
    def forward(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, work: Work) -> Attended:
        """The attention of this rank's queries over all keys of their rows.

        Args:
            q_BTNH: of this rank's places.
            k_BTKH: of the same.
            v_BTKH: of the same.
            work: what they see.
        """

    @abstractmethod
    def backward(
        self,
        grad_BTNH: Tensor,
        inputs: tuple[Tensor, ...],
        attended: Attended,
        work: Work,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of queries, keys and values of this rank's places, over all ranks' losses.

        Args:
            grad_BTNH: of the output.
            inputs: queries, keys and values, or nothing: see `needs_inputs`.
            attended: what the forward pass gave.
            work: as forward.
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

    def work(self, q_BTNH: Tensor, k_BTKH: Tensor) -> Work:
        """Its blocks are made once a micro-batch for each window; all layers share them."""
        whole, window = self.layout.whole, self.site.window
        assert whole is not None, "the layout is of whole rows"
        make = partial(
            Blocks,
            whole,
            self.core.placement,
            window=window,
            dtype=q_BTNH.dtype,
            device=q_BTNH.device,
        )
        blocks: Blocks = self.layout.once((window, q_BTNH.dtype), make)
        return Work(blocks, self.site.scale, q_BTNH.shape[2], k_BTKH.shape[2])


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
        work = call.work(q_BTNH, k_BTKH)
        found = call.found or call.core.forward(q_BTNH, k_BTKH, v_BTKH, work)
        if call.is_kept:
            # Another tensor of the same memory: the output itself will hold on to the graph.
            call.found = Attended(found.out_BTNH.detach(), found.kept)
        out_BTNH = found.out_BTNH.detach()
        inputs = (q_BTNH, k_BTKH, v_BTKH) if call.core.needs_inputs else ()
        ctx.save_for_backward(out_BTNH, *inputs, *found.kept)
        ctx.core, ctx.work, ctx.num_inputs = call.core, work, len(inputs)
        return out_BTNH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        out_BTNH, *saved = ctx.saved_tensors
        inputs, kept = tuple(saved[: ctx.num_inputs]), tuple(saved[ctx.num_inputs :])
        attended = Attended(out_BTNH, kept)
        return *ctx.core.backward(grad_outputs[0], inputs, attended, ctx.work), None
