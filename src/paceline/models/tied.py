"""Gradients of an embedding, added row by row: of one that is the head too, or of some words alone.

The embedding's gradient has as many rows as there are tokens, the head's as many as there are
words. Left to autograd, the first becomes a whole matrix of zeros and a few rows, and a third
matrix their sum: a tenth of a small model's step. Here the few rows are added to the head's.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional


class LookUp(Protocol):
    """What looks rows of a matrix up, for their gradient's sake."""

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Rows of the matrix, (B, T, D)."""
        ...


class AddedRows:
    """Rows of a matrix whose gradient is added to the matrix's own, in place, and nowhere else."""

    def __init__(self, weight_VD: Tensor) -> None:
        self._weight_VD = weight_VD

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Rows of the matrix, (B, T, D)."""
        return _AddedRows.apply(self._weight_VD, tokens_BT)


class TiedEmbedding:
    """The two uses of one matrix in one forward pass.

    `embed` comes first and `head` after it, so that in the backward pass, which takes what was
    made last first, the head's gradient is there when the embedding's is due.
    """

    def __init__(self, weight_VD: Tensor) -> None:
        self._weight_VD = weight_VD
        self._head_gradient: Tensor | None = None

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Rows of the matrix, (B, T, D)."""
        return _Embed.apply(self._weight_VD, tokens_BT, self)

    def head(self) -> Tensor:
        """The matrix, as the head uses it."""
        return _Head.apply(self._weight_VD, self)

    def keep(self, gradient: Tensor) -> None:
        """Holds the head's gradient until the embedding's is known."""
        held = self._head_gradient
        self._head_gradient = gradient if held is None else held + gradient

    def take(self) -> Tensor | None:
        gradient, self._head_gradient = self._head_gradient, None
        return gradient


class _AddedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, tokens_BT: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_BT)
        ctx.weight_VD = weight_VD
        return functional.embedding(tokens_BT, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[None, None]:
        (grad_BTD,), (tokens_BT,), weight_VD = grad_outputs, ctx.saved_tensors, ctx.weight_VD
        if weight_VD.grad is None:
            weight_VD.grad = torch.zeros_like(weight_VD)
        weight_VD.grad.index_add_(0, tokens_BT.flatten(), grad_BTD.flatten(0, 1))
        return None, None


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, tokens_BT: Tensor, tied: TiedEmbedding) -> Tensor:
        ctx.save_for_backward(tokens_BT)
        ctx.tied, ctx.shape = tied, weight_VD.shape
        return functional.embedding(tokens_BT, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:
        (grad_BTD,), (tokens_BT,) = grad_outputs, ctx.saved_tensors
        gradient_VD = ctx.tied.take()
        if gradient_VD is None:
            gradient_VD = grad_BTD.new_zeros(ctx.shape)
        return gradient_VD.index_add_(0, tokens_BT.flatten(), grad_BTD.flatten(0, 1)), None, None


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, tied: TiedEmbedding) -> Tensor:
        ctx.tied = tied
        return weight_VD.view_as(weight_VD)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[None, None]:
        ctx.tied.keep(grad_outputs[0])
        return None, None
