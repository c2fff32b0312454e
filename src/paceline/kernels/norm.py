"""Root-mean-square norm.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467, Eq. 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.kernels import native

_ROWS_PER_THREAD = 16  # fewer are not worth waking one


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """X over the root of its mean square, times the weight; at least in float32 inside.

    Args:
        x: (..., width).
        weight: (width), of any dtype.
        eps: added to the mean square.
        offset: added to the weight, which is then applied in the wide dtype too, as Gemma does.
    """
    width = x.shape[-1]
    if not torch.is_grad_enabled():
        x = x.contiguous()  # heads cut out of a fused projection are not
    if not native.takes(x, weight):
        return _reference(x, weight, eps, offset)
    y = torch.empty_like(x)
    num_rows = x.numel() // width
    threads = native.threads(num_rows, _ROWS_PER_THREAD)
    native.call("rms_norm", x.dtype, x, weight, y, num_rows, width, eps, offset, threads)
    return y


def _reference(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (normed * (weight.to(wide.dtype) + offset)).to(x.dtype)
    return weight.to(x.dtype) * normed.to(x.dtype)
