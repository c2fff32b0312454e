"""Cross entropy of a projection onto the vocabulary, without keeping the logits.

Source: the gradient is that of softmax and logarithm, ``p - 1[label]``; computing it in the forward
    pass, chunk by chunk, is as in Hsu et al., Liger Kernel, arXiv:2410.10989, Sec. 3.2.
    Where columns of the logits are spread, what their holders must know of each other are three
    numbers a row (`Statistics`).
Cost: one chunk of logits in float32, and one gradient of the weight from forward to backward;
    positions without a label are left out of every product.
Differs: gradients of the weight are summed over chunks at least in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

_CHUNK_ROWS = 1024


class Columns(Protocol):
    """Of the logits, those that are here, where others have the rest.

    Attributes:
        own: which they are.
    """

    @property
    def own(self) -> range: ...

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all who have columns."""
        ...

    def largest(self, values: Tensor) -> Tensor:
        """The largest over all who have columns."""
        ...


def linear_cross_entropy(
    x_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    *,
    ignored: int,
    columns: Columns | None = None,
) -> Tensor:
    """The sum of ``-log softmax(x W^T)[label]`` over the rows whose label is not `ignored`.

    Args:
        x_RD: rows; products are in its dtype, the softmax at least in float32.
        weight_VD: in any dtype; its gradient has that dtype.
        labels_R: columns, or `ignored`.
        ignored: label of rows that have no loss.
        columns: of which columns the weight is; None: of all. The gradient of x is then a term of
            the sum over all who have columns.

    Returns:
        A scalar, at least in float32. One backward pass can go through it.
    """
    is_valid_R = labels_R != ignored
    if not bool(is_valid_R.all()):
        x_RD, labels_R = x_RD[is_valid_R], labels_R[is_valid_R]
    return _LinearCrossEntropy.apply(x_RD, weight_VD, labels_R, columns)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients for a loss of weight 1 are made in the forward pass, and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, columns: Columns | None
    ) -> Tensor:
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        wide = torch.promote_types(x_RD.dtype, torch.float32)
        cast_VD = weight_VD.to(x_RD.dtype)
        loss = torch.zeros((), dtype=wide, device=x_RD.device)
        grad_x_RD = torch.empty_like(x_RD) if needs_x else None
        grad_weight_VD: Tensor | None = None
        for start in range(0, len(x_RD), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            logits_CV = x_RD[rows] @ cast_VD.T
            if columns is None:
                chunk_loss, grad_logits_CV = _chunk(logits_CV, labels_R[rows], wide)
            else:
                chunk_loss, grad_logits_CV = _split_chunk(logits_CV, labels_R[rows], wide, columns)
            loss += chunk_loss
            if grad_x_RD is not None:
                torch.mm(grad_logits_CV, cast_VD, out=grad_x_RD[rows])
            if needs_weight:
                grad_weight_VD = add_product(grad_weight_VD, grad_logits_CV.T, x_RD[rows], wide)
        if needs_weight and grad_weight_VD is None:  # no row at all
            grad_weight_VD = torch.zeros_like(weight_VD)
        ctx.gradients = grad_x_RD, grad_weight_VD
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        assert ctx.gradients is not None, "a second backward pass through linear_cross_entropy"
        grad_x_RD, grad_weight_VD = ctx.gradients
        ctx.gradients = None
        if grad_x_RD is not None:
            grad_x_RD = grad_x_RD.mul_(grad_outputs[0])
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.mul_(grad_outputs[0]).to(ctx.weight_dtype)
        return grad_x_RD, grad_weight_VD, None, None


def _chunk(logits_CV: Tensor, labels_C: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss of some rows, and its gradient for their logits in the logits' dtype."""
    dtype = logits_CV.dtype
    log_probs_CV = torch.log_softmax(logits_CV, dim=-1, dtype=wide)
    labels_C1 = labels_C[:, None]
    loss = -log_probs_CV.gather(1, labels_C1).sum()
    grad_CV = log_probs_CV.exp_()
    grad_CV.scatter_add_(1, labels_C1, torch.full_like(labels_C1, -1, dtype=wide))
    return loss, grad_CV.to(dtype)


def _split_chunk(
    logits_CV: Tensor, labels_C: Tensor, wide: torch.dtype, columns: Columns
) -> tuple[Tensor, Tensor]:
    """The same as `_chunk` where only some columns are here; the loss is that of all."""
    exps_CV, here = local_statistics(logits_CV, labels_C, columns.own, wide)
    largest_C = columns.largest(here.largest_C.clone())
    whole = Statistics(
        largest_C,
        columns.sum(here.total_C * (here.largest_C - largest_C).exp_()),
        columns.sum(here.chosen_C),
    )
    grad_CV = logits_gradient(exps_CV, here, whole, labels_C, columns.own)
    return whole.loss, grad_CV.to(logits_CV.dtype)


class Statistics(NamedTuple):
    """What a softmax needs to know of some columns of logits, of each row.

    Attributes:
        largest_C: the largest logit.
        total_C: the sum of exponentials of what the logits are above it.
        chosen_C: the label's logit; 0 where its column is not among these.
    """

    largest_C: Tensor
    total_C: Tensor
    chosen_C: Tensor

    @classmethod
    def merged(cls, parts: Sequence[Statistics]) -> Statistics:
        """Those of all columns, of their parts'."""
        largest_C = torch.stack([part.largest_C for part in parts]).amax(dim=0)
        totals = (part.total_C * (part.largest_C - largest_C).exp() for part in parts)
        return cls(largest_C, sum_of(totals), sum_of(part.chosen_C for part in parts))

    @property
    def loss(self) -> Tensor:
        """The sum of ``-log softmax[label]``, of all columns' statistics."""
        return (self.total_C.log() + (self.largest_C - self.chosen_C)).sum()

    def scale_of(self, part: Statistics) -> Tensor:
        """What a part's exponentials become probabilities by, (C), of all columns' statistics."""
        return (part.largest_C - self.largest_C).exp() / self.total_C


def local_statistics(
    logits_CV: Tensor, labels_C: Tensor, own: range, wide: torch.dtype
) -> tuple[Tensor, Statistics]:
    """Exponentials of logits above the largest, and the statistics of these columns.

    Args:
        logits_CV: may be changed.
        labels_C: columns of all.
        own: the columns that are here.
        wide: dtype of both results.
    """
    logits_CV = logits_CV.to(wide)
    largest_C1 = logits_CV.amax(dim=1, keepdim=True)
    is_here_C, columns_C1 = _columns_of(labels_C, own)
    chosen_C = logits_CV.gather(1, columns_C1)[:, 0] * is_here_C
    exps_CV = logits_CV.sub_(largest_C1).exp_()
    return exps_CV, Statistics(largest_C1[:, 0], exps_CV.sum(dim=1), chosen_C)


def logits_gradient(
    exps_CV: Tensor, here: Statistics, whole: Statistics, labels_C: Tensor, own: range
) -> Tensor:
    """The gradient of the loss for these logits, in place of their exponentials."""
    is_here_C, columns_C1 = _columns_of(labels_C, own)
    exps_CV *= whole.scale_of(here)[:, None]
    return exps_CV.scatter_add_(1, columns_C1, -is_here_C[:, None].to(exps_CV.dtype))


def _columns_of(labels_C: Tensor, own: range) -> tuple[Tensor, Tensor]:
    """Whether each label is among some columns, and which of them it is; 0 where it is none."""
    is_here_C = (labels_C >= own.start) & (labels_C < own.stop)
    return is_here_C, (labels_C - own.start).where(is_here_C, 0)[:, None]


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor, in their order."""
    first, *others = tensors
    return functools.reduce(torch.add, others, first)


def add_product(total: Tensor | None, left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """The sum and the product, in place of the sum if there is one."""
    if total is None:
        return torch.mm(left, right).to(wide)
    if left.dtype == wide:
        return total.addmm_(left, right)
    return total.add_(torch.mm(left, right))
