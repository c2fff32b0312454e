"""Sums of many tensors over ranks, in few collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from paceline.dist.world import World

T = TypeVar("T", bound=Tensor)
Item = TypeVar("Item")

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
        is_large = len(bucket) == 1 and bucket[0].is_contiguous()
        if is_large and dtype in (None, bucket[0].dtype):
            world.sum(bucket[0], axes, purpose=purpose)  # where it lies, without two copies
            continue
        flat = torch.cat([tensor.flatten() for tensor in bucket]).to(dtype or bucket[0].dtype)
        world.sum(flat, axes, purpose=purpose)
        parts = flat.split([tensor.numel() for tensor in bucket])
        for tensor, total in zip(bucket, parts, strict=True):
            tensor.copy_(total.view_as(tensor))


def buckets(tensors: Iterable[T]) -> Iterator[list[T]]:
    """Tensors in order, in groups of one dtype and of about `BUCKET_BYTES`."""
    for _, alike in groupby(tensors, key=lambda tensor: tensor.dtype):
        yield from in_groups(alike, lambda tensor: tensor.nbytes)


def in_groups(items: Iterable[Item], size_bytes: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items in order, in groups of about `BUCKET_BYTES` together."""
    group: list[Item] = []
    total_bytes = 0
    for item in items:
        group.append(item)
        total_bytes += size_bytes(item)
        if total_bytes >= BUCKET_BYTES:
            yield group
            group, total_bytes = [], 0
    if group:
        yield group
