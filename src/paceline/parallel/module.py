"""A user's own module over data ranks, in a user's own loop."""

from __future__ import annotations

import atexit
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from paceline.core import rng
from paceline.core.errors import ConfigError, Problem, UsageError
from paceline.dist.world import World, join_ranks
from paceline.kernels.device import choose_dtype
from paceline.parallel.spread import Spread, inner_module, remember
from paceline.parallel.tensor.module import Sample, split_module
from paceline.plan.check import require_for_module
from paceline.plan.mesh import DATA_AXES
from paceline.plan.module_rules import Rules
from paceline.plan.plan import Plan

_LEAST_SHARE = 0.1  # of the parameters, for a list of modules to count as the module's blocks


Call = Callable[[nn.Module, Tensor], Any]
"""``call(module, tokens_BT)`` runs a module's forward pass."""

_SAMPLE_SHAPE = (2, 7)  # sequences and tokens: other sizes than any model has, and little work


def parallelize(
    module: nn.Module,
    plan: Plan,
    *,
    tensor_rules: Mapping[str, str] | None = None,
    call: Call | None = None,
) -> nn.Module:
    """Lays a module over the plan's ranks, each of which calls this; make the optimizer afterwards.

    After each backward pass a gradient is the average over ranks of the ranks' gradients, as is
    the custom of torch's own wrappers; `global_mean` makes a loss whose averaged gradients are
    those of the mean over all ranks' tokens. It accumulates over several passes as in one process.

    Of the plan, ``[mesh]``, ``[zero]``, ``[tensor]`` and ``[precision]`` are used; the loop is
    yours. With ``mesh.tp`` above 1 matrices are split over those ranks, which read the same data,
    by rules that are derived from what the module computes and proved on a few tokens before
    anything is thrown away; what cannot be split stays whole, which is exact too
    (`tensor_rules_of` says what and why). Gradients are averaged over data ranks alone. Clip with
    `clip_gradients`, which counts every element once, and save with `whole_state`.

    With ZeRO stage 0 every data rank has the whole module; a parameter that a rank's pass does not
    reach counts as zero there. With stage 3 a rank has a share of each parameter, gathered block by
    block; there all ranks' passes must reach the same parameters. All ranks begin with the first
    rank's parameters and buffers.

    Args:
        module: on the device that this rank computes on, in the plan's precision.
        plan: how; under ``torchrun`` with as many ranks as it asks for.
        tensor_rules: where the rules are not to be what they would be: patterns of names of linear
            layers and embeddings to ``column`` (split by outputs), ``row`` (by inputs),
            ``vocabulary`` (by words) or ``whole``. The first that matches counts.
        call: how the module is called on token ids, for tensor ranks. By default Hugging Face's
            way where its ``forward`` has ``input_ids``, else ``module(tokens_BT)``.

    Returns:
        What to call in its place. Alone, or with tensor ranks only, it is the module itself; with
        stage 0 a ``DistributedDataParallel`` around it; with stage 3 the module itself, its
        parameters replaced in place.

    Raises:
        ConfigError: the plan has problems, its precision is not the module's, or its ZeRO stage
            is neither 0 nor torch's 3.
        UsageError: the number of ranks is not the plan's, the module has no memory, or tensor
            ranks cannot split it: the message names the layer and the operation.
    """
    require_for_module(plan)
    if tensor_rules and plan.mesh.tp == 1:
        hint = "leave tensor_rules out, or set mesh.tp"
        raise UsageError("tensor_rules rule over tensor ranks, of which there is one", hint=hint)
    device = _device(module)
    _require_precision(module, plan, device)
    is_joined = torch.distributed.is_initialized()
    rank = join_ranks(plan.mesh, device)
    if plan.mesh.num_ranks == 1:
        return module
    if not is_joined:  # the loop is the user's: there is no other end to leave the ranks at
        atexit.register(_leave)
    world = World(plan.mesh, rank, device)
    rules = _split(module, world, tensor_rules, call) if plan.mesh.tp > 1 else None
    remember(module, Spread(world, rules))
    if plan.mesh.num_data_ranks == 1:
        return module
    return _replicate(module, world) if plan.zero_stage == 0 else _shard(module, world)


def call_with_tokens(module: nn.Module, tokens_BT: Tensor, **options: Any) -> Any:
    """Calls a module on token ids, in Hugging Face's way where it takes that.

    Args:
        module: whose ``forward`` is looked at.
        tokens_BT: its input.
        options: given where ``forward`` knows them and takes ``input_ids``.
    """
    parameters = inspect.signature(inner_module(module).forward).parameters
    if "input_ids" not in parameters:
        return module(tokens_BT)
    known = {name: value for name, value in options.items() if name in parameters}
    return module(input_ids=tokens_BT, **known)


def vocabulary_size(module: nn.Module) -> int:
    """Rows of the first embedding, which is that of tokens.

    Raises:
        UsageError: there is none.
    """
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            return part.num_embeddings
    message = f"{type(module).__name__} has no nn.Embedding: it is tried out on token ids"
    raise UsageError(message, hint="wrap it in a module that takes tokens")


def _split(
    module: nn.Module, world: World, overrides: Mapping[str, str] | None, call: Call | None
) -> Rules:
    size = _SAMPLE_SHAPE[0] * _SAMPLE_SHAPE[1]
    draws = rng.bits(size, seed=0, purpose="tensor rules", stream="sample")
    ids = (draws % np.uint64(vocabulary_size(module))).astype(np.int64)
    tokens_BT = torch.from_numpy(ids).view(_SAMPLE_SHAPE).to(world.device)
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[-1, -2:] = 0  # padded: what masks take is what more modules have to get right

    def run() -> Any:
        if call is not None:
            return call(module, tokens_BT)
        return call_with_tokens(module, tokens_BT, attention_mask=mask_BT, use_cache=False)

    _share_values(module)
    return split_module(module, world, Sample(run, tokens_BT), overrides)


@torch.no_grad()
def _share_values(module: nn.Module) -> None:
    """All ranks begin with what the first has."""
    for tensor in (*module.parameters(), *module.buffers()):
        torch.distributed.broadcast(tensor, src=0)


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


def _replicate(module: nn.Module, world: World) -> nn.Module:
    # Without the search for parameters that a pass has not reached, one of them would leave
    # others unreduced in the same pass, and torch would say so in the next. It warns where the
    # search finds none, which is as it should be.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    return DistributedDataParallel(
        module,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        process_group=world.group(DATA_AXES),
        find_unused_parameters=True,
    )


def _shard(module: nn.Module, world: World) -> nn.Module:
    is_hybrid = world.mesh.dp_replicate > 1
    axes = ("dp_replicate", "dp_shard") if is_hybrid else ("dp_shard",)
    if world.mesh.tp == 1:  # else they have been shared before they were split
        _share_values(module)
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
