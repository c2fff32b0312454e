"""Serving policies beside those that they replace: one engine, one recording, policies swapped.

Requests come at 80% of the rate that the engine was measured to sustain in the same run, on the
machine's clock, with a model of random weights. What a job's prefixes save is counted in tokens.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from paceline.bench.arrivals import Arrival, Replayed, prompt_ids, read_recording, replay
from paceline.bench.outcome import MIN_PAIRS, Outcome, Ratio, interleave, outcome, ratio
from paceline.decode.sampler import SamplingParams
from paceline.kernels.device import choose_device, describe
from paceline.models.hub import ModelSource, resolve
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan
from paceline.serve.engine import Engine
from paceline.serve.load import BLOCK_SIZE, load_engine
from paceline.serve.request import Request

LOAD = 0.8
CHUNK, SEATS = 128, 16
NUM_DOCUMENTS, NUM_QUESTIONS = 8, 8
DOCUMENT, QUESTION, JOB_ANSWER = 128, 16, 8
"""Tokens of a job's documents, of the questions to each, and of the answers."""


def run(*, model: str = "random:llama:135m", layers: int = 2) -> dict[str, Outcome]:
    """Gaps between tokens, throughput, and tokens that a job computes.

    Args:
        model: whose sizes are taken; weights are random.
        layers: blocks of it that are there.
    """
    source = resolve(model)
    source = replace(source, spec=replace(source.spec, num_layers=layers))
    recorded = read_recording()
    return measure(source, recorded["mixed"], recorded["poisson"], MIN_PAIRS)


def measure(
    source: ModelSource, mixed: Sequence[Arrival], poisson: Sequence[Arrival], pairs: int
) -> dict[str, Outcome]:
    """The claims of policies.

    Args:
        source: of the model.
        mixed: long prompts among short ones.
        poisson: long answers among short ones.
        pairs: of replays.
    """
    gaps, rates = _stalls(source, mixed, pairs)
    return {
        "stall-free, gaps": gaps,
        "stall-free, throughput": rates,
        "temporal-fusion": _fusion(source, poisson, pairs),
        **_job(source, pairs),
    }


def _stalls(
    source: ModelSource, arrivals: Sequence[Arrival], pairs: int
) -> tuple[Outcome, Outcome]:
    """Stall-free beside prefill-first: the longest gaps between tokens, and throughput."""
    ours, peer = (_engine(source, policy) for policy in ("stall-free", "prefill-first"))
    rate = LOAD * _capacity(ours, arrivals)
    found: list[list[Replayed]] = [[], []]
    for pair in range(pairs):
        for replays, engine in zip(found, (ours, peer), strict=True):
            replays.append(replay(engine, arrivals, rate, f"pair {pair}"))
    gaps = [[one.gap_s(0.99) for one in side] for side in found]
    rates = [[one.rate for one in side] for side in found]
    shortest_s = min(min(one.gaps_s) for side in found for one in side)
    load = f"{len(arrivals)} requests at {rate:.2f}/s, chunks of {CHUNK}, {_words(source.spec)}"
    longest = Outcome(
        name=f"P99 time between tokens, stall-free, {load}",
        unit="s",
        ours=statistics.median(gaps[0]),
        peer=statistics.median(gaps[1]),
        against="prefill-first",
        limit=shortest_s,
        limited_by="the shortest time between two tokens",
        fraction=shortest_s / statistics.median(gaps[0]),
        ratios=ratio(gaps[1], gaps[0]),
        device=_device(),
    )
    limit = rate * _mean_answer(arrivals)
    words = "the rate at which tokens are asked for"
    throughput = outcome(
        f"output tokens, stall-free, {load}",
        *rates,
        against="prefill-first",
        limit=limit,
        limited_by=words,
    )
    return longest, throughput


def _fusion(source: ModelSource, arrivals: Sequence[Arrival], pairs: int) -> Outcome:
    """Throughput of temporal fusion beside static batches."""
    ours, peer = (_engine(source, policy) for policy in ("temporal-fusion", "static"))
    rate = LOAD * _capacity(ours, arrivals)
    sides = [
        [replay(engine, arrivals, rate, f"pair {pair}").rate for engine in (ours, peer)]
        for pair in range(pairs)
    ]
    return outcome(
        f"output tokens, temporal-fusion, {len(arrivals)} requests at {rate:.2f}/s, {SEATS} "
        f"seats, {_words(source.spec)}",
        [side[0] for side in sides],
        [side[1] for side in sides],
        against="static",
        limit=rate * _mean_answer(arrivals),
        limited_by="the rate at which tokens are asked for",
    )


def _job(source: ModelSource, pairs: int) -> dict[str, Outcome]:
    """A job with few blocks: tokens of prompts that are computed, and the job's rate."""
    job = _requests(source.spec.vocab_size)
    num_blocks = 3 * (DOCUMENT // BLOCK_SIZE)  # of the documents' own, there are eight
    computed: dict[str, int] = {}

    def side(policy: str) -> float:
        engine = _engine(source, policy, num_blocks=num_blocks)
        rate = _replay_job(engine, job)
        computed[policy] = engine.book.num_prompt_tokens - engine.book.num_found_tokens
        return rate

    rates = interleave(partial(side, "global-prefix"), partial(side, "stall-free"), pairs)
    fewest = NUM_DOCUMENTS * (DOCUMENT + NUM_QUESTIONS * QUESTION)
    ours, peer = computed["global-prefix"], computed["stall-free"]
    name = (
        f"global-prefix, {len(job)} questions to {NUM_DOCUMENTS} documents, {num_blocks} blocks, "
        f"{_words(source.spec)}"
    )
    tokens = Outcome(
        name=f"tokens of prompts computed, {name}",
        unit="tokens",
        ours=ours,
        peer=peer,
        against="stall-free with the online prefix cache",
        limit=fewest,
        limited_by="every token of the tree of prefixes computed once",
        fraction=fewest / ours,
        ratios=Ratio(*[peer / ours] * 3, pairs=1),
        device="counted tokens",
    )
    rate = outcome(
        f"prompt tokens of the job, {name}",
        *rates,
        against="stall-free with the online prefix cache",
        limit=statistics.median(rates[0]) * ours / fewest,
        limited_by="the same speed with every token of the tree computed once",
    )
    return {"global-prefix, tokens": tokens, "global-prefix, throughput": rate}


def _replay_job(engine: Engine, job: Sequence[Request]) -> float:
    """Tokens of a job's prompts a second."""
    start_s = time.perf_counter()
    engine.generate(job)
    return sum(len(request.prompt_ids) for request in job) / (time.perf_counter() - start_s)


def _requests(vocab_size: int) -> list[Request]:
    """The first question to each document, then the second to each, and so on."""
    return [
        Request(
            prompt_ids=prompt_ids(document, DOCUMENT, vocab_size)
            + prompt_ids(1000 + document + NUM_DOCUMENTS * question, QUESTION, vocab_size),
            sampling=SamplingParams(temperature=0.0),
            max_tokens=JOB_ANSWER,
            ignore_eos=True,
        )
        for question in range(NUM_QUESTIONS)
        for document in range(NUM_DOCUMENTS)
    ]


def _engine(source: ModelSource, policy: str, num_blocks: int | None = None) -> Engine:
    """A new engine in float32 under a policy."""
    spec = source.spec
    settings = [
        f'serve.policy="{policy}"',
        'serve.dtype="float32"',
        f"serve.max_batch_tokens={CHUNK}",
        f"serve.max_sequences={SEATS}",
    ]
    if num_blocks is not None:
        width = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
        settings.append(f"serve.kv_memory_bytes={num_blocks * width * 4 * BLOCK_SIZE}")
    return load_engine(source, Plan().with_overrides(settings), device="cpu")


def _capacity(engine: Engine, arrivals: Sequence[Arrival]) -> float:
    """Requests a second that an engine sustains while more of them wait; the second of two."""
    replay(engine, arrivals, math.inf, "warm-up")
    found = replay(engine, arrivals, math.inf, "capacity")
    return found.steady_rate / _mean_answer(arrivals)


def _mean_answer(arrivals: Sequence[Arrival]) -> float:
    return sum(arrival.num_answer for arrival in arrivals) / len(arrivals)


def _words(spec: ModelSpec) -> str:
    return f"{spec.num_parameters / 1e6:.0f} M parameters, float32"


def _device() -> str:
    return describe(choose_device("cpu"))
