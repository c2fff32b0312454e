"""How far two results are apart.

The error of a gradient is ``max|a - b| / max(max|b|, 1e-6 G)`` for each parameter, G being the
largest gradient of the model: some gradients are zero in theory, and a plain relative error means
nothing there. Weights are compared in norm, ``|a - b| / max(|b|, 1e-6 W)``, W being the largest
norm of a parameter: a bias of keys has no gradient in theory, and is rounding and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_FLOOR = 1e-6


def gradient_errors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, float]:
    """The error of each parameter's gradient.

    Raises:
        ValueError: one side lacks a gradient that the other has.
    """
    if found.keys() != expected.keys():
        raise ValueError(f"gradients on one side only: {sorted(found.keys() ^ expected.keys())}")
    largest = max((float(value.abs().max()) for value in expected.values()), default=0.0)
    return {
        name: float((found[name] - value).abs().max())
        / max(float(value.abs().max()), _FLOOR * largest, torch.finfo(value.dtype).tiny)
        for name, value in expected.items()
    }


def weight_errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The error of each parameter, in norm."""
    largest = max((float(value.norm()) for value in expected.values()), default=0.0)
    return {
        name: float((found[name] - value).norm())
        / max(float(value.norm()), _FLOOR * largest, torch.finfo(value.dtype).tiny)
        for name, value in expected.items()
    }


def relative_error(found: float, expected: float) -> float:
    """The error of one number."""
    return abs(found - expected) / max(abs(expected), torch.finfo(torch.float64).tiny)
