"""The load of a layer's experts: counted, and pulled level by a loss of its own.

Source: Fedus et al., Switch Transformers, arXiv:2101.03961, Eq. 4; DeepSeek-AI, DeepSeek-V3,
    arXiv:2412.19437, Sec. 2.1.2, Eq. 17 to 20 (of each sequence by itself).
Replaces: nothing.  Needs: a model with experts.  Forbids: peft.
Cost: element-wise work on the probabilities of experts. Where ranks have different tokens of one
    sequence, every layer and micro-batch sums B (E + 1) numbers over them, in the forward pass.
Differs: probabilities are the router's softmax over all experts, and not normalised scores. The
    gradient's scale is the weight over the sequences of a step, whatever their padding; the loss
    that is reported has no part of it.

Of a layer and a sequence s of T real tokens, each of which chooses k of E experts:

    loss(s) = E / (k T) sum_i count(s, i) 1 / T sum_t prob(t, i)

where ``count(s, i)``, how often the sequence's tokens choose expert i, is taken as a constant. The
loss of a step is the sum over layers of the mean over sequences; 1 for a layer whose load is even.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paceline.models.layout import PADDING, Layout

Sequences = Callable[[Layout], Tensor]
"""``sequences(layout) -> (R,)``: for each row of tokens the index of its sequence in the batch, or
`PADDING`.
"""


def sequences_of(layout: Layout) -> Tensor:
    """Of all tokens of a batch, laid end to end."""
    num_sequences, length = layout.positions_BT.shape
    device = layout.positions_BT.device
    index_B1 = torch.arange(num_sequences, device=device)[:, None]
    if layout.documents_BT is None:
        return index_B1.expand(num_sequences, length).flatten()
    return index_B1.where(layout.documents_BT != PADDING, PADDING).flatten()


def as_they_are(totals: Tensor) -> Tensor:
    """Sums over ranks, where there are none that have other tokens of a sequence."""
    return totals


@dataclass(slots=True)
class Load:
    """What a layer has seen since it was last asked.

    Attributes:
        counts_E: tokens that have chosen each expert, float64.
        loss_sum: of the balance losses of sequences, float64.
        num_sequences: as many, float64; a part of a sequence counts as its share of the tokens.
    """

    counts_E: Tensor
    loss_sum: Tensor
    num_sequences: Tensor

    @classmethod
    def none(cls, num_experts: int, device: torch.device) -> Load:
        zeros = torch.zeros(num_experts + 2, dtype=torch.float64, device=device)
        return cls(zeros[:num_experts], zeros[num_experts], zeros[num_experts + 1])


class Balance:
    """Watches the experts of one layer in training.

    Args:
        num_experts: of the layer.
        num_choices: experts of each token.
        scale: of the loss's gradient, for one sequence; 0: no loss is computed.
        sequences: which rows are whose.
        sum_up: sums over the ranks that have other tokens of the same sequences, in place.

    Attributes:
        load: since the start, or since it was last taken. A pass that is computed again counts
            again, so ratios alone mean something.
    """

    def __init__(
        self,
        num_experts: int,
        num_choices: int,
        *,
        scale: float = 0.0,
        sequences: Sequences = sequences_of,
        sum_up: Callable[[Tensor], Tensor] = as_they_are,
    ) -> None:
        self._num_experts, self._num_choices = num_experts, num_choices
        self._scale = scale
        self._sequences, self._sum_up = sequences, sum_up
        self.load: Load | None = None

    def take(self, device: torch.device) -> Load:
        """The load so far, of which nothing is kept."""
        load, self.load = self.load, None
        return load or Load.none(self._num_experts, device)

    def __call__(
        self, output_RD: Tensor, probs_RE: Tensor, experts_RC: Tensor, layout: Layout
    ) -> Tensor:
        """Counts a pass.

        Args:
            output_RD: of the layer.
            probs_RE: of its router, at least float32.
            experts_RC: that each token has chosen.
            layout: of the batch.

        Returns:
            The output; its backward pass gives the balance loss's gradient to `probs_RE`.
        """
        if self.load is None:
            self.load = Load.none(self._num_experts, output_RD.device)
        index_R = self._sequences(layout)
        is_real_R1 = (index_R >= 0)[:, None]
        chosen_RE = torch.zeros_like(probs_RE, requires_grad=False).scatter(1, experts_RC, 1.0)
        chosen_RE = chosen_RE * is_real_R1
        self.load.counts_E += chosen_RE.sum(dim=0)
        if not self._scale:
            return output_RD
        index_R = index_R.clamp(min=0)
        totals_SN = probs_RE.new_zeros(len(layout.positions_BT), self._num_experts + 1)
        ones_R1 = is_real_R1.to(probs_RE.dtype)
        totals_SN.index_add_(0, index_R, torch.cat([chosen_RE, ones_R1], dim=1))
        totals_SN = self._sum_up(totals_SN)
        counts_SE, lengths_S1 = totals_SN[:, :-1], totals_SN[:, -1:].clamp(min=1)
        pull_SE = counts_SE * (self._num_experts / self._num_choices) / lengths_S1.square()
        loss = (pull_SE[index_R] * probs_RE * is_real_R1).sum()
        self.load.loss_sum += loss.detach()
        self.load.num_sequences += (ones_R1 / lengths_S1[index_R]).sum()
        return _WithLoss.apply(output_RD, loss, self._scale) if loss.requires_grad else output_RD


class _WithLoss(torch.autograd.Function):
    """The identity of an output; a loss beside it gets a gradient that does not come from it.

    So it is counted once, on whatever stage the layer is, and no scale of another loss touches it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss.detach()
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, Tensor, None]:
        return grad_outputs[0], torch.full_like(ctx.like, ctx.scale), None
