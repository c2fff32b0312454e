from __future__ import annotations

import pytest
from traces import call, trace, way

from paceline.dist.calls import Channel, RankTrace
from paceline.resilience.delays import UNIT_BYTES, delays, slow_way

USUAL_S = 1e-3
ALL_PAIRS = [(a, b) for a in range(4) for b in range(4) if a != b]


def transfers(
    times_s: dict[tuple[int, int], float], *, count: int = 10, size_bytes: int = 4096
) -> list[RankTrace]:
    """Ranks that send each other things, each of which is waited for from before it is sent."""
    traces = {rank: [] for pair in times_s for rank in pair}
    for (source, destination), time_s in times_s.items():
        for n in range(1, count + 1):
            channel, sent_s = way(source, destination), 1.0 * n
            sent = call(channel, n, sent_s, None, operation="send", size_bytes=size_bytes)
            got = call(
                channel,
                n,
                sent_s - 0.6,
                sent_s + time_s,
                wait_s=sent_s - 0.5,
                operation="receive",
                size_bytes=size_bytes,
            )
            traces[source].append(sent._replace(wait_s=None))
            traces[destination].append(got)
    return [trace(rank, *calls) for rank, calls in sorted(traces.items())]


def found(slow: set[tuple[int, int]], pairs: list[tuple[int, int]] = ALL_PAIRS):
    return slow_way(transfers({p: 10 * USUAL_S if p in slow else USUAL_S for p in pairs}))


def test_the_matrix_has_the_delay_of_each_pair():
    matrix = delays(transfers({(0, 1): 2e-3, (1, 0): 5e-3}))[("pp",)]
    assert matrix[0, 1].delay_s == pytest.approx(2e-3)
    assert matrix[1, 0].delay_s == pytest.approx(5e-3)
    assert matrix[0, 1].num_transfers == 10


def test_a_large_tensor_may_take_longer():
    matrix = delays(transfers({(0, 1): 8e-3}, size_bytes=8 * UNIT_BYTES))[("pp",)]
    assert matrix[0, 1].unit_s == pytest.approx(1e-3)
    assert matrix[0, 1].delay_s == pytest.approx(8e-3)


def test_a_single_slow_pair_is_a_link():
    slow = found({(2, 1)})
    assert slow is not None
    assert (slow.kind, slow.ranks) == ("slow-link", (2, 1))
    assert "10.00 ms for a unit of 64 KiB, where others take 1.00 ms" in slow.evidence


def test_a_slow_row_is_a_sender_and_a_slow_column_a_receiver():
    row = found({(2, 0), (2, 1), (2, 3)})
    assert row is not None
    assert (row.kind, row.ranks) == ("slow-sender", (2,))
    column = found({(0, 2), (1, 2), (3, 2)})
    assert column is not None
    assert (column.kind, column.ranks) == ("slow-receiver", (2,))


def test_a_row_of_one_is_a_link():
    """On a ring each rank sends one other: sender, receiver and link are the same."""
    slow = found({(1, 2)}, [(0, 1), (1, 2), (2, 3), (3, 0)])
    assert slow is not None
    assert (slow.kind, slow.ranks) == ("slow-link", (1, 2))


def test_pairs_that_are_all_slow_are_what_the_machine_gives():
    assert found(set(ALL_PAIRS)) is None
    assert found(set()) is None


def test_few_transfers_say_nothing():
    assert delays(transfers({(0, 1): 1.0}, count=5)) == {("pp",): {}}


def test_what_is_there_before_it_is_wanted_has_no_delay():
    channel = way(0, 1)
    sends = [call(channel, n, float(n), None, operation="send") for n in range(1, 11)]
    gets = [
        call(channel, n, n + 0.1, n + 0.60001, wait_s=n + 0.6, operation="receive")
        for n in range(1, 11)
    ]
    sent = trace(0, *(s._replace(wait_s=None) for s in sends))
    assert delays([sent, trace(1, *gets)]) == {}


def test_the_senders_lateness_is_no_delay_of_the_link():
    """A receive that has waited for a second, nine tenths of it for the sender."""
    matrix = delays(transfers({(0, 1): 1e-3, (1, 0): 1e-3}))[("pp",)]
    assert matrix[0, 1].delay_s == pytest.approx(1e-3)  # it has waited for half a second more


def test_axes_are_judged_apart():
    """A ring over slow links is compared with itself, and not with the pipeline's."""
    slow = transfers({(0, 1): 20e-3, (1, 0): 20e-3})
    ring = [
        (t, [c._replace(channel=Channel(("cp",), c.channel.members, "keys")) for c in t.calls])
        for t in slow
    ]
    fast = transfers({(0, 1): 1e-3, (1, 0): 1e-3})
    both = [trace(t.rank, *f.calls, *calls) for (t, calls), f in zip(ring, fast, strict=True)]
    assert slow_way(both) is None
