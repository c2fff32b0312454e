from __future__ import annotations

import os
import time

import pytest

from paceline.core.errors import DataError
from paceline.dist import ring as rings
from paceline.dist.calls import Channel
from paceline.dist.ring import NUM_SLOTS, Ring, RingReader, ring_path
from paceline.plan.mesh import MeshConfig

MESH = MeshConfig(pp=2, tp=2)


@pytest.fixture
def ring(tmp_path):
    made = Ring(ring_path(tmp_path, 2), MESH, 2)
    yield made
    made.close("done")


@pytest.fixture
def reader(ring, tmp_path):  # noqa: ARG001 (it reads what `ring` has made)
    return RingReader(ring_path(tmp_path, 2))


def test_a_call_can_be_read_while_it_is_open_and_afterwards(ring, reader):
    before_s = time.time()
    number = ring.enter("all-reduce", ("tp",), 12, "activations")
    (call,) = reader.read(is_whole=False).calls
    assert call.operation == "all-reduce"
    assert call.channel == Channel(("tp",), (2, 3))
    assert (call.sequence, call.purpose, call.size_bytes) == (1, "activations", 12)
    assert call.phase == "starting"
    assert call.wait_s == call.enter_s  # nothing was asked to go on in the meantime
    assert call.leave_s is None
    ring.leaves(number)
    assert reader.read(is_whole=False).calls == ()
    (call,) = reader.read().calls
    assert call.leave_s is not None
    assert before_s - 0.01 <= call.enter_s <= call.leave_s <= time.time() + 0.01


def test_each_channel_has_its_own_sequence(ring, reader):
    for axes in (("tp",), ("pp",), ("tp",), ()):
        ring.enter("all-reduce", axes, 4, "loss")
    for purpose in ("activations", "gradients", "activations"):
        ring.enter_way("send", "pp", (2, 0), 4, purpose)
    assert reader.read().reached == {
        Channel(("tp",), (2, 3)): 2,
        Channel(("pp",), (0, 2)): 1,
        Channel((), (0, 1, 2, 3)): 1,
        Channel(("pp",), (2, 0), "activations"): 2,
        Channel(("pp",), (2, 0), "gradients"): 1,
    }


def test_a_receive_is_waited_for_only_once_somebody_waits(ring, reader):
    number = ring.enter_way("receive", "pp", (0, 2), 4, "activations")
    assert reader.read().calls[0].wait_s is None
    ring.waits(number)
    call = reader.read().calls[0]
    assert call.wait_s is not None
    assert call.wait_s >= call.enter_s


def test_the_ring_goes_round_and_forgets_the_oldest(ring, reader):
    first = ring.enter("barrier", (), 0, "barrier")
    for _ in range(NUM_SLOTS + 2):
        ring.leaves(ring.enter("all-reduce", ("tp",), 4, "loss"))
    ring.leaves(first)  # far too late: the slot is another call's, and stays as it is
    trace = reader.read()
    assert [call.sequence for call in trace.calls] == list(range(3, NUM_SLOTS + 3))
    assert all(call.leave_s is not None for call in trace.calls)
    # What has been forgotten still counts: who has come to it is known for ever.
    assert trace.reached[Channel((), (0, 1, 2, 3))] == 1


@pytest.mark.parametrize("word", [0, 7])
def test_a_torn_slot_is_left_out(ring, reader, word):
    for _ in range(3):
        ring.leaves(ring.enter("all-reduce", ("tp",), 4, "loss"))
    slot = (rings._SLOTS + 2 * rings._SLOT.size) // 8
    ring._words[slot + word] = 2 + NUM_SLOTS  # as where a writer has only begun, or a reader has
    assert [call.sequence for call in reader.read().calls] == [1, 3]


def test_steps_have_times_and_say_whether_something_else_was_done(ring, reader):
    ring.begin_training()
    ring.finish_step(1)
    with ring.phase("saving"):
        assert reader.read().phase == "saving"
    ring.finish_step(2)
    ring.finish_step(3)
    trace = reader.read()
    assert trace.phase == "training"
    assert trace.step == 3
    assert [(s.step, s.is_plain) for s in trace.steps] == [(1, False), (2, False), (3, True)]
    assert trace.steps[1].end_s == trace.steps[2].begin_s
    assert trace.steps[2].end_s == trace.step_s


def test_the_last_steps_are_kept(ring, reader):
    ring.begin_training()
    for step in range(1, 301):
        ring.finish_step(step)
    assert [s.step for s in reader.read().steps] == list(range(45, 301))


def test_a_process_that_runs_signs_with_the_time(ring, reader):
    first_s = reader.read().heartbeat_s
    time.sleep(0.35)
    assert reader.read().heartbeat_s > first_s
    assert reader.read().state == "running"
    assert reader.read().pid == os.getpid()
    ring.close("lost")
    last = reader.read()
    time.sleep(0.25)
    assert reader.read().heartbeat_s == last.heartbeat_s
    assert last.state == "lost"


def test_a_rank_that_starts_again_has_a_new_ring(ring, reader, tmp_path):
    ring.enter("barrier", (), 0, "barrier")
    assert reader.is_current()
    again = Ring(ring_path(tmp_path, 2), MESH, 2)
    assert not reader.is_current()
    assert len(reader.read().calls) == 1  # what was is there still, for who has it open
    assert RingReader(ring_path(tmp_path, 2)).read().calls == ()
    again.close("done")


def test_what_is_no_ring_is_refused(tmp_path):
    path = tmp_path / "rank-0.ring"
    for content in (b"", b"nonsense", bytes(rings._SLOTS + NUM_SLOTS * rings._SLOT.size)):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is no ring of format 1"):
            RingReader(path)


def test_a_call_costs_microseconds(ring):
    """Two stamps and 64 bytes: a bound of twenty times what it takes here on a quiet machine."""

    def cost_s() -> float:
        start_s = time.perf_counter()
        for _ in range(1000):
            ring.leaves(ring.enter("all-reduce", ("tp",), 4, "loss"))
        return (time.perf_counter() - start_s) / 1000

    assert min(cost_s() for _ in range(5)) < 30e-6
