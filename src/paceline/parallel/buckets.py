"""Sums of many tensors over ranks, in few collectives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from paceline.dist.world import World

BUCKET_BYTES = 25 << 20


@torch.no_grad()
def sum_in_buckets(
    tensors: Iterable[Tensor], world: World, axes: tuple[str, ...], *, purpose: str
) -> None:
    """Sums tensors in place over the ranks that differ only on `axes`, a bucket at a time."""
    for bucket in buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        world.sum(flat, axes, purpose=purpose)
        parts = flat.split([tensor.numel() for tensor in bucket])
        for tensor, total in zip(bucket, parts, strict=True):
            tensor.copy_(total.view_as(tensor))


def buckets(tensors: Iterable[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Tensors in order, in groups of about `BUCKET_BYTES`."""
    bucket: list[Tensor] = []
    size_bytes = 0
    for tensor in tensors:
        bucket.append(tensor)
        size_bytes += tensor.nbytes
        if size_bytes >= BUCKET_BYTES:
            yield bucket
            bucket, size_bytes = [], 0
    if bucket:
        yield bucket
