"""``y = x W^T + b``; one row is read at the rate of memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from paceline.kernels import native


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product in the dtype of x, summed at least in float32.

    Args:
        x: (..., in).
        weight: (out, in), of the same dtype.
        bias: (out), of the same dtype.

    Returns:
        (..., out).
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if x.numel() != x.shape[-1] or not native.takes(*tensors):
        return functional.linear(x, weight, bias)
    y = x.new_empty(*x.shape[:-1], len(weight))
    threads = torch.get_num_threads()
    native.call("linear", x.dtype, weight, bias, x, y, *weight.shape, threads)
    return y
