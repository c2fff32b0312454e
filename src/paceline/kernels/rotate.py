"""Rotation of the two halves of each head against each other.

Source: Su et al., RoFormer, arXiv:2104.09864, Eq. 34, in the halves of GPT-NeoX.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.kernels import native


def rotate(x_BTNH: Tensor, cos_BT1H: Tensor, sin_BT1H: Tensor) -> Tensor:
    """Each head turned by its position's angles."""
    if cos_BT1H.numel() == x_BTNH.shape[-1] and native.takes(x_BTNH, cos_BT1H, sin_BT1H):
        y_BTNH = torch.empty_like(x_BTNH)
        shape = x_BTNH.shape[-2:]
        native.call("rotate", x_BTNH.dtype, x_BTNH, cos_BT1H, sin_BT1H, y_BTNH, *shape)
        return y_BTNH
    first, second = x_BTNH.chunk(2, dim=-1)
    return x_BTNH * cos_BT1H + torch.cat([-second, first], dim=-1) * sin_BT1H
