"""The parts of a module's tensors that a rank holds, and of its optimizer's, wherever they lie.

A part of a fused matrix is several boxes of it: some rows of the queries, some of the keys. Each is
a part of its own, a view of the rank's tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from paceline.core.errors import UsageError
from paceline.optim.parts import Part, local
from paceline.parallel.spread import Spread, inner_module, spread_of
from paceline.parallel.tensor.boundary import AXIS
from paceline.plan.declared import Declared, Piece
from paceline.plan.layout import Box, Place, padded_share
from paceline.plan.tensor_rules import WHOLE, Split


class Run(NamedTuple):
    """Neighbouring positions along the dimension of a split that a tensor rank has.

    Attributes:
        start: where they begin among all that the rank has.
        span: where they lie in the whole.
        is_owned: whether no lower rank has them too.
    """

    start: int
    span: range
    is_owned: bool


def module_parts(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, Part]]:
    """What this rank holds of a module and its optimizer, sharing memory with them.

    Names are those of the module's parameters and buffers after ``model.``, and with the
    optimizer's keys after ``optimizer.``. State of a parameter's shape lies as the parameter does,
    scalars are whole. A name comes once for each box that this rank has of it.

    Args:
        module: what `paceline.parallelize` has given, or any that is whole.
        optimizer: over its parameters, with its state in place.

    Raises:
        UsageError: state that is neither of a parameter's shape nor a scalar, or parameters in the
            optimizer that are not the module's.
    """
    spread = spread_of(module)
    parameters = dict(inner_module(module).named_parameters())
    found: list[tuple[str, Part]] = []
    for name, parameter in parameters.items():
        found += ((f"model.{name}", part) for part in _parts(name, parameter.detach(), spread))
    names = {id(parameter): name for name, parameter in parameters.items()}
    for parameter, state in optimizer.state.items():
        name = names.get(id(parameter))
        if name is None:
            hint = "make the optimizer over module.parameters(), after parallelize"
            raise UsageError("the optimizer has a parameter that is not the module's", hint=hint)
        for key, value in state.items():
            if value is not None:
                named = f"optimizer.{name}.{key}"
                parts = _parts_of_state(named, name, value, parameter, spread)
                found += ((named, part) for part in parts)
    return found + [(f"model.{name}", Part.of_whole(b)) for name, b in _buffers(module)]


@torch.no_grad()
def fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Makes the state of an optimizer that has none, as it is before its first step: zero.

    It takes a step of learning rate zero with gradients of zero, which moves nothing, and then
    sets all state to zero; gradients are left as they were.
    """
    if optimizer.state:
        return
    trained = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    gradients = [parameter.grad for parameter in trained]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                local(value).zero_()


def declared_pieces(module: nn.Module) -> dict[str, Declared]:
    """The tensors that are fused in parameters which several ranges of are on every tensor rank."""
    spread = spread_of(module)
    found: dict[str, Declared] = {}
    for name, parameter in inner_module(module).named_parameters():
        split = WHOLE if spread is None else spread.split_of(name)
        numbers = {len(share) for share in split.shares}
        if split.dim is None or len(numbers) > 1 or numbers == {1}:
            continue
        whole = Box.of_whole(_whole_shape(tuple(parameter.shape), split))
        spans = [_union(split, number) for number in range(numbers.pop())]
        pieces = (Piece(f"part {n}", whole.narrowed(split.dim, s)) for n, s in enumerate(spans))
        found[name] = Declared(pieces=tuple(pieces))
    return found


def runs(split: Split, rank: int) -> Iterator[Run]:
    """What a tensor rank has along the dimension of a split, so that each run has one owner."""
    taken = {index for lower in range(rank) for index in split.indices(lower)}
    start = 0
    for span in split.shares[rank]:
        first = span.start
        for stop in range(span.start + 1, span.stop + 1):
            is_owned = first not in taken
            if stop == span.stop or (stop not in taken) != is_owned:
                yield Run(start, range(first, stop), is_owned)
                start += stop - first
                first = stop


def _parts_of_state(
    named: str, name: str, value: object, parameter: Tensor, spread: Spread | None
) -> Iterator[Part]:
    if isinstance(value, Tensor) and value.shape == parameter.shape:
        return _parts(name, value, spread)
    if isinstance(value, Tensor) and value.ndim == 0:
        return iter([Part.of_whole(value)])
    found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise UsageError(
        f"{named} is {found}, its parameter {list(parameter.shape)}: where it lies is not known",
        hint="an optimizer whose state is of its parameters' shapes, or scalar tensors",
    )


def _parts(name: str, tensor: Tensor, spread: Spread | None) -> Iterator[Part]:
    """The boxes that this rank has of a tensor that lies as a parameter does."""
    if spread is None:
        yield Part.of_whole(tensor)
        return
    split, world = spread.split_of(name), spread.world
    shape = _whole_shape(tuple(tensor.shape), split)
    mine = local(tensor)
    rows = range(tensor.shape[0]) if tensor.ndim else range(1)
    if isinstance(tensor, DTensor):
        rows = padded_share(tensor.shape[0], world.degree("dp_shard"), world.coordinate("dp_shard"))
    if split.dim is None:
        box = Box.of_whole(shape)
        box = box.narrowed(0, rows) if tensor.ndim else box
        yield Part(mine, Place(shape, box, box))
        return
    all_of_rank = Box.of_whole(tuple(tensor.shape))  # of this tensor rank, over its data ranks
    mine_box = all_of_rank.narrowed(0, rows)
    for run in runs(split, world.coordinate(AXIS)):
        here = all_of_rank.narrowed(split.dim, range(run.start, run.start + len(run.span)))
        has = here.meet(mine_box)
        if not has.num_elements:
            continue
        skipped = has.offsets[0] - here.offsets[0]
        box = Box.of_whole(shape).narrowed(split.dim, run.span)
        box = box.narrowed(0, range(skipped, skipped + has.sizes[0]))
        place = Place(shape, box, box)
        yield Part(mine[has.within(mine_box)], place if run.is_owned else place.disowned())


def _whole_shape(shape: tuple[int, ...], split: Split) -> tuple[int, ...]:
    if split.dim is None:
        return shape
    size = max(span.stop for share in split.shares for span in share)
    return (*shape[: split.dim], size, *shape[split.dim + 1 :])


def _union(split: Split, number: int) -> range:
    """All that ranks have in their n-th ranges."""
    spans = [share[number] for share in split.shares]
    return range(min(span.start for span in spans), max(span.stop for span in spans))


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state dict has."""
    inner = inner_module(module)
    parameters = {name for name, _ in inner.named_parameters(remove_duplicate=False)}
    for name, value in inner.state_dict(keep_vars=True).items():
        if name not in parameters and isinstance(value, Tensor):
            yield name, value.detach()
