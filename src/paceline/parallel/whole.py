"""The whole state of a module that is laid over ranks, as one process would have it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from paceline.dist.world import World
from paceline.parallel.spread import inner_module, spread_of
from paceline.parallel.tensor.boundary import AXIS
from paceline.plan.tensor_rules import Split


@torch.no_grad()
def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of the whole module, on the CPU of the first rank; on other ranks it is empty.

    All ranks call this. ``model.save_pretrained(folder, state_dict=whole_state(model))`` on the
    first rank writes what one process would. Parameters that are tied are one tensor in it.

    Args:
        module: what `paceline.parallelize` has given, or any other.
    """
    inner, spread = inner_module(module), spread_of(module)
    is_kept = spread is None or spread.world.is_first
    parameter_of = {name: id(p) for name, p in inner.named_parameters(remove_duplicate=False)}
    wholes: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, value in inner.state_dict().items():
        key = parameter_of.get(name, id(value))
        if key not in wholes:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if spread is not None:
                whole = gather_split(whole, spread.split_of(name), spread.world)
            wholes[key] = whole.cpu() if is_kept else value
        state[name] = wholes[key]
    return state if is_kept else {}


def gather_split(part: Tensor, split: Split, world: World) -> Tensor:
    """The whole of a tensor that is split over tensor ranks, all of which call this."""
    if split.dim is None:
        return part
    shares = [split.indices(rank) for rank in range(world.degree(AXIS))]
    longest = max(map(len, shares))
    rows = part.movedim(split.dim, 0)
    padded = functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, longest - len(rows)))
    gathered = world.gather(padded[None].contiguous(), AXIS, purpose="whole state")
    size = 1 + max(index for share in shares for index in share)
    whole = rows.new_empty(size, *rows.shape[1:])
    for share, theirs in zip(shares, gathered, strict=True):
        whole[torch.tensor(share, device=part.device)] = theirs[: len(share)]
    return whole.movedim(0, split.dim).contiguous()
