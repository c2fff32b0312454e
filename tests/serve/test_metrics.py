"""What is counted: the tally of an engine, and the text that Prometheus reads."""

from __future__ import annotations

import httpx
import pytest
from engines import SPEC, TOKENIZER, Listener, Scripted, ask, real_engine
from prometheus_client.parser import text_string_to_metric_families
from servers import NAME, live, metric

from paceline.core.clock import VirtualClock
from paceline.plan.model_spec import DTYPE_BYTES
from paceline.serve.engine import Engine
from paceline.serve.schedule.base import Budget
from paceline.serve.schedule.serial import serial
from paceline.serve.tally import Tally

pytestmark = pytest.mark.cpu


def tallied(executor, clock):
    engine = Engine(executor, serial, Budget(2048, 1), SPEC, TOKENIZER, clock=clock)
    tally = Tally(SPEC, "float32", clock)
    engine.observe(tally)
    return engine, tally


class Ticking(Scripted):
    """Each step takes a second."""

    def __init__(self, clock, text=""):
        super().__init__(text)
        self.clock = clock

    def run(self, step):
        self.clock.sleep(1.0)
        return super().run(step)


def test_times_of_a_request_are_its_own():
    clock = VirtualClock(100.0)
    engine, tally = tallied(Ticking(clock), clock)
    engine.generate([ask("hello", max_tokens=4), ask("you", max_tokens=1)])
    assert tally.prompt_tokens == 8
    assert tally.generation_tokens == 5
    assert tally.finished == {"length": 2}
    assert tally.to_first_token.total == 1 + 5  # the second waits for the first's four steps
    assert tally.queued.total == 4
    assert tally.prefill.total == 2
    assert tally.decode.total == 3
    assert tally.whole.total == 4 + 5
    assert tally.between_tokens.total == 3
    assert sum(tally.between_tokens.counts) == 3
    assert tally.per_output_token.total == 1
    assert sum(tally.per_output_token.counts) == 1


def test_work_of_steps_is_what_they_compute():
    clock = VirtualClock()
    engine, tally = tallied(Ticking(clock), clock)
    engine.generate([ask("hello", max_tokens=3)])
    assert tally.num_steps == 3
    assert tally.step_tokens.total == 5 + 1 + 1
    weights = SPEC.num_parameters * DTYPE_BYTES["float32"]
    cached = SPEC.kv_bytes_per_token("float32") * (5 + 6 + 7)
    assert tally.read_bytes == 3 * weights + cached
    scores = 4 * SPEC.d_query * SPEC.num_layers * (5 * 6 // 2 + 6 + 7)
    assert tally.flops == pytest.approx(7 * SPEC.forward_flops_per_token(0) + scores)


def test_reasons_are_what_clients_are_told():
    """A stop string is found outside the engine, which only learns that it is to go on no more."""
    clock = VirtualClock()
    engine, tally = tallied(Ticking(clock, "what an end this is"), clock)
    engine.generate([ask("hello", max_tokens=100, stop=("end",))])
    assert tally.finished == {"stop": 1}
    assert tally.generation_tokens == len("what an end")
    assert tally._paces == {}


def test_a_request_that_is_cancelled_is_counted_and_forgotten():
    clock = VirtualClock()
    engine, tally = tallied(Ticking(clock), clock)
    number = engine.submit(ask(max_tokens=100), Listener())
    engine.step()
    engine.cancel(number)
    engine.step()
    assert tally.finished == {"abort": 1}
    assert tally._paces == {}
    assert tally.step.num_running == 0
    assert tally.step.kv_usage == 0


def test_an_engine_counts_the_same_whether_it_is_observed_or_not():
    answers = [ask("hello", max_tokens=8, seed=3)]
    watched = real_engine()
    watched.observe(Tally(watched.spec, "float32"))
    assert watched.generate(answers) == real_engine().generate(answers)


VLLM_NAMES = """
num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries
prefix_cache_hits num_preemptions prompt_tokens generation_tokens request_success
admission_rejections iteration_tokens_total time_to_first_token_seconds
inter_token_latency_seconds request_time_per_output_token_seconds e2e_request_latency_seconds
request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds
estimated_flops_per_gpu estimated_read_bytes_per_gpu
"""


def test_every_name_stands_under_both_prefixes_with_one_value():
    with live(real_engine()) as server:
        body = {"model": NAME, "prompt": "hello there, you", "max_tokens": 6, "temperature": 0}
        for _ in range(2):
            assert httpx.post(f"{server.address}/v1/completions", json=body).status_code == 200
        answer = httpx.get(f"{server.address}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    for name in VLLM_NAMES.split():
        ours, theirs = families[f"paceline_{name}"], families[f"vllm:{name}"]
        assert ours.type == theirs.type
        assert [(one.labels, one.value) for one in ours.samples] == [
            (one.labels, one.value) for one in theirs.samples
        ]
        assert all(one.labels["model_name"] == NAME for one in ours.samples)
    assert metric(answer.text, "vllm:generation_tokens_total") == 12
    assert metric(answer.text, "vllm:prompt_tokens_total") == 32
    assert metric(answer.text, "vllm:prefix_cache_queries_total") == 32
    assert metric(answer.text, "vllm:request_success_total", finished_reason="length") == 2
    assert metric(answer.text, "vllm:time_to_first_token_seconds_count") == 2
    assert metric(answer.text, "vllm:inter_token_latency_seconds_count") == 10
    assert metric(answer.text, "vllm:time_to_first_token_seconds_bucket", le="+Inf") == 2
    assert metric(answer.text, "vllm:num_requests_running") == 0
    assert metric(answer.text, "vllm:estimated_flops_per_gpu_total") > 0
    assert "process_resident_memory_bytes" in families
