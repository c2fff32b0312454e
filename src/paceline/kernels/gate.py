"""Activations, and the gate of a feed-forward: ``act(gate) * up``.

Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202, Eq. 6.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional

from paceline.kernels import native

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu-tanh": partial(functional.gelu, approximate="tanh"),
}


def gated(x: Tensor, activation: str) -> Tensor:
    """The second half of x times the activation of its first.

    Args:
        x: (..., 2 F).
        activation: a name of `ACTIVATIONS`.

    Returns:
        (..., F).
    """
    width = x.shape[-1] // 2
    if x.numel() == 2 * width and native.takes(x):
        y = x.new_empty(*x.shape[:-1], width)
        native.call(f"gate_{activation.replace('-', '_')}", x.dtype, x, y, width)
        return y
    gate, up = x.split(width, dim=-1)
    return ACTIVATIONS[activation](gate) * up
