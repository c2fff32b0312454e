"""Many adapters beside each other over one model, each row of a pass computed with its own.

Source: Chen et al., Punica: Multi-Tenant LoRA Serving, arXiv:2310.18547 (rows in segments by
    adapter, one product of the model's own weights for all of them); Sheng et al., S-LoRA: Serving
    Thousands of Concurrent LoRA Adapters, arXiv:2311.03285 (different ranks in one batch).
Replaces: merging one adapter (`paceline.models.peft.attach`).
Needs: rows of an adapter next to each other in the pass.
Forbids: methods with ``why_alone``; an adapter of the head, which computes some of the rows alone.
Cost: in memory, for each adapter and matrix, (inputs + outputs) numbers for each of the largest
    rank, those of projections that are fused with each other together; they are read once in a
    pass. 2 x rank x (inputs + outputs) FLOPs a row and matrix.
Differs: no kernel of its own (SGMV): short segments are padded to one batched product, long ones
    have a product each; all adapters stay on the device (no paging); IA3 and DoRA are served too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.kernels.device import multiplies_bfloat16
from paceline.models.decoder import Decoder
from paceline.models.fuse import parts
from paceline.models.linear import Linear, Product
from paceline.models.peft.attach import method_of
from paceline.models.peft.files import Adapter
from paceline.models.peft.segments import Segments
from paceline.models.peft.update import LowRank, Update, joined
from paceline.models.weights import Weights, build

HEAD = "head"
"""The output head, whose rows are not those of a pass."""


@dataclass(frozen=True, slots=True)
class Beside:
    """The adapters beside a model.

    Attributes:
        segments: to be set before each pass.
        num_bytes: of each adapter, by its name.
    """

    segments: Segments
    num_bytes: Mapping[str, int]


def put_beside(model: Decoder, own: Weights, adapters: Mapping[str, Adapter]) -> Beside:
    """Puts adapters beside a model, whose layers then heed the segments of a pass.

    Args:
        model: with its weights, fused or not; the products of its layers are changed.
        own: its weights, under the names that they had before it was fused.
        adapters: by name; all of methods that can be served so.
    """
    places = parts(model)
    found: dict[Linear, dict[str, list[tuple[slice, Update]]]] = defaultdict(dict)
    for name, adapter in sorted(adapters.items()):
        method = method_of(adapter.config)
        for target in method.targets(build(model.spec)):
            layer, columns = places[target]
            update = method.update(target, own, layer.bias is not None, adapter)
            found[layer].setdefault(name, []).append((columns, update))
    weight = model.embedding.weight
    segments, num_bytes = Segments(weight.device), dict.fromkeys(adapters, 0)
    dtype = _dtype(weight)
    for layer, of_names in found.items():
        updates = {
            name: joined(updates, layer.out_features).to(weight.device, dtype)
            for name, updates in of_names.items()
        }
        product = layer.product = AdaptedProduct(layer.product, segments, updates)
        for name in updates:
            num_bytes[name] += product.num_bytes(name)
    return Beside(segments, num_bytes)


def _dtype(weight: Tensor) -> torch.dtype:
    """What adapters are kept in: float32 where products of the weights' dtype are slower."""
    if weight.dtype == torch.bfloat16 and not multiplies_bfloat16(weight.device):
        return torch.float32
    return weight.dtype


class AdaptedProduct:
    """A product whose rows differ by the adapter that they are computed with.

    Args:
        product: of the layer itself, for all rows at once.
        segments: of the pass.
        updates: of the layer, by the adapter's name; of one that is absent, rows stay as they are.
    """

    def __init__(self, product: Product, segments: Segments, updates: Mapping[str, Update]) -> None:
        self._product, self._segments = product, segments
        self._updates = {name: u for name, u in updates.items() if u.num_scale_bytes}
        factors = {name: u.low_rank for name, u in updates.items() if u.low_rank}
        self._stack = Stack(factors) if factors else None

    def num_bytes(self, name: str) -> int:
        """Of an adapter."""
        scales = self._updates[name].num_scale_bytes if name in self._updates else 0
        if self._stack is None or name not in self._stack.names:
            return scales
        return scales + self._stack.num_bytes

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x_rows = x.reshape(-1, x.shape[-1])
        assert len(x_rows) == self._segments.num_rows, "the pass is not what its segments say"
        mine = [
            (rows, self._updates[adapter])
            for adapter, rows in self._segments.adapted
            if adapter in self._updates
        ]
        y = self._product(_scaled(x_rows, mine).view_as(x), weight, bias)
        y_rows = y.view(-1, y.shape[-1])
        for rows, update in mine:
            if update.scale is not None:
                y_rows[rows] *= update.scale
            if update.shift is not None:
                y_rows[rows] += update.shift
        if self._stack is not None:
            self._stack.add(x_rows, y_rows, self._segments)
        return y


class Stack:
    """Factors of low rank of all adapters of a layer, filled up to the largest rank with zeros.

    Args:
        factors: by the adapter's name.

    Attributes:
        names: of the adapters, in the order of the stack.
        num_bytes: of each of them.
    """

    def __init__(self, factors: Mapping[str, LowRank]) -> None:
        self.names = tuple(factors)
        rank = max(len(low_rank.down) for low_rank in factors.values())
        first = next(iter(factors.values()))
        self._downs = first.down.new_zeros(len(factors), rank, first.down.shape[1])
        self._ups = first.up.new_zeros(len(factors), rank, len(first.up))
        for index, (down, up) in enumerate(factors.values()):
            self._downs[index, : len(down)] = down
            self._ups[index, : len(down)] = up.t()
        self.num_bytes = (self._downs.nbytes + self._ups.nbytes) // len(factors)

    def add(self, x_rows: Tensor, y_rows: Tensor, segments: Segments) -> None:
        """Adds to each row of the product what its adapter gives, in place."""
        alone, block = segments.share(self.names)
        dtype = self._downs.dtype
        for index, rows in alone:
            inner = x_rows[rows].to(dtype) @ self._downs[index].t()
            y_rows[rows] += inner @ self._ups[index]
        if block is not None:
            x_GTI = x_rows[block.sources].to(dtype).unflatten(0, (-1, block.depth))
            y_GTO = x_GTI @ self._downs.mT @ self._ups
            added = y_GTO.flatten(0, 1)[block.places].to(y_rows.dtype)
            y_rows.index_add_(0, block.rows, added)


def _scaled(x_rows: Tensor, mine: Sequence[tuple[slice, Update]]) -> Tensor:
    """Rows of the input, those that an adapter scales scaled."""
    scales = [(rows, u.input_scale) for rows, u in mine if u.input_scale is not None]
    if not scales:
        return x_rows
    x_rows = x_rows.clone()
    for rows, scale in scales:
        x_rows[rows] *= scale
    return x_rows
