"""Times of two ranks by hand."""

from __future__ import annotations

import pytest

from paceline.parallel.pipeline.base import Action, Costs, Kind, RankActions
from paceline.parallel.pipeline.timeline import peak_activations, timeline

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741


def actions(*ranks: list[tuple[Kind, int, int]]) -> RankActions:
    return tuple(tuple(Action(*action) for action in own) for own in ranks)


def test_two_ranks_and_one_micro_batch():
    found = timeline(actions([(F, 0, 0), (B, 0, 0)], [(F, 1, 0), (B, 1, 0)]), Costs(2, 3, 4))
    first, second = found.spans
    assert [(span.start, span.end) for span in first] == [(0, 2), (11, 18)]
    assert [(span.start, span.end) for span in second] == [(2, 4), (4, 11)]
    assert found.duration == 18
    assert found.bubble == 18 - 9  # of either rank
    assert found.inner_bubble == 9  # of the first alone: the second never waits within its own


def test_a_split_backward_pass_lets_the_rank_before_go_on():
    found = timeline(
        actions([(F, 0, 0), (I, 0, 0), (W, 0, 0)], [(F, 1, 0), (I, 1, 0), (W, 1, 0)]),
        Costs(2, 3, 4),
    )
    first, second = found.spans
    assert [(span.start, span.end) for span in first] == [(0, 2), (7, 10), (10, 14)]
    assert [(span.start, span.end) for span in second] == [(2, 4), (4, 7), (7, 11)]
    assert (found.duration, found.bubble, found.inner_bubble) == (14, 5, 5)


@pytest.mark.parametrize("transfer", [0.0, 0.25, 10.0])
def test_transfers_delay_the_other_rank_and_keep_nobody_busy(transfer):
    passes = actions(
        [(F, 0, 0), (F, 0, 1), (B, 0, 0), (B, 0, 1)], [(F, 1, 0), (B, 1, 0), (F, 1, 1), (B, 1, 1)]
    )
    found = timeline(passes, transfer=transfer)
    first, second = found.spans
    assert [span.start for span in first[:2]] == [0, 1]
    assert [span.start for span in second] == [
        1 + transfer,
        2 + transfer,
        4 + transfer,
        5 + transfer,
    ]
    assert [span.start for span in first[2:]] == [4 + 2 * transfer, 7 + 2 * transfer]
    assert found.duration == 9 + 2 * transfer


def test_stages_of_one_rank_hand_over_at_once():
    passes = actions([(F, 0, 0), (F, 1, 0), (B, 1, 0), (B, 0, 0)])
    found = timeline(passes, transfer=10.0)
    assert (found.duration, found.bubble) == (6, 0)


def test_an_activation_lives_to_the_end_of_its_backward_or_weight_pass():
    (whole,) = actions([(F, 0, 0), (F, 0, 1), (B, 0, 0), (F, 0, 2), (B, 0, 1), (B, 0, 2)])
    assert peak_activations(whole) == 2
    (split,) = actions([(F, 0, 0), (I, 0, 0), (F, 0, 1), (I, 0, 1), (W, 0, 0), (W, 0, 1)])
    assert peak_activations(split) == 2
    assert peak_activations(()) == 0
