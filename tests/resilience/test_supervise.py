"""The supervisor's loop, over ranks that fail as a script says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from paceline.core.clock import VirtualClock
from paceline.core.errors import RankError
from paceline.core.record import Record
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import Plan, ResilienceConfig
from paceline.resilience.records import RestartRecord
from paceline.resilience.supervise import Means, supervise

INTERVAL = 4
PLAN = Plan(
    mesh=MeshConfig(dp_shard=4), resilience=ResilienceConfig(on_failure="restart", max_restarts=5)
)


@dataclass(frozen=True)
class From:
    """A start: a plan and a step."""

    plan: Plan
    step: int = 0


@dataclass
class Ranks:
    """Ranks that save every fourth step and fail at given steps, one start after the other."""

    failures: Sequence[tuple[int, tuple[int, ...]]]
    starts: list[From] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    step: int | None = None

    def launch(self, start: From) -> None:
        self.starts.append(start)
        if len(self.starts) <= len(self.failures):
            self.step, ranks = self.failures[len(self.starts) - 1]
            raise RankError(f"rank {ranks[0]} is gone\nat length", hint="wait", ranks=ranks)

    def again(self, start: From) -> From:
        assert self.step is not None
        return replace(start, step=self.step // INTERVAL * INTERVAL)

    def shrink(self, start: From, num_ranks: int) -> From | None:
        if num_ranks < 2:
            return None
        return replace(start, plan=replace(start.plan, mesh=MeshConfig(dp_shard=num_ranks)))

    def begin(self) -> None:
        self.step = None

    def last_step(self) -> int | None:
        return self.step


def run(ranks: Ranks, plan: Plan = PLAN) -> None:
    means: Means[Any] = Means(
        launch=ranks.launch,
        again=ranks.again,
        shrink=ranks.shrink,
        progress=ranks,
        record=ranks.records.append,
        say=ranks.said.append,
        clock=VirtualClock(),
    )
    supervise(From(plan), means)


def test_ranks_that_do_not_fail_are_started_once():
    ranks = Ranks([])
    run(ranks)
    assert (ranks.starts, ranks.said, ranks.records) == ([From(PLAN)], [], [])


def test_ranks_go_on_from_what_is_saved_until_they_are_done():
    ranks = Ranks([(6, (1,)), (11, (3,))])
    run(ranks)
    assert [start.step for start in ranks.starts] == [0, 4, 8]
    restarts = [record for record in ranks.records if isinstance(record, RestartRecord)]
    assert restarts[1] == RestartRecord(
        restart=2,
        why="rank 3 is gone",
        ranks=(3,),
        failed_step=11,
        resumed_step=8,
        num_lost_steps=3,
        num_ranks=4,
        changes={},
    )
    assert ranks.said == [
        "rank 1 is gone",
        "restart 1 of at most 5, from step 4 on 4 rank(s)",
        "rank 3 is gone",
        "restart 2 of at most 5, from step 8 on 4 rank(s)",
    ]


def test_the_error_of_a_run_that_ends_says_why_it_was_not_started_again():
    ranks = Ranks([(6, (1,))] * 3)
    with pytest.raises(RankError) as caught:
        run(ranks)
    reason = "rank 1 is gone; it has come to this 3 times one after the other\nat length"
    assert (caught.value.message, caught.value.hint) == (reason, "wait")
    assert len(ranks.starts) == 3


def test_ranks_that_failed_are_done_without():
    resilience = ResilienceConfig(on_failure="shrink", max_restarts=5)
    plan = replace(PLAN, resilience=resilience)
    ranks = Ranks([(6, (1,)), (9, (0,)), (10, (0,))])
    with pytest.raises(RankError, match=r"is gone; no smaller layout is legal on 1 rank\(s\)"):
        run(ranks, plan)
    assert [start.plan.mesh.num_ranks for start in ranks.starts] == [4, 3, 2]
    assert ranks.said[1].endswith("from step 4 on 3 rank(s), now mesh.dp_shard = 3")


def test_a_plan_that_stops_keeps_the_error_as_it_is():
    ranks = Ranks([(6, (1,))])
    with pytest.raises(RankError) as caught:
        run(ranks, Plan())
    assert caught.value.message == "rank 1 is gone\nat length"
    assert (ranks.records, ranks.said) == ([], [])
