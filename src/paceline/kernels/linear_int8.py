"""``y = x W^T + b`` with W in int8 and one scale for each output: a quarter of float32's bytes.

Source: Dettmers et al., LLM.int8(), arXiv:2208.07339, Sec. 2.1 (absmax, here of each row of W).
Cost: int8 is read, float32 is summed; rounding is that of the weights alone.
Differs: activations stay as they are, so no outliers are taken apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from paceline.kernels import native

_LARGEST = 127


class Int8Weight(NamedTuple):
    """A weight as whole numbers and what they are multiplied by.

    Attributes:
        values: (out, in), int8, from -127 to 127.
        scales: (out), float32.
    """

    values: Tensor
    scales: Tensor


def to_int8(weight: Tensor) -> Int8Weight:
    """The nearest weight in int8: each output's largest size becomes 127."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / _LARGEST
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return Int8Weight((wide / scales[:, None]).round().to(torch.int8), scales)


def linear_int8(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """The product in the dtype of x, summed in float32.

    On a CPU each row is the same bit by bit whatever rows are beside it.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out), in the dtype of x.

    Returns:
        (..., out).
    """
    tensors = (x,) if bias is None else (x, bias)
    if not (native.takes(*tensors) and weight.values.is_contiguous()):
        return _reference(x, weight, bias)
    num_outputs, width = weight.values.shape
    y = x.new_empty(*x.shape[:-1], num_outputs)
    sizes = (x.numel() // width, width, num_outputs, torch.get_num_threads())
    native.call("product_i8", x.dtype, weight.values, weight.scales, bias, x, y, *sizes)
    return y


def _reference(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    wide = functional.linear(x.float(), weight.values.float()) * weight.scales
    return (wide if bias is None else wide + bias.float()).to(x.dtype)
