"""What differs between the versions of torch that we run on, under one name each."""

from __future__ import annotations

import torch.distributed

_GATHER = "all_gather_single", "all_gather_into_tensor"  # the second is the older name
_REDUCE_SCATTER = "reduce_scatter_single", "reduce_scatter_tensor"


def _first(names: tuple[str, ...]) -> str:
    return next(name for name in names if hasattr(torch.distributed, name))


all_gather = getattr(torch.distributed, _first(_GATHER))
"""``all_gather(output, input, group=...)``: parts of equal shape, end to end."""
reduce_scatter = getattr(torch.distributed, _first(_REDUCE_SCATTER))
"""``reduce_scatter(output, input, group=...)``: a part of the sum."""
