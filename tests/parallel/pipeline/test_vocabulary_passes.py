"""Where the passes of a spread vocabulary go: that all can run, what it costs, what is balanced."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.parallel.pipeline import SCHEDULES
from paceline.parallel.pipeline.base import (
    STAGE_PASSES,
    VOCABULARY_PASSES,
    Action,
    Costs,
    Kind,
    RankActions,
    Schedule,
    forward_only,
)
from paceline.parallel.pipeline.communicate import RECEIVES, SENDS, add_transfers, check
from paceline.parallel.pipeline.timeline import peak_activations, peak_scores, timeline
from paceline.parallel.pipeline.vocabulary_passes import spread_vocabulary

ONE, TWO = 1, 2
MANY = 32


def passes(name: str, num_ranks: int, num_microbatches: int) -> RankActions:
    schedule: Schedule = SCHEDULES.load(name)
    return schedule.actions(num_ranks, schedule.min_stages_per_rank, num_microbatches)


@given(
    st.sampled_from(list(SCHEDULES)),
    st.integers(2, 5),
    st.integers(1, 7),
    st.sampled_from([ONE, TWO]),
    st.floats(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_schedule_runs_with_words_spread(name, p, rounds, barriers, score):
    m = rounds * SCHEDULES.load(name).microbatch_unit(p)
    base = passes(name, p, m)
    spread = spread_vocabulary(base, barriers, Costs(score=score, embed=score / 4))
    check(add_transfers(spread), m)
    for own, before in zip(spread, base, strict=True):
        stage = [action for action in own if action.kind in STAGE_PASSES]
        for kinds in ((Kind.FORWARD,), STAGE_PASSES[1:]):  # each in the schedule's order
            left = [[a for a in some if a.kind in kinds] for some in (stage, before)]
            assert left[0] == left[1]


@pytest.mark.parametrize("barriers", [ONE, TWO])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_rank_has_as_much_of_the_vocabulary_s_work(name, barriers):
    kinds = {ONE: "E EW SI TW", TWO: "E EW S T"}[barriers].split()
    for own in spread_vocabulary(passes(name, 4, 8), barriers):
        found = Counter(str(action.kind) for action in own if action.kind in VOCABULARY_PASSES)
        assert found == dict.fromkeys(kinds, 8)


@pytest.mark.parametrize("barriers", [ONE, TWO])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_each_barrier_holds_one_more_micro_batch(name, p, barriers):
    """As in arXiv:2411.05288, Sec. 5: 1F1B's p on the first rank become p + 1 and p + 2."""
    m = -(-MANY // p) * p
    base = passes(name, p, m)
    per_rank = SCHEDULES.load(name).min_stages_per_rank
    for own, before in zip(spread_vocabulary(base, barriers), base, strict=True):
        most = peak_activations(before) + barriers * per_rank
        assert peak_activations(own) == min(most, m * per_rank)
        assert peak_scores(own) <= 2


@pytest.mark.parametrize("barriers", [ONE, TWO])
@pytest.mark.parametrize("name", ["gpipe", "one-f-one-b", "interleaved", "zero-bubble"])
@pytest.mark.parametrize("p", [2, 4, 8])
def test_words_add_no_bubble_where_transfers_take_no_time(name, p, barriers):
    base = passes(name, p, MANY)
    assert timeline(spread_vocabulary(base, barriers)).bubble == timeline(base).bubble


@pytest.mark.parametrize("barriers", [ONE, TWO])
@pytest.mark.parametrize("name", ["zero-bubble-v", "v-half"])
@pytest.mark.parametrize("p", [2, 4, 8])
def test_words_cost_schedules_like_a_v_a_bubble_that_does_not_grow(name, p, barriers):
    few, many = (
        timeline(spread_vocabulary(passes(name, p, m), barriers)).bubble for m in (4 * p, 12 * p)
    )
    assert few <= many <= few + 1
    assert many <= timeline(passes(name, p, 12 * p)).bubble + 2 * p


def test_the_head_no_longer_makes_the_last_rank_the_slowest():
    """A head as dear as a stage: on the last stage alone it makes all others wait."""
    p, stage = 4, 3.0
    costs = Costs(score=1 / p)  # three products, so much of each on every rank
    spread = timeline(spread_vocabulary(passes("one-f-one-b", p, MANY), ONE, costs), costs)
    busy = MANY * (stage + stage / p)
    assert spread.duration == busy + spread.bubble
    assert spread.duration < MANY * 2 * stage  # the least that one rank takes with both


def test_transfers_are_hidden_behind_passes():
    """With transfers of half a pass, spread words add fewer waits than stages have already."""
    for p in (2, 4):
        base = passes("one-f-one-b", p, MANY)
        spread = spread_vocabulary(base, TWO)
        assert timeline(spread, transfer=0.5).bubble < timeline(base, transfer=0.5).bubble


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_evaluation_runs_forward_passes_and_scores_alone(name):
    waves = forward_only(passes(name, 3, 6))
    spread = spread_vocabulary(waves, ONE)
    assert spread == spread_vocabulary(waves, TWO)
    kinds = {str(action.kind) for own in add_transfers(spread) for action in own}
    assert kinds <= {"E", "F", "S", "L", "SE", "RE", "SF", "RF", "SH", "RH", "SS", "RS"}
    timeline(spread)  # and all of them can


def test_two_ranks_of_1f1b():
    """The whole of a small step, as ranks run it."""
    first, last = spread_vocabulary(passes("one-f-one-b", 2, 2), TWO)
    assert " ".join(map(str, first)) == (
        "E0.0 E0.1 F0.0 F0.1 S0.0 T0.0 S0.1 T0.1 B0.0 EW0.0 B0.1 EW0.1"
    )
    assert " ".join(map(str, last)) == (
        "E1.0 E1.1 F1.0 S1.0 F1.1 S1.1 T1.0 B1.0 T1.1 B1.1 EW1.0 EW1.1"
    )


@given(
    st.sampled_from(list(SCHEDULES)),
    st.integers(2, 4),
    st.integers(1, 3),
    st.sampled_from([ONE, TWO]),
    st.randoms(),
)
@settings(max_examples=60, deadline=None)
def test_any_action_left_out_is_found(name, p, rounds, barriers, random):
    m = rounds * SCHEDULES.load(name).microbatch_unit(p)
    actions = add_transfers(spread_vocabulary(passes(name, p, m), barriers))
    rank = random.randrange(p)
    index = random.randrange(len(actions[rank]))
    shorter = actions[rank][:index] + actions[rank][index + 1 :]
    with pytest.raises(ValueError):  # noqa: PT011 (many texts)
        check((*actions[:rank], shorter, *actions[rank + 1 :]), m)


@pytest.mark.parametrize(
    ("kind", "earlier", "message"),
    [
        (Kind.SCORE, Kind.RECEIVE_HIDDEN, "never comes"),
        (Kind.SCORE_BACKWARD, Kind.SCORE, "never comes"),
        (Kind.SEND_TERM, Kind.SCORE_BACKWARD, "never comes"),
    ],
)
def test_a_pass_before_what_it_needs_is_found(kind, earlier, message):
    actions = [list(own) for own in add_transfers(spread_vocabulary(passes("gpipe", 2, 2), TWO))]
    own = actions[0]
    late, early = (own.index(Action(each, 0, 0)) for each in (kind, earlier))
    own.insert(early, own.pop(late))
    with pytest.raises(ValueError, match=message):
        check(tuple(map(tuple, actions)), 2)


def test_a_rank_sends_to_all_others_and_receives_from_them():
    """Per micro-batch on p ranks: rows and their gradients, hidden states, terms p - 1 each."""
    p, m = 4, 8
    actions = add_transfers(spread_vocabulary(passes("one-f-one-b", p, m), ONE))
    found = Counter(str(action.kind) for own in actions for action in own)
    words = {"SE", "RG", "RH", "ST"}
    assert {kind: found[kind] for kind in words} == dict.fromkeys(words, m * (p - 1))
    assert {kind: found[kind] for kind in ("RE", "SG", "SH", "RT")} == dict.fromkeys(
        ("RE", "SG", "SH", "RT"), m
    )
    assert found["SS"] == found["RS"] == m * p
    assert {str(kind) for kind in (*SENDS, *RECEIVES)} == {k for k in found if len(k) == 2} - {
        "EW",
        "SI",
        "TW",
    }
