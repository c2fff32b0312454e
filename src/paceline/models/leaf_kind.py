"""What a layer with one matrix computes, found by numbers: names of classes may say anything."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from paceline.plan.module_graph import LeafKind

_ODD_EMBEDDING = ("max_norm", "scale_grad_by_freq", "sparse")  # they look at all words


@torch.no_grad()
def leaf_kind(layer: nn.Module, inputs: list[Tensor], outputs: list[Tensor]) -> LeafKind:
    """What a leaf with one matrix computes, by numbers: classes may say anything."""
    parameters = dict(layer.named_parameters(recurse=False))
    weight, bias = parameters["weight"], parameters.get("bias")
    if len(outputs) != 1 or not inputs:
        return "other"
    (output,), x = outputs, inputs[0]
    if not x.is_floating_point():
        is_row = bias is None and output.shape == (*x.shape, weight.shape[1])
        is_plain = not any(getattr(layer, name, None) for name in _ODD_EMBEDDING)
        return "embedding" if is_row and is_plain and _is_lookup(output, x, weight) else "other"
    for kind, matrix in (("linear", weight), ("transposed", weight.T)):
        if x.shape[-1] != matrix.shape[1] or output.shape != (*x.shape[:-1], matrix.shape[0]):
            continue
        expected = functional.linear(x.to(matrix.dtype), matrix, bias)
        if _is_close(output, expected):
            return "linear" if kind == "linear" else "transposed"
    return "other"


def _is_lookup(output: Tensor, ids: Tensor, weight: Tensor) -> bool:
    """Whether rows are looked up, all scaled alike if at all."""
    if int(ids.min()) < 0 or int(ids.max()) >= len(weight):
        return False
    rows = functional.embedding(ids, weight).to(output.dtype)
    scale = (output * rows).sum() / rows.square().sum().clamp_min(torch.finfo(rows.dtype).tiny)
    return _is_close(output, rows * scale)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    """Up to rounding: what is not equal at all differs by order one."""
    largest = float(expected.abs().max())
    bound = torch.finfo(found.dtype).eps ** 0.5 * largest
    return float((found - expected.to(found.dtype)).abs().max()) <= bound
