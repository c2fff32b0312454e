"""Projections of the same input as one product, for inference: fewer, larger reads of memory.

Training keeps them apart, so that every parameter has its published name and shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, cast

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


class Part(NamedTuple):
    """Where a projection is computed.

    Attributes:
        layer: that computes it.
        columns: of the layer's outputs that are the projection's.
    """

    layer: Linear
    columns: slice


def parts(model: Decoder) -> dict[str, Part]:
    """Every projection under the name that it has before it is fused, and where it is computed."""
    found: dict[str, Part] = {}
    for name, module in model.named_modules():
        if isinstance(module, Attention) and module.qkv is not None:
            names = [f"{name}.{part}" for part in ("query", "key", "value")]
            found |= _cut(module.qkv, names, module.widths)
        elif isinstance(module, FeedForward) and module.gate_up is not None:
            width = module.gate_up.out_features // 2
            found |= _cut(module.gate_up, [f"{name}.gate", f"{name}.up"], (width, width))
        elif isinstance(module, Linear) and not name.endswith((".qkv", ".gate_up")):
            found |= _cut(module, [name], [module.out_features])
    return found


def _cut(layer: Linear, names: Sequence[str], widths: Sequence[int]) -> dict[str, Part]:
    """The outputs of a layer, cut into those of projections that lie side by side."""
    ends = list(accumulate(widths))
    assert ends[-1] == layer.out_features, "widths of all the projections"
    return {
        name: Part(layer, slice(end - width, end))
        for name, end, width in zip(names, ends, widths, strict=True)
    }


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
