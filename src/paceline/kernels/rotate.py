"""Rotation of the two halves of each head against each other.

Source: Su et al., RoFormer, arXiv:2104.09864, Eq. 34, in the halves of GPT-NeoX.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.kernels import native

_ROWS_PER_THREAD = 64  # fewer are not worth waking one


def rotate(x_BTNH: Tensor, cos_BT1H: Tensor, sin_BT1H: Tensor) -> Tensor:
    """Each head turned by its position's angles."""
    num_tokens, (num_heads, width) = x_BTNH.shape[1], x_BTNH.shape[-2:]
    is_one_row = len(x_BTNH) == 1 and x_BTNH.stride()[-2:] == (width, 1)
    if is_one_row and native.takes(x_BTNH[0, 0], cos_BT1H, sin_BT1H):
        y_BTNH = torch.empty(x_BTNH.shape, dtype=x_BTNH.dtype)
        sizes = (num_tokens, x_BTNH.stride(1), num_heads, width)
        threads = native.threads(num_tokens, _ROWS_PER_THREAD)
        native.call("rotate", x_BTNH.dtype, x_BTNH, cos_BT1H, sin_BT1H, y_BTNH, *sizes, threads)
        return y_BTNH
    first, second = x_BTNH.chunk(2, dim=-1)
    return x_BTNH * cos_BT1H + torch.cat([-second, first], dim=-1) * sin_BT1H
