"""From layout to layout in memory, on real ranks: the same bits, and no byte more than it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paceline.checkpoint.relay import PURPOSE, relay
from paceline.core.errors import DataError
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.hub import resolve
from paceline.models.weights import RandomWeights
from paceline.optim import OPTIMIZERS
from paceline.optim.parts import Part
from paceline.parallel.apply import apply
from paceline.plan.layout import Box, Place
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import PipelineConfig, Plan, ZeroConfig
from paceline.train.state import State

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

SHARD4 = Plan(mesh=MeshConfig(dp_shard=4), zero=ZeroConfig(sharder="own"))
CHAINS = {
    "dp_shard 4 to tp 2 x pp 2 to tp 4": (
        "llama",
        (
            SHARD4,
            Plan(mesh=MeshConfig(tp=2, pp=2)),
            Plan(mesh=MeshConfig(tp=4)),
        ),
    ),
    "ep 4 to tp 2 x dp_replicate 2 to ep 2 x pp 2": (
        "mixtral",
        (
            Plan(mesh=MeshConfig(dp_shard=4, ep=4), zero=ZeroConfig(stage=1)),
            Plan(mesh=MeshConfig(tp=2, dp_replicate=2)),
            Plan(mesh=MeshConfig(dp_shard=2, pp=2, ep=2), zero=ZeroConfig(stage=2)),
        ),
    ),
    "words spread to torch's 3": (
        "llama",
        (
            Plan(mesh=MeshConfig(pp=2), pipeline=PipelineConfig(vocabulary="spread")),
            Plan(mesh=MeshConfig(dp_shard=2)),
        ),
    ),
}


def state_of(family: str, plan: Plan, rank: int, *, is_filled: bool) -> tuple[State, World]:
    """A rank's state; filled, every tensor has values of its own, else it is -1."""
    source = resolve(f"random:{family}:tiny")
    world = World(plan.mesh, rank, torch.device("cpu"))
    model = apply(source.spec, RandomWeights(source.spec), plan, world)
    state = State(model, OPTIMIZERS.load("adamw")(model.parameters(), plan.optimizer))
    for name, part in state.parts().items():
        if is_filled:
            part.local.copy_(values_of(name, part.place))
        else:
            part.local.fill_(-1)
    return state, world


def values_of(name: str, place: Place) -> torch.Tensor:
    """What a place of a tensor holds: numbers that tell tensors and elements apart."""
    whole = torch.arange(Box.of_whole(place.shape).num_elements, dtype=torch.float32)
    whole = whole + sum(name.encode()) / 7
    return whole.view(place.shape)[place.box.slices]


def lacking_bytes(before: dict[str, Part], after: dict[str, Part]) -> int:
    """What a rank wants and does not have, counted element by element."""
    total = 0
    for name, part in after.items():
        has = torch.zeros(part.place.shape, dtype=torch.bool)
        if name in before:
            has[before[name].place.box.slices] = True
        total += int((~has[part.place.box.slices]).sum()) * part.local.itemsize
    return total


@pytest.mark.parametrize("chain", CHAINS)
def test_a_state_is_laid_otherwise_with_as_few_bytes_as_can_be(chain):
    family, plans = CHAINS[chain]

    def work(rank: int) -> list[tuple[int, int]]:
        bytes_of: list[tuple[int, int]] = []
        state, _ = state_of(family, plans[0], rank, is_filled=True)
        for plan in plans[1:]:
            other, world = state_of(family, plan, rank, is_filled=False)
            relay(state.parts(), other.parts(), world, buffer_bytes=20_000)
            for name, part in other.parts().items():
                assert torch.equal(part.local, values_of(name, part.place)), name
            lacking = lacking_bytes(state.parts(), other.parts())
            bytes_of.append((world.traffic.total_bytes(PURPOSE), lacking))
            largest = max(t.size_bytes for t in world.traffic.transfers if t.purpose == PURPOSE)
            assert largest <= 20_000
            state = other
        return bytes_of

    found = run_ranks(work, plans[0].mesh.num_ranks)
    for of_move in zip(*found, strict=True):
        sent, lacking = (sum(numbers) for numbers in zip(*of_move, strict=True))
        assert sent == lacking > 0


def test_trainer_ranks_give_serving_ranks_their_weights():
    """Ranks 0 and 1 train, ranks 2 and 3 serve: two halves of columns, in memory of their own."""
    shape = (6, 8)

    def work(rank: int) -> Any:
        world = World(MeshConfig(dp_replicate=4), rank, torch.device("cpu"))
        whole = Box.of_whole(shape)
        rows = whole.narrowed(0, range(3 * rank, 3 * rank + 3)) if rank < 2 else None
        columns = whole.narrowed(1, range(4 * rank - 8, 4 * rank - 4)) if rank >= 2 else None
        values = torch.arange(48.0).view(shape)
        has = {} if rows is None else {"w": Part(values[rows.slices], Place(shape, rows, rows))}
        got = torch.full((6, 4), -1.0)
        wants = {} if columns is None else {"w": Part(got, Place(shape, columns, columns))}
        relay(has, wants, world, purpose="weights")
        if columns is not None:
            assert torch.equal(got, values[columns.slices])
        return world.traffic.total_bytes("weights")

    assert run_ranks(work, 4) == [96, 96, 0, 0]


def test_copies_share_out_what_is_sent():
    """Two replicas have eight tensors; a third rank wants them: each gives half."""

    def work(rank: int) -> int:
        world = World(MeshConfig(dp_replicate=3), rank, torch.device("cpu"))
        names = [f"t{n}" for n in range(8)]
        filled = {name: Part.of_whole(torch.full((5,), float(n))) for n, name in enumerate(names)}
        empty = {name: Part.of_whole(torch.full((5,), -1.0)) for name in names}
        relay(filled if rank < 2 else {}, empty, world)
        assert all(torch.equal(empty[n].local, filled[n].local) for n in names)
        return world.traffic.total_bytes(PURPOSE)

    assert run_ranks(work, 3) == [80, 80, 0]


def test_one_process_lays_parts_otherwise_without_a_group():
    values, got = torch.arange(12.0).view(4, 3), torch.zeros(4, 3)
    whole = Box.of_whole((4, 3))
    top, low = (whole.narrowed(0, span) for span in (range(1), range(1, 4)))
    has = [("w", Part(values[b.slices], Place((4, 3), b, b))) for b in (top, low)]
    relay(has, {"w": Part.of_whole(got)}, World(MeshConfig(), 0, torch.device("cpu")))
    assert torch.equal(got, values)


def test_what_nobody_has_and_what_differs_are_refused_by_all():
    def work(rank: int) -> list[str]:
        world = World(MeshConfig(dp_replicate=2), rank, torch.device("cpu"))
        half = Box((0,), (2,))
        has = {"w": Part(torch.ones(2), Place((4,), half, half))}
        wants = Part.of_whole(torch.full((4,), -1.0))
        cases: list[tuple[Any, Any]] = [
            (has, {"w": wants}),
            (has, {"v": wants} if rank else {}),
            ({"w": Part.of_whole(torch.ones(4, dtype=torch.int32 if rank else None))}, {}),
            ({"w": Part.of_whole(torch.ones(4 + rank))}, {}),
        ]
        messages: list[str] = []
        for before, after in cases:
            with pytest.raises(DataError) as caught:
                relay(before, after, world)
            messages.append(caught.value.message)
        assert (wants.local == -1).all()
        return messages

    found = run_ranks(work, 2)
    assert found[0] == found[1]
    assert found[0] == [
        "w: nobody holds [2:4] of it",
        "v: nobody holds [0:4] of it",
        "w is int32 [4] on rank 1, float32 [4] on rank 0",
        "w is float32 [5] on rank 1, float32 [4] on rank 0",
    ]
