"""The engine: answers that depend on the request alone, and what ends them."""

from __future__ import annotations

import logging
import re

import pytest
from engines import (
    SPEC,
    TOKENIZER,
    Listener,
    Scripted,
    ask,
    encode,
    real_engine,
    scripted_engine,
    serving,
)

from paceline.core.clock import VirtualClock
from paceline.core.errors import ConfigError, PacelineError, RequestError, UsageError
from paceline.plan.plan import Plan
from paceline.serve.engine import Engine, join
from paceline.serve.executor.base import StepResult
from paceline.serve.load import load_engine
from paceline.serve.schedule.base import Budget, Share, StepPlan
from paceline.serve.schedule.serial import serial

pytestmark = pytest.mark.cpu

MODEL = "random:llama:tiny"


@pytest.fixture(scope="module")
def alone():
    """An answer from an engine that has answered nothing else."""
    answer = real_engine().generate([ask(seed=7)])[0]
    assert len(answer.token_ids) == 20
    assert len(set(answer.token_ids)) > 5
    return answer


# A seeded answer is a function of its request.


def test_an_answer_is_the_same_in_a_new_engine_and_again(alone):
    engine = real_engine()
    assert engine.generate([ask(seed=7)]) == [alone]
    assert engine.generate([ask(seed=7)]) == [alone]
    assert engine.generate([ask(seed=8)]) != [alone]
    assert engine.generate([ask("ho", seed=7)]) != [alone]


def test_an_answer_is_the_same_after_and_among_others(alone):
    others = [ask("hello there", seed=7), ask(seed=8), ask("x" * 300, max_tokens=3), ask()]
    answers = real_engine().generate([*others, ask(seed=7), *others])
    assert answers[len(others)] == alone
    assert answers[: len(others)] == answers[len(others) + 1 :]
    assert len(set(answers)) == len(others) + 1


def test_an_answer_is_the_same_when_another_comes_in_between(alone):
    engine = real_engine()
    ours, other = Listener(), Listener()
    engine.submit(ask(seed=7), ours)
    while len(ours.deltas) < 9:
        engine.step()
    engine.submit(ask("hello", seed=3), other)
    engine.drain()
    assert join(ours.deltas) == alone
    assert join(other.deltas) == real_engine().generate([ask("hello", seed=3)])[0]


def alternating(view, budget, now_s):  # noqa: ARG001
    """Each request gets a share in turn: the one that has computed least, in small chunks."""
    requests = [*view.running, *view.waiting]
    if not requests:
        return StepPlan(())
    chosen = min(requests, key=lambda request: request.num_computed)
    num_tokens = min(chosen.num_left, budget.max_batch_tokens)
    return StepPlan((Share(chosen.id, num_tokens),))


def test_an_answer_is_the_same_under_a_policy_that_interleaves(alone):
    requests = [ask("hello", seed=3), ask(seed=7), ask(seed=8)]
    answers = real_engine(alternating, max_batch_tokens=2).generate(requests)
    assert answers[1] == alone
    assert answers == real_engine().generate(requests)


@pytest.mark.parametrize("max_batch_tokens", [1, 2, 7])
def test_an_answer_is_the_same_whatever_the_chunks(max_batch_tokens):
    """Sampled tokens are equal although chunked logits may differ in their last bit."""
    requests = [ask("a longer prompt, in chunks", seed=5), ask(seed=7)]
    answers = real_engine(max_batch_tokens=max_batch_tokens).generate(requests)
    assert answers == real_engine().generate(requests)


def test_work_is_in_chunks_of_the_budget():
    executor = Scripted()
    scripted_engine(executor, max_batch_tokens=4).generate([ask("0123456789", max_tokens=3)])
    steps = [(work.start, len(work.tokens)) for step in executor.steps for work in step]
    assert steps == [(0, 4), (4, 4), (8, 2), (10, 1), (11, 1)]
    is_sampled = [step[0].draw is not None for step in executor.steps]
    assert is_sampled == [False, False, True, True, True]
    assert executor.steps[0][0].tokens == encode("0123")
    assert executor.released == [0]


# What ends an answer.


def test_max_tokens():
    engine = real_engine()
    whole = engine.generate([ask(seed=7, max_tokens=20)])[0]
    for length in (1, 2, 19):
        part = engine.generate([ask(seed=7, max_tokens=length)])[0]
        assert part.token_ids == whole.token_ids[:length]
        assert part.finish_reason == "length"


def test_an_answer_may_fill_the_context():
    engine = real_engine()
    answer = engine.generate([ask("x" * 500, max_tokens=12, ignore_eos=True)])[0]
    assert len(answer.token_ids) == 12
    assert engine.generate([ask("x" * 511, max_tokens=1)])[0].finish_reason == "length"


def test_a_stop_string_cuts_the_text():
    engine = real_engine()
    whole = engine.generate([ask(seed=7, max_tokens=60)])[0]
    stop = re.findall(r"[!-~]{2}", whole.text)[1]
    cut = engine.generate([ask(seed=7, max_tokens=60, stop=(stop, "not in it"))])[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert stop in TOKENIZER.decode(cut.token_ids)
    assert stop not in TOKENIZER.decode(cut.token_ids[:-1])


@pytest.mark.parametrize(
    ("says", "options", "text", "num_tokens", "reason"),
    [
        ("hello STOP there", {"stop": ("STOP",)}, "hello ", 10, "stop"),
        ("hello STAY", {"stop": ("STOP",), "max_tokens": 8}, "hello ST", 8, "length"),
        ("hello STOP", {"stop": ("STOP",), "max_tokens": 10}, "hello ", 10, "stop"),
        ("hello<|im_end|>", {}, "hello", 6, "stop"),
        ("hello<|endoftext|>", {}, "hello", 6, "stop"),
        ("hello<|im_start|>you<|im_end|>", {}, "helloyou", 10, "stop"),
        ("hello ST<|im_end|>", {"stop": ("STOP",)}, "hello ST", 9, "stop"),
        ("hi<|im_end|>you", {"ignore_eos": True, "max_tokens": 6}, "hiyou", 6, "length"),
        ("<|im_end|>", {}, "", 1, "stop"),
        ("héé", {"max_tokens": 4}, "hé\ufffd", 4, "length"),
        ("h🦙", {"stop": ("🦙",)}, "h", 5, "stop"),
    ],
)
def test_ends_by_hand(says, options, text, num_tokens, reason):
    answer = scripted_engine(Scripted(says)).generate([ask(**options)])[0]
    assert answer.text == text
    assert answer.token_ids == encode(says)[:num_tokens]
    assert answer.finish_reason == reason


@pytest.mark.parametrize("end", [(), encode("<|im_end|>")], ids=["length", "stop"])
def test_half_a_character_at_the_end_comes_after_what_was_held_back(end):
    executor = Scripted()
    executor.ids = [*encode("hello ST🦙")[:-2], *end]
    engine = scripted_engine(executor)
    answer = engine.generate([ask(stop=("STOP",), max_tokens=len(executor.ids))])[0]
    assert answer.text == "hello ST\ufffd"
    assert answer.finish_reason == ("stop" if end else "length")
    stopped = engine.generate([ask(stop=("T\ufffd",), max_tokens=len(executor.ids))])[0]
    assert stopped.text == "hello S"
    assert stopped.finish_reason == "stop"


def test_end_of_text_tokens_of_a_real_model():
    engine = real_engine()
    ended, open_ended = (
        engine.generate(
            [ask(seed=seed, max_tokens=60, ignore_eos=ignore_eos) for seed in range(12)]
        )
        for ignore_eos in (False, True)
    )
    early = [answer for answer in ended if answer.finish_reason == "stop"]
    assert 0 < len(early) < len(ended)
    for answer in early:
        assert answer.token_ids[-1] in TOKENIZER.eos_ids
        assert not set(answer.token_ids[:-1]) & set(TOKENIZER.eos_ids)
        assert answer.text == TOKENIZER.decode(answer.token_ids)
    for short, long in zip(ended, open_ended, strict=True):
        assert long.finish_reason == "length"
        assert len(long.token_ids) == 60
        assert long.token_ids[: len(short.token_ids)] == short.token_ids


def test_streamed_parts_join_to_the_whole():
    engine = real_engine()
    for seed in range(5):
        listener = Listener()
        engine.submit(ask(seed=seed, max_tokens=50, stop=("e", "q")), listener)
        engine.drain()
        assert [delta.finish_reason for delta in listener.deltas[:-1]].count(None) == len(
            listener.deltas[:-1]
        )
        assert all(len(delta.token_ids) == 1 for delta in listener.deltas)
        whole = engine.generate([ask(seed=seed, max_tokens=50, stop=("e", "q"))])[0]
        assert join(listener.deltas) == whole
        assert whole.text == TOKENIZER.decode(whole.token_ids).split("e")[0].split("q")[0]


# Cancelling.


def test_cancelling_half_way():
    executor = Scripted()
    engine = scripted_engine(executor)
    ours, other = Listener(), Listener()
    number = engine.submit(ask(max_tokens=1000), ours)
    engine.submit(ask(max_tokens=5), other)
    for _ in range(10):
        engine.step()
    engine.cancel(number)
    engine.drain()
    assert ours.text == "a" * 10
    assert [delta.finish_reason for delta in ours.deltas] == [None] * 10 + ["abort"]
    assert join(other.deltas).text == "a" * 5
    assert executor.released == [0, 1]
    assert len(executor.steps) == 15


def test_cancelling_what_has_not_begun_or_has_ended():
    executor = Scripted()
    engine = scripted_engine(executor)
    first, second = Listener(), Listener()
    numbers = [engine.submit(ask(max_tokens=3), listener) for listener in (first, second)]
    engine.cancel(numbers[1])
    engine.drain()
    assert first.text == "aaa"
    assert [delta.finish_reason for delta in second.deltas] == ["abort"]
    engine.cancel(numbers[0])
    engine.cancel(12345)
    assert engine.generate([ask(max_tokens=2)])[0].text == "aa"
    assert len(first.deltas) == 3


def test_a_request_cancelled_by_its_own_listener():
    engine = scripted_engine(Scripted())
    deltas = []

    def listen(delta):
        deltas.append(delta)
        if len(deltas) == 4:
            engine.cancel(0)

    engine.submit(ask(max_tokens=1000), listen)
    engine.drain()
    assert [delta.finish_reason for delta in deltas] == [None] * 4 + ["abort"]


@pytest.mark.parametrize("fail_at", [1, 4, 20])
def test_a_receiver_that_fails_harms_nobody_else(alone, caplog, fail_at):
    engine = real_engine()
    seen, other = [], Listener()

    def fail(delta):
        seen.append(delta)
        if len(seen) == fail_at:
            raise OSError("nobody reads")

    engine.submit(ask(seed=8), fail)
    engine.submit(ask(seed=7), other)
    with caplog.at_level(logging.ERROR):
        engine.drain()
    assert join(other.deltas) == alone
    assert len(seen) == min(fail_at + 1, 20)  # it is cancelled, and told so
    assert "nobody reads" in caplog.text
    assert engine.is_healthy


# On its own thread.


def test_serving_from_several_callers(alone):
    engine = real_engine()
    requests = [ask(seed=7), ask("hello", seed=3), ask(seed=8), ask(seed=7)]
    with serving(engine) as errors:
        listeners = [Listener() for _ in requests]
        for request, listener in zip(requests, listeners, strict=True):
            engine.submit(request, listener)
        answers = [join(listener.wait_for_end()) for listener in listeners]
        assert engine.is_healthy
    assert errors == []
    assert answers[0] == answers[3] == alone
    assert answers == real_engine().generate(requests)


def test_cancelling_from_another_thread():
    executor = Scripted(step_s=0.002)
    engine = scripted_engine(executor)
    with serving(engine):
        listener, other = Listener(), Listener()
        number = engine.submit(ask(max_tokens=90_000), listener)
        listener.wait_for(lambda deltas: len(deltas) >= 3)
        engine.cancel(number)
        assert listener.wait_for_end()[-1].finish_reason == "abort"
        engine.submit(ask(max_tokens=3), other)
        assert join(other.wait_for_end()).text == "aaa"


def test_stopping_aborts_what_is_open():
    engine = scripted_engine(Scripted(step_s=0.002))
    listeners = [Listener(), Listener()]
    with serving(engine) as errors:
        for listener in listeners:
            engine.submit(ask(max_tokens=90_000), listener)
        listeners[0].wait_for(lambda deltas: len(deltas) >= 2)
        engine.stop()
        for listener in listeners:
            assert listener.wait_for_end()[-1].finish_reason == "abort"
    assert errors == []
    assert not engine.is_healthy
    with pytest.raises(PacelineError, match="the engine has stopped"):
        engine.submit(ask(), Listener())


def test_a_failing_executor_ends_every_request(caplog):
    executor = Scripted(step_s=0.01, fail_at=5)
    engine = scripted_engine(executor)
    listeners = [Listener(), Listener(), Listener()]
    with serving(engine) as errors, caplog.at_level(logging.ERROR):
        for listener in listeners:
            engine.submit(ask(max_tokens=1000), listener)
        for listener in listeners:
            assert listener.wait_for_end()[-1].finish_reason == "error"
        assert not engine.is_healthy
        with pytest.raises(PacelineError, match="the engine has stopped"):
            engine.submit(ask(), Listener())
    assert [str(error) for error in errors] == ["the device is on fire"]
    assert "the device is on fire" in caplog.text
    assert listeners[0].text == "aaaa"
    assert sorted(executor.released) == [0, 1, 2]


def test_a_failing_executor_raises_where_the_caller_drains():
    engine = scripted_engine(Scripted(fail_at=2))
    engine.submit(ask(), Listener())
    with pytest.raises(RuntimeError, match="on fire"):
        engine.drain()


def test_a_refused_request_harms_nobody(alone):
    engine = real_engine()
    listener = Listener()
    engine.submit(ask(seed=7), listener)
    engine.step()
    for bad in (ask("x" * 600), ask(max_tokens=0), ask(stop=("",))):
        with pytest.raises(RequestError):
            engine.submit(bad, Listener())
    engine.drain()
    assert join(listener.deltas) == alone


# Loading.


def test_a_plan_that_cannot_be_served():
    with pytest.raises(ConfigError) as caught:
        load_engine(MODEL, Plan().with_overrides(["serve.mesh.ep=2", 'serve.policy="seriall"']))
    paths = {problem.path: problem.hint for problem in caught.value.problems}
    assert paths["serve.policy"] == "did you mean serial?"
    assert "serve.mesh.ep" in paths


def test_a_device_that_is_none():
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        load_engine(MODEL, device="gpu")


def test_dtypes():
    for name in ("float32", "bfloat16"):
        engine = load_engine(MODEL, Plan().with_overrides([f'serve.dtype="{name}"']), device="cpu")
        assert str(engine._executor._store.blocks_L2MKSH.dtype) == f"torch.{name}"
        assert len(engine.generate([ask(max_tokens=3)])[0].token_ids) == 3


def test_times_are_the_clock_s():
    clock = VirtualClock(5.0)
    seen = []

    def watching(view, budget, now_s):
        seen.append((now_s, [request.arrival_s for request in [*view.running, *view.waiting]]))
        return serial(view, budget, now_s)

    class Slow(Scripted):
        def run(self, step) -> StepResult:
            clock.sleep(2.0)
            return super().run(step)

    engine = Engine(Slow(), watching, Budget(99, 1), SPEC, TOKENIZER, clock=clock)
    engine.generate([ask(max_tokens=2)])
    assert seen == [(5.0, [5.0]), (7.0, [5.0])]
