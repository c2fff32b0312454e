"""Ladder residual: a sublayer runs while the output of the one before it is still being summed.

Source: Zhang et al., Ladder-residual, arXiv:2501.06589, Sec. 3.
Replaces: the decoder's block, from layer `ModelSpec.ladder_from` on.
Needs: norms before sublayers only.
Forbids: mesh.pp > 1; with mesh.tp > 1, tensor.sequence_parallel and experts.
Cost: the block's own. Each of a sublayer's two sums over tensor ranks, forward and backward, takes
    as long as it does beyond the neighbouring sublayer's computation.
Differs: of a model that is converted from a layer on, the first two sublayers there both see the
    plain layers' whole result.

With h_0, h_1, ... the ladder layers' attentions and feed-forwards in turn, each behind its norm,
and x the stream before them:

    x_0 = x + h_0(x);  x_1 = x_0 + h_1(x);  x_i = x_(i-1) + h_i(x_(i-2))

The last output is waited for in the last layer, before the decoder's norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from paceline.models.attention import Attend, Attention
from paceline.models.ffn import FeedForward
from paceline.models.layout import Layout
from paceline.models.linear import make_norm
from paceline.models.moe import MixtureOfExperts, feed
from paceline.plan.model_spec import ModelSpec


class Stream(NamedTuple):
    """The residual stream between sublayers, as hooks and recomputation take it: a plain tuple.

    Attributes:
        x_BTD: all but the last output; what the next sublayer takes.
        output_BTD: the last output, which may not be there yet; None before the first.
        under_way: what the overlap knows of both.
    """

    x_BTD: Tensor
    output_BTD: Tensor | None = None
    under_way: Any = None


Sublayer = Callable[[Tensor], Tensor]
"""``sublayer(x_BTD) -> output_BTD``, its norm included."""


class Overlap(Protocol):
    """How a sublayer's output becomes whole while the next sublayer runs."""

    def open(self, x_BTD: Tensor) -> Stream:
        """The stream before the first sublayer."""
        ...

    def step(self, stream: Stream, sublayer: Sublayer) -> Stream:
        """The stream after a sublayer: its own output is begun, the one before it is added."""
        ...

    def close(self, stream: Stream) -> Tensor:
        """The stream with the last output added."""
        ...


class Immediate:
    """Every output is whole at once."""

    def open(self, x_BTD: Tensor) -> Stream:
        return Stream(x_BTD)

    def step(self, stream: Stream, sublayer: Sublayer) -> Stream:
        return Stream(self.close(stream), sublayer(stream.x_BTD))

    def close(self, stream: Stream) -> Tensor:
        return stream.x_BTD if stream.output_BTD is None else stream.x_BTD + stream.output_BTD


class LadderBlock(nn.Module):
    """Attention and feed-forward, neither of which sees the output just before it.

    Its parameters have the names of the plain block's. The first takes a tensor, the last gives
    one; between them goes a `Stream`.

    Attributes:
        overlap: how outputs become whole.
    """

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        assert spec.norm_placement == "before", "paceline.models.families admits no other"
        self.overlap: Overlap = Immediate()
        self._is_last = layer == spec.num_layers - 1
        self.attention_norm = make_norm(spec, spec.d_model)
        self.attention = Attention(spec, layer)
        self.ffn_norm = make_norm(spec, spec.d_model)
        self.ffn = MixtureOfExperts(spec) if spec.has_experts(layer) else FeedForward(spec)

    def forward(
        self,
        x: Tensor | Stream,
        layout: Layout,
        angles: tuple[Tensor, Tensor] | None,
        attend: Attend,
    ) -> Tensor | Stream:
        stream = self.overlap.open(x) if isinstance(x, Tensor) else x
        stream = self.overlap.step(
            stream,
            lambda x_BTD: self.attention(self.attention_norm(x_BTD), layout, angles, attend),
        )
        stream = self.overlap.step(stream, lambda x_BTD: self._fed_forward(x_BTD, layout))
        return self.overlap.close(stream) if self._is_last else stream

    def _fed_forward(self, x_BTD: Tensor, layout: Layout) -> Tensor:
        fed_BTD = feed(self.ffn, self.ffn_norm(x_BTD), layout)
        # Of experts it is a view, which torch's sharder warns of where it leaves a block.
        return fed_BTD.clone() if isinstance(self.ffn, MixtureOfExperts) else fed_BTD
