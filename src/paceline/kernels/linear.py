"""``y = x W^T + b``; few rows are computed at the rate of memory."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from paceline.kernels import native
from paceline.kernels.device import multiplies_bfloat16

_FEW_ROWS = 16
"""Up to so many our kernel is faster than torch's, on two cores of Zen 3 (AVX2) with weights of
SmolLM2's shapes that come from memory; ``paceline bench decode`` measures whole steps."""


@lru_cache(maxsize=4)
def most_rows(dtype: torch.dtype) -> float:
    """Rows up to which our kernel multiplies.

    A CPU that does not multiply bfloat16 has torch do it a number at a time: ours, which widens
    weights as it reads them, is five times as fast at any number of rows.
    """
    if dtype == torch.bfloat16 and not multiplies_bfloat16(torch.device("cpu")):
        return math.inf
    return _FEW_ROWS


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
    num_rows = x.numel() // x.shape[-1]
    if num_rows > most_rows(x.dtype) or not native.takes(*tensors):
        return functional.linear(x, weight, bias)
    return _product(x, weight, bias, num_rows)


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product, each row of which is the same bit by bit whatever rows are beside it.

    Arguments are those of `linear`, contiguous, in float32 or bfloat16 on a CPU with a C compiler.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    assert native.takes(*tensors), "no kernel for this product, and torch's is not invariant"
    return _product(x, weight, bias, x.numel() // x.shape[-1])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, num_rows: int) -> Tensor:
    num_outputs, width = weight.shape
    y = x.new_empty(*x.shape[:-1], num_outputs)
    sizes = (num_rows, width, num_outputs, torch.get_num_threads())
    native.call("product", x.dtype, weight, None, bias, x, y, *sizes)
    return y
