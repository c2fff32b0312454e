"""How far two results are apart.

The error of a gradient is ``max|a - b| / max(max|b|, 1e-6 G)`` for each parameter, G being the
largest gradient of the model: some gradients are zero in theory, and a plain relative error means
nothing there. Weights are compared in norm, ``|a - b| / max(|b|, 1e-6 W)``, W being the largest
norm of a parameter: a bias of keys has no gradient in theory, and is rounding and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from paceline.plan.layout import Box

_FLOOR = 1e-6

Piece = tuple[Tensor, Box]
"""What a rank has of a parameter or gradient, and where it lies in the whole."""


def whole_pieces(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Tensors that are not spread, as pieces."""
    return {name: (t, Box.of_whole(tuple(t.shape))) for name, t in tensors.items()}


def gradient_errors(found: Mapping[str, Piece], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The error of each gradient that a rank has, or of its piece of it.

    A gradient that should not be there has an infinite error. One that is missing on every rank is
    for `uncovered` to find.
    """
    return _errors(
        found, expected, lambda value: float(value.abs().max()) if value.numel() else 0.0
    )


def weight_errors(found: Mapping[str, Piece], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The error of each parameter that a rank has, or of its piece of it, in norm."""
    return _errors(found, expected, lambda value: float(value.norm()))


def uncovered(boxes: Mapping[str, Collection[Box]], expected: Mapping[str, Tensor]) -> list[str]:
    """The tensors of which no rank has some element.

    Args:
        boxes: of each tensor what the ranks have.
        expected: the whole tensors.
    """
    missing: list[str] = []
    for name, value in expected.items():
        is_covered = torch.zeros(value.shape, dtype=torch.bool)
        for box in boxes.get(name, ()):
            is_covered[box.slices] = True
        if not bool(is_covered.all()):
            missing.append(name)
    return missing


def _errors(
    found: Mapping[str, Piece], expected: Mapping[str, Tensor], size: Callable[[Tensor], float]
) -> dict[str, float]:
    largest = max((size(value) for value in expected.values()), default=0.0)
    errors: dict[str, float] = {}
    for name, (piece, box) in found.items():
        if name not in expected:
            errors[name] = float("inf")
            continue
        value = expected[name]
        scale = max(size(value), _FLOOR * largest, torch.finfo(value.dtype).tiny)
        errors[name] = size(piece - value[box.slices]) / scale
    return errors


def relative_error(found: float, expected: float) -> float:
    """The error of one number."""
    return abs(found - expected) / max(abs(expected), torch.finfo(torch.float64).tiny)
