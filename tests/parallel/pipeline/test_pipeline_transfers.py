"""Transfers between ranks: where they go, and every defect that the proof must find."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.parallel.pipeline import SCHEDULES
from paceline.parallel.pipeline.base import Action, Kind, Line, RankActions
from paceline.parallel.pipeline.communicate import (
    RECEIVES,
    SENDS,
    add_transfers,
    channels_of,
    check,
    other_ends,
)

KINDS = {kind.value: kind for kind in Kind}


def parsed(text: str) -> RankActions:
    """Ranks from text: one line each, of actions as they print."""

    def action(word: str) -> Action:
        letters = word.rstrip("0123456789.")
        stage, microbatch = word[len(letters) :].split(".")
        return Action(KINDS[letters], int(stage), int(microbatch))

    return tuple(tuple(map(action, line.split())) for line in text.strip().splitlines())


TWO_RANKS = """
    F0.0 SF0.0 F0.1 SF0.1 RB0.0 B0.0 RB0.1 B0.1
    RF1.0 F1.0 B1.0 SB1.0 RF1.1 F1.1 B1.1 SB1.1
"""


def test_sends_follow_what_makes_and_receives_precede_what_takes():
    passes = parsed("F0.0 F0.1 B0.0 B0.1\n F1.0 B1.0 F1.1 B1.1")
    assert add_transfers(passes) == parsed(TWO_RANKS)
    check(parsed(TWO_RANKS), 2)


def test_split_backward_passes_send_after_the_input_pass():
    passes = parsed("F0.0 I0.0 W0.0\n F1.0 I1.0 W1.0")
    expected = "F0.0 SF0.0 RB0.0 I0.0 W0.0\n RF1.0 F1.0 I1.0 SB1.0 W1.0"
    assert add_transfers(passes) == parsed(expected)


def test_stages_of_one_rank_hand_over_without_transfers():
    passes = parsed("F0.0 F3.0 B3.0 B0.0\n F1.0 F2.0 B2.0 B1.0")
    added = add_transfers(passes)
    assert added == parsed("""
        F0.0 SF0.0 RF3.0 F3.0 B3.0 SB3.0 RB0.0 B0.0
        RF1.0 F1.0 F2.0 SF2.0 RB2.0 B2.0 B1.0 SB1.0
    """)
    check(added, 1)
    alone = parsed("F0.0 F1.0 B1.0 B0.0")
    assert add_transfers(alone) == alone


def test_what_is_taken_first_but_sent_last_is_received_in_the_order_of_its_channel():
    passes = parsed("F0.0 F0.1 B0.0 B0.1\n F1.1 F1.0 B1.0 B1.1")
    added = add_transfers(passes)
    assert added[1][:4] == parsed("RF1.0 RF1.1 F1.1 F1.0")[0]
    check(added, 2)


def test_ends_and_channels():
    line = Line({0: 0, 1: 1, 2: 1, 3: 0})
    for text, expected in (
        ("SF0.5", ("RF1.5", (0, 1, Kind.SEND_FORWARD))),
        ("SF2.5", ("RF3.5", (1, 0, Kind.SEND_FORWARD))),
        ("SB1.5", ("RB0.5", (1, 0, Kind.SEND_BACKWARD))),
        ("SB3.5", ("RB2.5", (0, 1, Kind.SEND_BACKWARD))),
    ):
        ((send,),) = parsed(text)
        (receive,) = other_ends(send, line)
        assert (repr(receive), channels_of(send, line)) == (expected[0], {expected[1]: send})
        assert channels_of(receive, line) == {expected[1]: send}
        assert other_ends(receive, line) == (send,)
    assert other_ends(Action(Kind.SEND_FORWARD, 1, 5), line) == ()  # handed over
    assert other_ends(Action(Kind.SEND_FORWARD, 3, 5), line) == ()  # beyond the end
    with pytest.raises(ValueError, match=r"F0\.0 is no transfer"):
        other_ends(Action(Kind.FORWARD, 0, 0), line)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("F0.1 ", "", r"stage 0 has of micro-batch 1 0 F, 1 B, 0 I, 0 W"),
        ("F0.1 ", "F0.1 F0.1 ", r"stage 0 has of micro-batch 1 2 F"),
        ("B1.1", "I1.1", r"stage 1 has of micro-batch 1 1 F, 0 B, 1 I, 0 W"),
        ("B1.1", "B1.1 W1.1", r"1 F, 1 B, 0 I, 1 W"),
        ("B0.1", "B0.1 F0.2 B0.2", r"0\.2 is of no micro-batch below 2"),
        ("F0.1 ", "F0.1 F1.1 ", r"F1\.1 is on rank 0: its stage is on another rank too"),
        ("SF0.1 ", "", r"rank 0 has SF0\.1 0 time\(s\), not 1"),
        ("SF0.1 ", "SF0.1 SF0.1 ", r"rank 0 has SF0\.1 2 time\(s\), not 1"),
        ("RF1.1 ", "", r"brings SF0\.1, but None is what is received"),
        ("RF1.1 ", "RF1.1 RF1.1 ", r"brings None, but SF0\.1 is what is received"),
        ("RF1.0 F1.0", "RF1.1 RF1.0 F1.0", r"brings SF0\.0, but SF0\.1"),
        ("F0.0 SF0.0", "SF0.0 F0.0", r"never comes, at \[SF0\.0"),
        ("RF1.0 F1.0", "F1.0 RF1.0", r"never comes, at \[RB0\.0, F1\.0\]|\[B0\.0, F1\.0\]"),
        ("F1.0 B1.0 SB1.0", "B1.0 SB1.0 F1.0", r"never comes, at \[.*B1\.0\]"),
        ("F0.1 SF0.1 RB0.0 B0.0", "RB0.0 B0.0 F0.1 SF0.1", None),
        ("RF1.0 F1.0 B1.0 SB1.0 RF1.1 F1.1", "RF1.0 F1.0 RF1.1 F1.1 B1.0 SB1.0", None),
    ],
)
def test_the_proof_finds_every_defect(old, new, message):
    assert old in TWO_RANKS
    broken = parsed(TWO_RANKS.replace(old, new, 1))
    if message is None:  # another order that can run
        check(broken, 2)
        return
    with pytest.raises(ValueError, match=message):
        check(broken, 2)


def test_a_weight_pass_before_its_input_pass_is_found():
    with pytest.raises(ValueError, match=r"never comes, at \[W0\.0\]"):
        check(parsed("F0.0 W0.0 I0.0"), 1)


def test_ranks_that_wait_for_each_other_are_found():
    """Both take before they make: rank 0 wants a gradient before it sends what leads to it."""
    text = TWO_RANKS.replace("F0.1 SF0.1 RB0.0 B0.0", "RB0.0 B0.0 F0.1 SF0.1")
    text = text.replace("B1.0 SB1.0 RF1.1 F1.1", "RF1.1 F1.1 B1.0 SB1.0")
    with pytest.raises(ValueError, match=r"ranks wait for what never comes, at \[B0\.0, F1\.1\]"):
        check(parsed(text), 2)


def test_a_stage_without_passes_is_found():
    with pytest.raises(ValueError, match=r"stages \[0, 2\]: some stage has none"):
        check(parsed("F0.0 B0.0\n F2.0 B2.0"), 1)


@given(st.sampled_from(list(SCHEDULES)), st.integers(2, 5), st.integers(1, 4), st.randoms())
@settings(max_examples=80, deadline=None)
def test_any_action_left_out_is_found(name, p, rounds, random):
    schedule = SCHEDULES.load(name)
    m = rounds * schedule.microbatch_unit(p)
    actions = add_transfers(schedule.actions(p, schedule.min_stages_per_rank, m))
    rank = random.randrange(p)
    index = random.randrange(len(actions[rank]))
    shorter = actions[rank][:index] + actions[rank][index + 1 :]
    with pytest.raises(ValueError):  # noqa: PT011 (many texts)
        check((*actions[:rank], shorter, *actions[rank + 1 :]), m)


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_stage_border_between_ranks_is_crossed_once_a_micro_batch_each_way(name):
    schedule = SCHEDULES.load(name)
    p, v, m = 4, schedule.min_stages_per_rank, 8
    actions = [action for own in add_transfers(schedule.actions(p, v, m)) for action in own]
    num_borders = p * v - 1 - (schedule.placement == "v")  # the turn is within a rank
    assert sum(action.kind in SENDS for action in actions) == 2 * m * num_borders
    assert sum(action.kind in RECEIVES for action in actions) == 2 * m * num_borders
