"""A user's own module over data ranks, in a user's own loop."""

from __future__ import annotations

import atexit
import json
import warnings

import torch
import torch.distributed
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from paceline.core.errors import ConfigError, Problem, UsageError
from paceline.dist.world import World, join_ranks
from paceline.kernels.device import choose_dtype
from paceline.plan.check import require
from paceline.plan.mesh import DATA_AXES
from paceline.plan.plan import Plan

_LEAST_SHARE = 0.1  # of the parameters, for a list of modules to count as the module's blocks


def parallelize(module: nn.Module, plan: Plan) -> nn.Module:
    """Lays a module over the plan's ranks, each of which calls this; make the optimizer afterwards.

    After each backward pass a gradient is the average over ranks of the ranks' gradients, as is
    the custom of torch's own wrappers; `global_mean` makes a loss whose averaged gradients are
    those of the mean over all ranks' tokens. It accumulates over several passes as in one process.

    Of the plan, ``[mesh]``, ``[zero]`` and ``[precision]`` are used; the loop is yours. With ZeRO
    stage 0 every rank has the whole module; a parameter that a rank's pass does not reach counts
    as zero there. With stage 3 a rank has a share of each parameter, gathered block by block; there
    all ranks' passes must reach the same parameters. All ranks begin with the first rank's
    parameters and buffers.

    Args:
        module: on the device that this rank computes on, in the plan's precision.
        plan: how; under ``torchrun`` with as many ranks as it asks for.

    Returns:
        What to call in its place. Alone it is the module as it was; with stage 0 a
        ``DistributedDataParallel`` around it; with stage 3 the module itself, its parameters
        replaced in place.

    Raises:
        ConfigError: the plan has problems, its precision is not the module's, or its ZeRO stage
            is neither 0 nor torch's 3.
        UsageError: the number of ranks is not the plan's, or the module has no memory.
    """
    require_for_module(plan)
    device = _device(module)
    _require_precision(module, plan, device)
    is_joined = torch.distributed.is_initialized()
    rank = join_ranks(plan.mesh, device)
    if plan.mesh.num_ranks == 1:
        return module
    if not is_joined:  # the loop is the user's: there is no other end to leave the ranks at
        atexit.register(_leave)
    world = World(plan.mesh, rank, device)
    return _replicate(module, device) if plan.zero_stage == 0 else _shard(module, world)


def require_for_module(plan: Plan) -> None:
    """Raises ConfigError if a plan has problems, or asks for what is not for any module."""
    require(plan)
    rule = "is for models that train lays out; parallelize replicates, or splits by torch"
    problems = [
        Problem(f"mesh.{axis}", str(degree), rule, "use 1")
        for axis, degree in plan.mesh.to_dict().items()
        if axis not in DATA_AXES and degree > 1
    ]
    if plan.zero_technique not in ("0", "3"):
        is_own = plan.zero_stage == 3
        path, value = ("zero.sharder", "own") if is_own else ("zero.stage", plan.zero_stage)
        hint = "leave it out" if is_own else "use 0 or 3"
        problems.append(Problem(path, json.dumps(value), rule, hint))
    if problems:
        raise ConfigError(problems, source="the plan")


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _device(module: nn.Module) -> torch.device:
    devices = {parameter.device for parameter in module.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "none"
        raise UsageError(
            f"{type(module).__name__} has parameters on {found}: one device is needed",
            hint="module.to(device) first",
        )
    if (device := devices.pop()).type == "meta":
        hint = "load or initialise its weights first"
        raise UsageError(f"{type(module).__name__} has no memory behind its parameters", hint=hint)
    return device


def _require_precision(module: nn.Module, plan: Plan, device: torch.device) -> None:
    """Nothing is cast here, so the plan must say what the module is."""
    dtypes = {parameter.dtype for parameter in module.parameters()}
    names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
    problems = [
        Problem(
            f"precision.{key}",
            json.dumps(value),
            f"the module's parameters are {' and '.join(names)}; parallelize casts nothing",
            f'module.to(torch.{value}), or precision.{key} = "{names[0]}"',
        )
        for key, value in plan.precision.to_dict().items()
        if dtypes != {choose_dtype(value, device)}
    ]
    if problems:
        raise ConfigError(problems, source="the plan")


def _replicate(module: nn.Module, device: torch.device) -> nn.Module:
    # Without the search for parameters that a pass has not reached, one of them would leave
    # others unreduced in the same pass, and torch would say so in the next. It warns where the
    # search finds none, which is as it should be.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=device_ids, find_unused_parameters=True)


def _shard(module: nn.Module, world: World) -> nn.Module:
    is_hybrid = world.mesh.dp_replicate > 1
    axes = ("dp_replicate", "dp_shard") if is_hybrid else ("dp_shard",)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            torch.distributed.broadcast(tensor, src=0)
    for unit in (*blocks_of(module), module):
        fully_shard(unit, mesh=world.device_mesh(*axes))
    return module


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks that are gathered one at a time: the members of the module's large lists.

    A block that shares a parameter with anything outside it is left to the root, whose parameters
    are gathered together: apart they would part.
    """
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    blocks: list[nn.Module] = []
    for list_name, members in _large_lists(module):
        for index, block in enumerate(members):
            names = [name for parameter in block.parameters() for name in owners[parameter]]
            if names and all(name.startswith(f"{list_name}.{index}.") for name in names):
                blocks.append(block)
    return blocks


def _large_lists(module: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Lists of modules that are in no other list and hold a good share of the parameters."""
    named = module.named_modules()
    lists = [(name, part) for name, part in named if isinstance(part, nn.ModuleList) and name]
    least = _LEAST_SHARE * _size(module)
    return [
        (name, part)
        for name, part in lists
        if _size(part) >= least and not any(name.startswith(f"{outer}.") for outer, _ in lists)
    ]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
