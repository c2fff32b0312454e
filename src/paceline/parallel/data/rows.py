"""Tensors dealt out to ranks by rows, many of them in one flat buffer.

The buffer is (ranks, chunk). Row r holds what rank r has of each tensor, one after the other:
its rows as `paceline.plan.layout.padded_share` says, and zeros behind them up to the length of the
longest share. So collectives that want equal parts move uneven ones, and each rank's part of a
tensor is contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def share_numel(shape: Sequence[int], degree: int) -> int:
    """Elements of the longest of `degree` shares of a tensor's rows, to which others are padded."""
    return -(-shape[0] // degree) * math.prod(shape[1:])


def pack_whole(tensors: Sequence[Tensor], degree: int, dtype: torch.dtype) -> Tensor:
    """The buffer of whole tensors, (degree, chunk), in a dtype."""
    shapes = [tensor.shape for tensor in tensors]
    flat = tensors[0].new_zeros(degree, _chunk(shapes, degree), dtype=dtype)
    for tensor, shares in zip(tensors, _columns(flat, shapes, degree), strict=True):
        for mine, theirs in _pieces(shares, tensor.reshape(len(tensor), -1)):
            mine.copy_(theirs)
    return flat


def unpack_whole(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Fills contiguous whole tensors from their buffer, (degree, chunk)."""
    shapes = [tensor.shape for tensor in tensors]
    for tensor, shares in zip(tensors, _columns(flat, shapes, len(flat)), strict=True):
        for mine, theirs in _pieces(shares, tensor.view(len(tensor), -1)):
            theirs.copy_(mine)


def pack_share(
    parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], degree: int, dtype: torch.dtype
) -> Tensor:
    """One rank's row of the buffer, (1, chunk).

    Args:
        parts: what the rank has of each tensor.
        shapes: of the whole tensors.
        degree: number of ranks.
        dtype: of the buffer.
    """
    flat = parts[0].new_zeros(1, _chunk(shapes, degree), dtype=dtype)
    for part, share in zip(parts, _columns(flat, shapes, degree), strict=True):
        share[0, : part.numel()].copy_(part.reshape(-1))
    return flat


def unpack_share(
    flat: Tensor, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], degree: int
) -> list[Tensor]:
    """One rank's row of the buffer, (1, chunk), as views that have the shapes of its parts."""
    columns = _columns(flat, shapes, degree)
    return [
        share[0, : part.numel()].view(part.shape)
        for part, share in zip(parts, columns, strict=True)
    ]


def _chunk(shapes: Sequence[Sequence[int]], degree: int) -> int:
    return sum(share_numel(shape, degree) for shape in shapes)


def _columns(flat: Tensor, shapes: Sequence[Sequence[int]], degree: int) -> tuple[Tensor, ...]:
    """The part of the buffer that is of each tensor, (rows of the buffer, its longest share)."""
    return flat.split([share_numel(shape, degree) for shape in shapes], dim=1)


def _pieces(shares: Tensor, matrix: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What lies where: views of the shares, and of the tensor's rows that they hold."""
    num_rows, width = matrix.shape
    length = shares.shape[1] // width
    num_full, num_left = divmod(num_rows, length)
    full = matrix[: num_full * length].view(num_full, length * width)
    yield shares[:num_full], full
    if num_left:
        yield shares[num_full, : num_left * width].view(num_left, width), matrix[-num_left:]
