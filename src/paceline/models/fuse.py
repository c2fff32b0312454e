"""Projections of the same input as one product, for inference: fewer, larger reads of memory.

Training keeps them apart, so that every parameter has its published name and shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from paceline.models.attention import Attention
from paceline.models.decoder import Decoder
from paceline.models.ffn import FeedForward
from paceline.models.linear import Linear


@torch.no_grad()
def fuse(model: Decoder) -> None:
    """Joins queries, keys and values, and gate and up, of every block, in place.

    The model computes the same; its parameters have other names. Projections that something has
    been added to are left as they are.
    """
    for module in model.modules():
        if isinstance(module, Attention) and _are_plain(*module.inputs):
            module.qkv = _joined(module.inputs)
            query, key, value = module.inputs
            module.widths = (len(query.weight), len(key.weight), len(value.weight))
            del module.query, module.key, module.value
        elif isinstance(module, FeedForward) and module.is_gated and _are_plain(*module.inputs):
            module.gate_up = _joined(module.inputs)
            del module.gate, module.up


def _are_plain(*projections: object) -> bool:
    return all(type(projection) is Linear for projection in projections)


def _joined(parts: Sequence[Linear]) -> Linear:
    """One projection whose rows are those of all parts."""
    weights = [part.weight for part in parts]
    biases = [cast("torch.Tensor", part.bias) for part in parts if part.bias is not None]
    assert len(biases) in (0, len(parts)), "biases on some of the projections only"
    with torch.device("meta"):
        joined = Linear(parts[0].in_features, sum(map(len, weights)), bias=bool(biases))
    joined.weight = torch.nn.Parameter(torch.cat(weights), requires_grad=False)
    if biases:
        joined.bias = torch.nn.Parameter(torch.cat(biases), requires_grad=False)
    return joined
