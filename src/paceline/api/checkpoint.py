"""``save_checkpoint`` and ``load_checkpoint``: a user's own module, in a user's own loop."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed
from torch import nn

from paceline.checkpoint.load import load
from paceline.checkpoint.manifest import MANIFEST, complete_checkpoints
from paceline.checkpoint.save import save
from paceline.core.errors import UsageError
from paceline.dist.world import World
from paceline.parallel.module_parts import declared_pieces, fill_state, module_parts
from paceline.parallel.spread import inner_module, spread_of
from paceline.plan.declared import Declared
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import Plan


def save_checkpoint(
    folder: str | Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer
) -> Path:
    """Writes ``folder/step-N`` with a module and its optimizer; all ranks call this.

    It holds whole tensors, whichever ranks have written their parts: `load_checkpoint` reads it
    under any other plan, or in one process. An optimizer that has taken no step has its state made,
    of zeros. What the loop has beside them (its place in the data, the learning rate) is the
    loop's to keep; nearly all of it follows from the step.

    Args:
        folder: of checkpoints; all of them are kept.
        step: optimizer steps taken.
        module: what `paceline.parallelize` has given, or any that is whole in one process.
        optimizer: over its parameters; its state is of their shapes, or scalar tensors.

    Returns:
        The checkpoint, complete once this returns on the first rank.

    Raises:
        UsageError: several ranks and a module that `parallelize` has not laid over them; or state
            of an optimizer whose place is not known.
        RankError: ranks hold different bits of what should be copies.
        PacelineError: it could not be written.
    """
    world = _world(module)
    fill_state(optimizer)
    parts = module_parts(module, optimizer)
    pieces = declared_pieces(module)
    named = {name: _declared(name, pieces) for name, part in parts if part.place.shape}
    plan = Plan(mesh=world.mesh)  # of the plan no more is known here, and none is needed
    return save(Path(folder), step, parts, plan, None, world, declared=named)


def load_checkpoint(path: str | Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Fills a module and its optimizer from a checkpoint of the same module; all ranks call this.

    The plan under which it was saved may be any. The settings of the optimizer's groups, such as
    the learning rate, stay as they are.

    Args:
        path: a checkpoint, or a folder of checkpoints: of these the newest complete one.
        module: what `paceline.parallelize` has given, or any that is whole in one process.
        optimizer: over its parameters; of the kind that was saved.

    Returns:
        The step of the checkpoint.

    Raises:
        UsageError: no complete checkpoint there, or several ranks and a module that `parallelize`
            has not laid over them.
        DataError: a damaged file, or tensors that are not the checkpoint's.
    """
    world = _world(module)
    fill_state(optimizer)
    return load(_newest(Path(path)), module_parts(module, optimizer), world).step


def _newest(path: Path) -> Path:
    if (path / MANIFEST).exists():
        return path
    complete = complete_checkpoints(path)
    if not complete:
        hint = "give a folder that save_checkpoint has written to, or a step-N in it"
        raise UsageError(f"{path} holds no complete checkpoint", hint=hint)
    return complete[-1]


def _declared(name: str, pieces: dict[str, Declared]) -> Declared:
    """What is known of a tensor: of a moment what is known of its parameter."""
    kind, _, rest = name.partition(".")
    return pieces.get(rest if kind == "model" else rest.rpartition(".")[0], Declared())


def _world(module: nn.Module) -> World:
    """The ranks that a module is laid over."""
    spread = spread_of(module)
    if spread is not None:
        return spread.world
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise UsageError(
            f"{type(inner_module(module)).__name__} is not laid over ranks, of which there are "
            f"{torch.distributed.get_world_size()}: each would save it on its own",
            hint="paceline.parallelize(module, plan) first",
        )
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return World(MeshConfig(), 0, device)
