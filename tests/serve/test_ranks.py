"""An engine over ranks answers as one process does, and outlives its ranks."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import time

import pytest
from engines import Listener, ask, serving
from ranks import folder_of, local_engine, over_ranks

from paceline.serve.engine import join
from paceline.serve.executor.base import ExecutorLostError
from paceline.serve.executor.deadline import Deadline

pytestmark = pytest.mark.ranks

LAYOUTS = {"tp2": (1, 2), "tp3": (1, 3), "pp2": (2, 1), "pp3": (3, 1), "pp2-tp2": (2, 2)}
FAMILIES = ("llama", "gpt2", "mixtral")
QUICK = [("llama", name) for name in LAYOUTS] + [("gpt2", "pp2-tp2"), ("mixtral", "pp2-tp2")]


def requests():
    """Greedy and seeded, short and long, some with a prefix in common."""
    texts = ["hello", "a longer prompt, which is cut into chunks", "x" * 70, "hi", "x" * 60 + "y"]
    seeds = {"x" * 64 + "z": 3, "hello": 4, "hello, all of you": 5}
    greedy = [ask(text, max_tokens=12, ignore_eos=True) for text in texts]
    return greedy + [ask(text, seed=seed, ignore_eos=True) for text, seed in seeds.items()]


@pytest.fixture(scope="module")
def expected():
    """What one process answers."""
    answers = {}

    def of(family):
        if family not in answers:
            answers[family] = local_engine(folder_of(family)).generate(requests())
            assert len({token for answer in answers[family] for token in answer.token_ids}) > 20
        return answers[family]

    return of


def slow_unless_quick():
    for family, layout in itertools.product(FAMILIES, LAYOUTS):
        marks = [] if (family, layout) in QUICK else [pytest.mark.slow]
        yield pytest.param(family, layout, marks=marks, id=f"{family}-{layout}")


@pytest.mark.parametrize(("family", "layout"), list(slow_unless_quick()))
def test_ranks_equal_one_process(expected, family, layout):
    """Whole, in chunks of a few tokens, and with blocks for two or three requests at a time."""
    with over_ranks(folder_of(family), *LAYOUTS[layout], max_batch_tokens=48) as (engine, executor):
        assert engine.generate(requests()) == expected(family)
        assert engine.generate(requests()) == expected(family)  # prefixes are found now
        assert engine.book.num_found_tokens > 100
        engine.book.kv.pool.check()
        assert engine.book.kv.pool.num_held == 0
        assert executor.depth == LAYOUTS[layout][0]


@pytest.mark.parametrize("layout", ["pp2", "tp2"])
def test_ranks_equal_one_process_under_preemption_and_in_small_chunks(layout):
    texts = [f"{number} little riders" for number in range(6)]  # 3 blocks each in the end
    several = [ask(text, max_tokens=20, seed=3, ignore_eos=True) for text in texts]
    options = {"num_blocks": 8, "max_batch_tokens": 7}
    with over_ranks(folder_of("llama"), *LAYOUTS[layout], **options) as (engine, _):
        assert engine.generate(several) == local_engine(folder_of("llama")).generate(several)
        assert engine.book.num_preempted > 0
        engine.book.kv.pool.check()


# Stages work at different steps at a time.


def test_stages_do_not_wait_and_compute_no_padding():
    with over_ranks(folder_of("llama"), 2, 1) as (engine, executor):
        engine.generate(requests())
        spans = {(span.rank, span.done.number): span.done for span in executor.spans}
        numbers = sorted({number for _, number in spans})
        ahead = [
            number
            for number in numbers[:-1]
            if spans[0, number + 1].begin_s < spans[1, number].end_s
        ]
        assert len(ahead) > len(numbers) // 4  # a busy machine may keep a rank from its step
        rows = [spans[0, number].num_rows for number in numbers]
        num_prompt = sum(len(request.prompt_ids) for request in requests())
        num_answer = sum(request.max_tokens - 1 for request in requests())
        assert sum(rows) <= num_prompt + num_answer  # each token once, but for what is found
        assert sum(rows) == num_prompt + num_answer - engine.book.num_found_tokens
        assert all(spans[1, number].num_rows == spans[0, number].num_rows for number in numbers)


def test_one_step_at_a_time_does_not_overlap():
    with over_ranks(folder_of("llama"), 2, 1, depth=1) as (engine, executor):
        engine.generate(requests()[:3])
        spans = {(span.rank, span.done.number): span.done for span in executor.spans}
        for (rank, number), done in spans.items():
            if rank == 0 and (1, number - 1) in spans:
                assert done.begin_s >= spans[1, number - 1].end_s


def test_cancelling_what_a_step_has_a_part_of(expected):
    with over_ranks(folder_of("llama"), 2, 1) as (engine, _):
        listeners = [Listener() for _ in requests()]
        for request, listener in zip(requests(), listeners, strict=True):
            engine.submit(request, listener)
        while len(listeners[1].deltas) < 3:
            engine.step()
        assert any(state.is_busy for state in engine.book.open())
        for number in (1, 4, 6):
            engine.cancel(number)
        engine.drain()
        for number, listener in enumerate(listeners):
            if number in (1, 4, 6):
                assert listener.deltas[-1].finish_reason == "abort"
            else:
                assert join(listener.deltas) == expected("llama")[number]
        engine.book.kv.pool.check()
        assert engine.book.kv.pool.num_held == 0


# Ranks that are gone.


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(expected, caplog, rank):
    caplog.set_level(logging.CRITICAL)
    with over_ranks(folder_of("llama"), 2, 1) as (engine, executor):
        listeners = [Listener() for _ in requests()]
        for request, listener in zip(requests(), listeners, strict=True):
            engine.submit(request, listener)
        while len(listeners[0].deltas) < 3:
            engine.step()
        before = [process.pid for process in executor.workers.processes]
        os.kill(before[rank], signal.SIGKILL)
        engine.drain()
        ended = [listener.deltas[-1] for listener in listeners]
        assert {delta.finish_reason for delta in ended} == {"error"}
        assert {delta.error for delta in ended} == {f"rank {rank} (pp={rank}) was ended by SIGKILL"}
        assert not any(is_there(pid) for pid in before)
        assert not engine.is_restarting
        assert engine.is_healthy
        assert engine.generate(requests()) == expected("llama")
        engine.book.kv.pool.check()


def test_a_rank_that_is_killed_while_nobody_asks(expected, caplog):
    """It is noticed, and no request is harmed."""
    caplog.set_level(logging.CRITICAL)
    with over_ranks(folder_of("llama"), 1, 2) as (engine, executor), serving(engine):
        before = executor.workers
        os.kill(before.processes[1].pid, signal.SIGKILL)
        deadline_s = time.monotonic() + 20.0
        while executor.workers is before or engine.is_restarting:
            assert time.monotonic() < deadline_s, "nobody notices"
            time.sleep(0.02)
        listener = Listener()
        engine.submit(requests()[0], listener)
        listener.wait_for_end()
        assert join(listener.deltas) == expected("llama")[0]


def test_a_hung_rank(expected, caplog):
    caplog.set_level(logging.CRITICAL)
    deadline = Deadline(least_s=1.0, first_s=20.0, factor=1.0)
    with over_ranks(folder_of("llama"), 1, 2, deadline=deadline) as (engine, executor):
        engine.generate(requests()[:1])
        os.kill(executor.workers.processes[1].pid, signal.SIGSTOP)
        listener = Listener()
        engine.submit(requests()[0], listener)
        engine.drain()
        assert listener.deltas[-1].error == "no answer in 1.0 s: rank 1 (tp=1) stopped"
        assert engine.generate(requests()) == expected("llama")


def test_a_rank_that_fails_says_why(caplog):
    with over_ranks(folder_of("llama"), 2, 1) as (engine, executor):
        submit = executor.submit

        def break_tables(step):
            # A rank's table has no room for tokens that it has no blocks for.
            submit([work.__class__(**{**fields(work), "new_blocks": ()}) for work in step])

        executor.submit = break_tables
        listener = Listener()
        engine.submit(requests()[0], listener)
        engine.step()
        assert "(pp=" in listener.deltas[-1].error
        assert "has ended with exit code 1" in listener.deltas[-1].error
        assert "the table and the request disagree" in caplog.text
        executor.submit = submit
        assert engine.generate(requests()[:1])[0].finish_reason == "length"


def fields(work):
    return {name: getattr(work, name) for name in work.__dataclass_fields__}


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ranks_that_cannot_begin():
    with (
        pytest.raises(ExecutorLostError, match=r"rank \d \(pp=\d\) has ended with exit code 1"),
        over_ranks("random:llama:tiny", 2, 1, num_blocks=1 << 40),
    ):
        pass
