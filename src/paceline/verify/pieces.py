"""What a rank has of a module that is laid over ranks, as pieces of the whole."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from paceline.parallel.spread import Spread
from paceline.parallel.tensor.boundary import AXIS
from paceline.plan.layout import Box
from paceline.verify.compare import Piece, whole_pieces

Boxes = dict[str, list[Box]]
"""Parameter to the parts of it that are had."""


def pieces_of(tensors: Mapping[str, Tensor], spread: Spread | None) -> list[dict[str, Piece]]:
    """Tensors as pieces of wholes: in the n-th table the n-th piece of each that has so many."""
    if spread is None or spread.rules is None:
        return [whole_pieces(tensors)]
    tables: list[dict[str, Piece]] = []
    for name, tensor in tensors.items():
        for number, piece in enumerate(_pieces_of_one(name, tensor, spread)):
            if number == len(tables):
                tables.append({})
            tables[number][name] = piece
    return tables


def _pieces_of_one(name: str, tensor: Tensor, spread: Spread) -> list[Piece]:
    split = spread.split_of(name)
    if split.dim is None:
        return [(tensor, Box.of_whole(tuple(tensor.shape)))]
    ranges = split.shares[spread.world.coordinate(AXIS)]
    parts = tensor.split([len(part) for part in ranges], dim=split.dim)
    return [
        (part, Box.of_whole(tuple(part.shape)).narrowed(split.dim, place))
        for part, place in zip(parts, ranges, strict=True)
    ]


def boxes_of(tensors: Mapping[str, Tensor], spread: Spread | None) -> Boxes:
    boxes: Boxes = {}
    for table in pieces_of(tensors, spread):
        for name, (_, box) in table.items():
            boxes.setdefault(name, []).append(box)
    return boxes
