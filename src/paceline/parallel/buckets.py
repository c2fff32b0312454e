"""Sums of many tensors over ranks, in few collectives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from paceline.dist.world import World

T = TypeVar("T", bound=Tensor)

BUCKET_BYTES = 25 << 20


@torch.no_grad()
def sum_in_buckets(
    tensors: Iterable[Tensor],
    world: World,
    axes: tuple[str, ...],
    *,
    purpose: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Sums tensors in place over the ranks that differ only on `axes`, a bucket at a time.

    Args:
        tensors: as many and as large on every rank.
        world: the ranks.
        axes: of the mesh.
        purpose: written down with the bytes.
        dtype: in which sums are made; absent: the tensors' own.
    """
    for bucket in buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket]).to(dtype or bucket[0].dtype)
        world.sum(flat, axes, purpose=purpose)
        parts = flat.split([tensor.numel() for tensor in bucket])
        for tensor, total in zip(bucket, parts, strict=True):
            tensor.copy_(total.view_as(tensor))


def buckets(tensors: Iterable[T]) -> Iterator[list[T]]:
    """Tensors in order, in groups of one dtype and of about `BUCKET_BYTES`."""
    bucket: list[T] = []
    size_bytes = 0
    for tensor in tensors:
        if bucket and (size_bytes >= BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size_bytes = [], 0
        bucket.append(tensor)
        size_bytes += tensor.nbytes
    if bucket:
        yield bucket
