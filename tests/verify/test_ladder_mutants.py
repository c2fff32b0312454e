"""Deliberate defects in a ladder's overlapped sums, each of which `certify` catches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from mutation import (
    PADDED,
    UNEVEN,
    Defects,
    Patch,
    assert_caught,
    certify_with,
    leave_out,
    nothing,
    plan_of,
)
from torch import Tensor

from paceline.dist.collectives import Pending
from paceline.dist.world import World
from paceline.models.ladder import LadderBlock, Stream
from paceline.parallel.tensor import ladder
from paceline.parallel.tensor.ladder import OverlappedSums

pytestmark = [pytest.mark.cpu, pytest.mark.ranks, pytest.mark.slow]

WHOLE = replace(UNEVEN, num_layers=3, ladder_from=0)
UPPER = replace(WHOLE, ladder_from=1)
PLAN = plan_of(tp=2, length=17, sequences=3, sequence_parallel=False)
RECOMPUTED = plan_of(tp=2, length=17, sequences=3, sequence_parallel=False, remat="full")

DEFECTS = Defects(UPPER)
mutant = DEFECTS.of


@pytest.mark.parametrize("spec", [WHOLE, UPPER], ids=["whole", "upper layers"])
@pytest.mark.parametrize("plan", [PLAN, RECOMPUTED], ids=["plain", "recomputed"])
def test_without_a_defect_the_same_path_is_certified(monkeypatch, plan, spec):
    certificate = certify_with(monkeypatch, plan, spec, nothing, PADDED)
    assert certificate.certified, certificate.worst


# Forward


@mutant(PLAN)
def output_never_added(patch: Patch, _rank: int) -> None:
    def fill(x_BTD: Tensor, stream: Stream) -> None:
        if stream.output_BTD is not None:
            ladder._under_way(stream).output.wait()
            x_BTD.detach().copy_(stream.x_BTD.detach())

    patch.setattr(ladder, "_fill", fill)


@mutant(PLAN)
def last_output_left_behind_at_the_final_norm(patch: Patch, _rank: int) -> None:
    def close(_self: OverlappedSums, stream: Stream) -> Tensor:
        ladder._under_way(stream).output.wait()
        return stream.x_BTD

    patch.setattr(OverlappedSums, "close", close)


@mutant(PLAN)
def output_added_before_it_is_summed(patch: Patch, _rank: int) -> None:
    """As if nobody waited; the sum itself comes too late for the values."""

    def start(self: World, tensor: Tensor, axes: tuple[str, ...], *, purpose: str) -> Pending:
        self.sum(tensor.clone(), axes, purpose=purpose)
        return Pending(None)

    _for_outputs(patch, start)


@mutant(PLAN)
def sublayer_sees_the_output_just_before_it(patch: Patch, _rank: int) -> None:
    """As in a plain model: one too late."""
    original = OverlappedSums.step

    def step(self: OverlappedSums, stream: Stream, sublayer: Any) -> Stream:
        return original(self, self.open(self.close(stream)), sublayer)

    patch.setattr(OverlappedSums, "step", step)


@mutant(PLAN)
def sublayer_sees_one_output_too_few(patch: Patch, _rank: int) -> None:
    original, before = OverlappedSums.step, list[Tensor]()

    def step(self: OverlappedSums, stream: Stream, sublayer: Any) -> Stream:
        if stream.output_BTD is None:
            before.clear()
        before.append(stream.x_BTD)
        return original(self, stream, lambda x_BTD: sublayer(x_BTD + before[-2:][0] - before[-1]))

    patch.setattr(OverlappedSums, "step", step)


@mutant(PLAN)
def second_sublayer_waits_at_the_seam(patch: Patch, _rank: int) -> None:
    """Only the first of the ladder's sublayers sees the stream whole."""
    original = LadderBlock.forward

    def forward(self: LadderBlock, x: Any, *others: Any) -> Any:
        if isinstance(x, Tensor):
            steps = [0]
            step = self.overlap.step

            def first_is_plain(stream: Stream, sublayer: Any) -> Stream:
                steps[0] += 1
                if steps[0] == 2:
                    stream = self.overlap.open(self.overlap.close(stream))
                return step(stream, sublayer)

            patch.setattr(self.overlap, "step", first_is_plain)
        return original(self, x, *others)

    patch.setattr(LadderBlock, "forward", forward)


@mutant(PLAN)
def biases_added_by_every_rank(patch: Patch, _rank: int) -> None:
    patch.setattr(ladder, "_is_first", lambda _world: True)


# Backward


@mutant(PLAN)
def gradient_of_the_input_never_summed(patch: Patch, _rank: int) -> None:
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.gradients.add(grad.clone(), Pending(None))
        return None, None, None

    patch.setattr(ladder._Enter, "backward", staticmethod(backward))


@mutant(PLAN)
def gradient_of_the_input_dropped(patch: Patch, _rank: int) -> None:
    patch.setattr(ladder._Started, "added_to", lambda _self, gradient: gradient)


@mutant(PLAN)
def gradient_added_before_it_is_summed(patch: Patch, _rank: int) -> None:
    original = ladder._Started.add
    patch.setattr(
        ladder._Started,
        "add",
        lambda self, total, pending: original(self, _once_waited(total, pending), Pending(None)),
    )


def _once_waited(total: Tensor, pending: Pending) -> Tensor:
    early = total.clone()
    pending.wait()
    return early / 2


@mutant(PLAN)
def gradient_of_the_second_sublayer_at_the_seam_dropped(patch: Patch, _rank: int) -> None:
    original = ladder._Started.added_to

    def added_to(self: Any, gradient: Tensor) -> Tensor:
        del self._sums[1:]
        return original(self, gradient)

    patch.setattr(ladder._Started, "added_to", added_to)


@mutant(PLAN)
def gradient_of_an_output_summed_again(patch: Patch, _rank: int) -> None:
    original = ladder._Add.backward

    def backward(ctx: Any, grad: Tensor) -> Any:
        nothing, of_x, of_output = original(ctx, grad)
        return nothing, of_x, None if of_output is None else 2 * of_output

    patch.setattr(ladder._Add, "backward", staticmethod(backward))


@mutant(PLAN)
def gradients_of_the_norms_of_a_ladder_not_summed(patch: Patch, _rank: int) -> None:
    leave_out(patch, "partial", lambda name: name.endswith("_norm.weight") and "key" not in name)


@mutant(PLAN)
def gradients_of_plain_norms_summed_too(patch: Patch, _rank: int) -> None:
    from paceline.parallel.tensor import decoder

    original = decoder._has_term
    patch.setattr(
        decoder, "_has_term", lambda name, spec: original(name, spec) or name.startswith("blocks.0")
    )


@mutant(RECOMPUTED)
def recomputed_from_an_output_that_is_waited_for_no_more(patch: Patch, _rank: int) -> None:
    """A block that is computed again takes only what was not under way when it first ran."""
    original, seen = ladder._fill, set[int]()

    def fill(x_BTD: Tensor, stream: Stream) -> None:
        key = id(stream.under_way)
        if key in seen:
            x_BTD.detach().copy_(stream.x_BTD.detach())
            return
        kept.append(stream.under_way)  # so that no other gets its id
        seen.add(key)
        original(x_BTD, stream)

    kept: list[object] = []
    patch.setattr(ladder, "_fill", fill)


def _for_outputs(patch: Patch, start: Callable[..., Pending]) -> None:
    """Replaces the start of the sums of outputs alone."""
    original = World.sum_start

    def sum_start(self: World, tensor: Tensor, axes: Any, *, purpose: str) -> Pending:
        is_output = torch.is_grad_enabled()
        return (start if is_output else original)(self, tensor, axes, purpose=purpose)

    patch.setattr(World, "sum_start", sum_start)


@pytest.mark.parametrize("name", DEFECTS)
def test_the_certificate_fails(monkeypatch, name):
    assert_caught(monkeypatch, DEFECTS[name])
