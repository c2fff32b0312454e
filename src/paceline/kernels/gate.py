"""Activations, and the gate of a feed-forward: ``act(gate) * up``.

Source: Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202, Eq. 6.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional

from paceline.kernels import native

_ROWS_PER_THREAD = 8  # fewer are not worth waking one

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
    if native.takes(x):
        y = x.new_empty(*x.shape[:-1], width)
        num_rows = y.numel() // width
        threads = native.threads(num_rows, _ROWS_PER_THREAD)
        name = f"gate_{activation.replace('-', '_')}"
        native.call(name, x.dtype, x, y, num_rows, width, threads)
        return y
    gate, up = x.split(width, dim=-1)
    return ACTIVATIONS[activation](gate) * up
