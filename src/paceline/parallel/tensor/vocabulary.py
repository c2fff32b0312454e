"""The vocabulary split over the `tp` axis: embedding and head by words, and the loss with them.

Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, Sec. 3 (no rank ever has all logits).
Cost: each rank has vocab_size / tp rows of embedding and head; the loss costs three all-reduces of
    one number a token, in the dtype of the softmax.
Differs: gradients of the logits are made in the forward pass, chunk by chunk, as without ranks.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from paceline.dist.world import World
from paceline.kernels.cross_entropy import linear_cross_entropy
from paceline.kernels.linear import linear
from paceline.models.layout import Layout
from paceline.parallel.tensor.boundary import (
    AXIS,
    PURPOSE,
    copy_in,
    gather_columns,
    gather_rows,
    own_rows,
    scatter_rows,
    sum_up,
)
from paceline.plan.tensor_rules import even_share


class SplitVocabulary:
    """This rank's words; a `paceline.models.vocabulary.Vocabulary`, and the columns of a loss.

    Args:
        size: words of the vocabulary.
        world: the ranks.
        is_sequence_parallel: whether blocks take rows of the tokens.
    """

    is_apart = False

    def __init__(self, size: int, world: World, *, is_sequence_parallel: bool) -> None:
        degree = world.degree(AXIS)
        self._world = world
        self._shares = [even_share(size, degree, rank) for rank in range(degree)]
        self.own = self._shares[world.coordinate(AXIS)]
        self._is_sequence_parallel = is_sequence_parallel

    # The two ends

    def embed(self, tokens_BT: Tensor, look_up: Callable[[Tensor], Tensor]) -> Tensor:
        is_here_BT = (tokens_BT >= self.own.start) & (tokens_BT < self.own.stop)
        x_BTD = look_up((tokens_BT - self.own.start).where(is_here_BT, 0))
        x_BTD = x_BTD * is_here_BT[..., None]
        leave = scatter_rows if self._is_sequence_parallel else sum_up
        return leave(x_BTD, self._world)

    def spread(self, x_BTD: Tensor) -> Tensor:
        return own_rows(x_BTD, self._world) if self._is_sequence_parallel else x_BTD

    def collect(self, x_BTD: Tensor, layout: Layout) -> Tensor:
        if not self._is_sequence_parallel:
            return copy_in(x_BTD, self._world)
        return as_tokens(gather_rows(x_BTD, self._world), layout)

    def logits(self, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        sizes = tuple(map(len, self._shares))
        return gather_columns(linear(x_BTD, weight_VD.to(x_BTD.dtype)), sizes, self._world)

    def cross_entropy(
        self, x_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, *, ignored: int
    ) -> Tensor:
        return linear_cross_entropy(x_RD, weight_VD, labels_R, ignored=ignored, columns=self)

    # Columns of the logits

    def sum(self, values: Tensor) -> Tensor:
        return self._world.sum(values, (AXIS,), purpose=PURPOSE)

    def largest(self, values: Tensor) -> Tensor:
        return self._world.largest(values, AXIS, purpose=PURPOSE)


def as_tokens(rows_1RD: Tensor, layout: Layout) -> Tensor:
    """Tokens laid end to end, with padding, as (B, T, D)."""
    num_sequences, length = layout.positions_BT.shape
    return rows_1RD[0, : num_sequences * length].unflatten(0, (num_sequences, length))
