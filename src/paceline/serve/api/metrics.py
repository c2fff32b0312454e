"""What Prometheus reads: the tally under our names and under vLLM's, which dashboards know."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from paceline.serve.api.door import Door
from paceline.serve.engine import Engine
from paceline.serve.tally import Histogram, Tally

PREFIXES = ("paceline_", "vllm:")


def metrics(engine: Engine, door: Door, tally: Tally, model_name: str) -> APIRouter:
    """The route that Prometheus reads.

    Args:
        engine: that is counted.
        door: that refuses.
        tally: of the engine.
        model_name: what clients call the model.
    """
    router = APIRouter()
    registry = CollectorRegistry()
    registry.register(TallyCollector(engine, door, tally, model_name))
    ProcessCollector(registry=registry)

    @router.get("/metrics")
    def read() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router


class TallyCollector(Collector):
    """Puts a tally into Prometheus's words, whenever it is asked.

    Args:
        engine: that is counted.
        door: that refuses.
        tally: of the engine.
        model_name: the label of every metric.
    """

    def __init__(self, engine: Engine, door: Door, tally: Tally, model_name: str) -> None:
        self._engine, self._door, self._tally, self._model_name = engine, door, tally, model_name

    def collect(self) -> Iterator[Metric]:
        for prefix in PREFIXES:
            yield from self._gauges(prefix)
            yield from self._counters(prefix)
            for name, text, histogram in self._histograms():
                yield self._histogram(prefix + name, text, histogram)

    def _gauges(self, prefix: str) -> Iterator[Metric]:
        step = self._tally.step
        usage = step.kv_usage if step is not None else 0.0
        for name, text, value in (
            ("num_requests_running", "Requests that hold blocks.", len(self._engine.book.running)),
            ("num_requests_waiting", "Requests that wait.", len(self._engine.waiting())),
            ("kv_cache_usage_perc", "Share of the blocks that are held, from 0 to 1.", usage),
        ):
            family = GaugeMetricFamily(prefix + name, text, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family

    def _counters(self, prefix: str) -> Iterator[Metric]:
        tally, step = self._tally, self._tally.step
        for name, text, value in (
            ("num_preemptions", "Requests that lost blocks.", step and step.num_preempted),
            ("prefix_cache_queries", "Tokens looked for.", step and step.num_prompt_tokens),
            ("prefix_cache_hits", "Tokens found.", step and step.num_found_tokens),
            ("prompt_tokens", "Tokens of prompts.", tally.prompt_tokens),
            ("generation_tokens", "Tokens of answers.", tally.generation_tokens),
            ("engine_steps", "Steps that computed something.", tally.num_steps),
            ("estimated_flops_per_gpu", "FLOPs of the steps.", tally.flops),
            ("estimated_read_bytes_per_gpu", "Bytes that they read.", tally.read_bytes),
        ):
            yield self._counter(prefix + name, text, {(): float(value or 0)})
        finished = {(reason,): float(count) for reason, count in dict(tally.finished).items()}
        text = "Requests that ended, by reason."
        yield self._counter(prefix + "request_success", text, finished, "finished_reason")
        refused = {(reason,): float(count) for reason, count in self._door.refused.items()}
        text = "Requests that were not taken, by reason."
        yield self._counter(prefix + "admission_rejections", text, refused, "reason")

    def _counter(
        self, name: str, text: str, values: dict[tuple[str, ...], float], *labels: str
    ) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name", *labels])
        for of, value in values.items():
            family.add_metric([self._model_name, *of], value)
        return family

    def _histograms(self) -> Iterator[tuple[str, str, Histogram]]:
        tally = self._tally
        yield "iteration_tokens_total", "Tokens of a step.", tally.step_tokens
        yield "time_to_first_token_seconds", "From arrival.", tally.to_first_token
        yield "inter_token_latency_seconds", "Between tokens.", tally.between_tokens
        yield (
            "request_time_per_output_token_seconds",
            "Mean of a request, after its first.",
            tally.per_output_token,
        )
        yield "e2e_request_latency_seconds", "From arrival to end.", tally.whole
        yield "request_queue_time_seconds", "From arrival to admission.", tally.queued
        yield "request_prefill_time_seconds", "From there to the first token.", tally.prefill
        yield "request_decode_time_seconds", "From there to the last.", tally.decode

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(name, text, labels=["model_name"])
        counts, so_far, buckets = list(histogram.counts), 0, []
        for bound, count in zip((*histogram.bounds, float("inf")), counts, strict=True):
            so_far += count
            buckets.append((f"{bound:g}" if bound != float("inf") else "+Inf", float(so_far)))
        family.add_metric([self._model_name], buckets, sum_value=histogram.total)
        return family
