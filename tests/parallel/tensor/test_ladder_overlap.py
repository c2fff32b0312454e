"""When a ladder's sums begin and are waited for, and what of a slow link shows."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from paceline.dist.collectives import Pending
from paceline.dist.testing import SlowWorld, run_ranks
from paceline.dist.world import World
from paceline.memory.remat.base import recomputed
from paceline.models.families.llama import PRESETS
from paceline.models.ladder import LadderBlock
from paceline.models.weights import RandomWeights, build, fill
from paceline.parallel.tensor.ladder import OverlappedSums
from paceline.plan.mesh import MeshConfig

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
TOKENS_BT = torch.arange(12).view(2, 6)
NUM_LAYERS = 3
NUM_SUBLAYERS = 2 * NUM_LAYERS


class _Told(Pending):
    """A sum of one rank that tells when it is waited for."""

    def __init__(self, events: list[str], name: str) -> None:
        super().__init__(None)
        self._events, self._name = events, name

    def wait(self) -> None:
        self._events.append(f"wait {self._name}")


class _Telling(World):
    """A world of one rank that tells when sums are started, and in which pass."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(MeshConfig(), 0, CPU)
        self._events = events

    def sum_start(self, tensor: Tensor, axes: tuple[str, ...], *, purpose: str) -> Pending:
        del tensor, axes, purpose
        name = self._events[-1]  # what has just been computed
        self._events.append(f"start {name}")
        return _Told(self._events, name)


def told_model(first_layer: int, events: list[str]):
    """A model that tells what its sublayers do."""
    spec = replace(PRESETS["tiny"], num_layers=NUM_LAYERS, ladder_from=first_layer)
    model = build(spec)
    fill(model, RandomWeights(spec), CPU)
    world, tell = _Telling(events), events.append
    for layer, block in enumerate(model.blocks):
        if isinstance(block, LadderBlock):
            block.overlap = OverlappedSums(world)
        parts = ((block.attention_norm, block.attention), (block.ffn_norm, block.ffn))
        for number, (norm, sublayer) in enumerate(parts, start=2 * layer):
            sublayer.register_forward_hook(lambda *_, n=number: tell(f"forward {n}"))
            norm.register_full_backward_hook(lambda *_, n=number: tell(f"backward {n}"))
    return model


def expected_forward(first: int) -> list[str]:
    events: list[str] = []
    for number in range(first, NUM_SUBLAYERS):
        events += [f"forward {number}", f"start forward {number}"]
        if number > first:
            events.append(f"wait forward {number - 1}")
    return [*events, f"wait forward {NUM_SUBLAYERS - 1}"]


def expected_backward(first: int) -> list[str]:
    events: list[str] = []
    for number in reversed(range(first, NUM_SUBLAYERS)):
        events += [f"backward {number}", f"start backward {number}"]
        if number < NUM_SUBLAYERS - 1:
            events.append(f"wait backward {number + 1}")
    return [*events, f"wait backward {first}"]


@pytest.mark.parametrize("first_layer", [0, 1, 2], ids=["whole", "upper layers", "last layer"])
def test_a_sum_is_waited_for_once_the_next_sublayer_has_been_computed(first_layer):
    """In both passes; the seam's own gradient alone is waited for at once."""
    events: list[str] = []
    model, first = told_model(first_layer, events), 2 * first_layer
    loss = model(TOKENS_BT).square().mean()
    plain = [f"forward {number}" for number in range(first)]
    assert events == plain + expected_forward(first)
    events.clear()
    loss.backward()
    plain = [f"backward {number}" for number in reversed(range(first))]
    assert events == expected_backward(first) + plain


def test_a_block_that_is_computed_again_waits_as_late():
    """The backward pass starts and awaits its sums in the same order, whatever is recomputed."""
    events: list[str] = []
    model = told_model(0, events)
    model.around_block = recomputed
    loss = model(TOKENS_BT).square().mean()
    assert events == expected_forward(0)
    events.clear()
    loss.backward()
    assert [event for event in events if "backward" in event] == expected_backward(0)


class _Work(torch.autograd.Function):
    """The identity, which takes its time in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, time_s: float) -> Tensor:
        ctx.time_s = time_s
        time.sleep(time_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        time.sleep(ctx.time_s)
        return grad_outputs[0], None


@pytest.mark.ranks
def test_the_latency_of_sums_is_hidden_behind_work_that_takes_as_long():
    """Of 6 sums a pass 5 can hide: at most a fifth of their 50 ms each shows.

    Work is a sleep of 60 ms: what the machine does beside it delays some passes, not the best of 3.
    """
    latency_s, work_s, steps, passes = 0.05, 0.06, 6, 3

    def work(rank: int) -> list[tuple[float, float]]:
        world = SlowWorld(MeshConfig(tp=2), rank, CPU)
        world.latency_s = latency_s
        overlap, times_s = OverlappedSums(world), []
        for _ in range(passes):
            world.barrier()
            start_s = time.perf_counter()
            stream = overlap.open(torch.ones(1, 2, 3, requires_grad=True))
            for _ in range(steps):
                stream = overlap.step(stream, lambda x_BTD: _Work.apply(x_BTD, work_s))
            out_BTD = overlap.close(stream)
            middle_s = time.perf_counter()
            out_BTD.sum().backward()
            times_s.append((middle_s - start_s, time.perf_counter() - middle_s))
        assert world.num_sums == 2 * steps * passes
        return times_s

    for times_s in run_ranks(work, 2):
        for best_s in map(min, zip(*times_s, strict=True)):
            shown_s = best_s - steps * work_s - latency_s  # of one sum nothing hides
            assert shown_s < 0.2 * (steps - 1) * latency_s


@pytest.mark.ranks
def test_a_slow_world_s_sums_take_so_much_longer():
    """Waited for at once, or only after as long a time: then nothing of it is left."""

    def work(rank: int) -> tuple[float, float, float, list[float]]:
        world = SlowWorld(MeshConfig(tp=2), rank, CPU)
        world.latency_s = 0.05
        tensors = [torch.full((3,), float(rank + 1)) for _ in range(3)]
        world.barrier()
        times_s = [time.perf_counter()]
        world.sum(tensors[0], ("tp",), purpose="a test")
        times_s.append(time.perf_counter())
        world.sum_start(tensors[1], ("tp",), purpose="a test").wait()
        times_s.append(time.perf_counter())
        pending = world.sum_start(tensors[2], ("tp",), purpose="a test")
        time.sleep(0.2)
        times_s.append(time.perf_counter())
        pending.wait()
        pending.wait()
        times_s.append(time.perf_counter())
        at_once, started, _, late = (b - a for a, b in pairwise(times_s))
        return at_once, started, late, [tensor.sum().item() for tensor in tensors]

    for at_once_s, started_s, late_s, sums in run_ranks(work, 2):
        assert min(at_once_s, started_s) >= 0.05
        assert late_s < 0.04
        assert sums == [9.0] * 3
