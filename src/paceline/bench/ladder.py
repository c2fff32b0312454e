"""How much of a link's latency a ladder residual hides, beside the plain model on the same link.

Two tensor ranks without sequence parallelism, where every sum over ranks takes some milliseconds
longer than it does (`paceline.dist.testing.SlowWorld`). Both models have SmolLM2's widths and the
same weights. A round takes each of the two with and without the latency, in turns.

Of a pass's sums some have nothing to hide behind: those of the embedding, the loss and the head, of
the ladder's last output and of the gradient of its first input. The others are what it can
overlap; hidden is the share of their latency that does not show, in two ways: in the time of a pass

    hidden = (latency x sums - (time with - time without)) / (latency x sums that can overlap)

and, which other work on the machine does not disturb, in the time that the first rank has been held
up by latencies, in place of the difference.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed

from paceline.bench.outcome import MIN_PAIRS, Outcome, Ratio, ratio
from paceline.data.batch import Batch
from paceline.dist.testing import SlowWorld, run_ranks
from paceline.kernels.device import keep_freed_memory
from paceline.models import hub
from paceline.models.weights import RandomWeights
from paceline.parallel.apply import ParallelModel, apply
from paceline.plan.check import require
from paceline.plan.mesh import MeshConfig
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan, TensorConfig, TrainConfig
from paceline.train.objective.next_token import next_token

NUM_RANKS = 2
LATENCY_S = 5e-3
NUM_SEQUENCES, LENGTH = 4, 128
NUM_LAYERS = 4
PASSES = ("forward", "forward and backward")
_NUM_WORDS = 1024  # few: the head has no part in it
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Overlap:
    """What one kind of pass takes, medians over rounds.

    Attributes:
        plain_s: of the plain model.
        plain_slow_s: with the latency.
        ladder_s: of the ladder.
        ladder_slow_s: with the latency.
        hidden: share of the latency of the sums that can overlap, by the time of passes; 1 is all,
            and more where sums with nothing to hide behind run beside another.
        hidden_waits: the same, by the time that the first rank was held up.
        plain_hidden_waits: the same, of the plain model, which hides nothing.
        faster: the ladder's rate over the plain model's, both with the latency.
        num_sums: of a pass of the ladder.
        num_overlapped: of those, the sums that can overlap.
    """

    plain_s: float
    plain_slow_s: float
    ladder_s: float
    ladder_slow_s: float
    hidden: Ratio
    hidden_waits: Ratio
    plain_hidden_waits: Ratio
    faster: Ratio
    num_sums: int
    num_overlapped: int


class _Times(NamedTuple):
    """Seconds of one model's passes, round by round: without the latency, with it, and held up."""

    plain: list[float]
    slow: list[float]
    waited: list[float]
    num_sums: int


def run(
    *, model: str = "random:llama:135m", layers: int = NUM_LAYERS, pairs: int = MIN_PAIRS
) -> dict[str, Outcome]:
    """Tokens per second of the ladder and of the plain model on a slow link, by kind of pass.

    Args:
        model: whose sizes are taken, but for its vocabulary; weights are random.
        layers: blocks of it that are there.
        pairs: of passes.
    """
    spec = hub.read_model_spec(model)
    spec = replace(spec, num_layers=min(layers, spec.num_layers))
    found = measure(spec, rounds=pairs)
    return {kind: _outcome(kind, overlap, model, spec) for kind, overlap in found.items()}


def measure(
    spec: ModelSpec, *, rounds: int = MIN_PAIRS, latency_s: float = LATENCY_S
) -> dict[str, Overlap]:
    """What passes take, by kind.

    Args:
        spec: of the plain model; the ladder is the whole of it.
        rounds: that are counted; one before is thrown away.
        latency_s: of every sum.
    """
    spec = replace(spec, vocab_size=_NUM_WORDS, ladder_from=None)
    plan = _plan()
    for one in (spec, replace(spec, ladder_from=0)):
        require(plan, one, num_ranks=NUM_RANKS, source="the plan of bench ladder")
    work = partial(_work, spec, plan, rounds, latency_s)
    found: dict[str, tuple[_Times, _Times]]
    found = run_ranks(work, NUM_RANKS, timeout_s=_TIMEOUT_S, mesh=plan.mesh)[0]
    overlaps: dict[str, Overlap] = {}
    for kind, (plain, ladder) in found.items():
        has_backward = kind == PASSES[1]
        overlaps[kind] = _overlap(
            plain, ladder, latency_s, spec.num_layers, has_backward=has_backward
        )
    return overlaps


def _outcome(kind: str, overlap: Overlap, model: str, spec: ModelSpec) -> Outcome:
    tokens = NUM_SEQUENCES * LENGTH
    ours, limit = tokens / overlap.ladder_slow_s, tokens / overlap.ladder_s
    return Outcome(
        name=f"ladder residual, {kind}, tp {NUM_RANKS}, {model} of {spec.num_layers} layers, "
        f"{LATENCY_S * 1e3:.0f} ms added to each sum",
        unit="tokens/s",
        ours=ours,
        peer=tokens / overlap.plain_slow_s,
        against="the plain model on the same link",
        limit=limit,
        limited_by=f"without the latency; {overlap.hidden.median:.0%} of what can overlap is "
        f"hidden by the clock, {overlap.hidden_waits.median:.0%} by what ranks wait for",
        fraction=ours / limit,
        ratios=overlap.faster,
        device=f"{platform.machine()} CPU, {NUM_RANKS} gloo ranks of one thread",
    )


def _plan() -> Plan:
    return Plan(
        mesh=MeshConfig(tp=NUM_RANKS),
        tensor=TensorConfig(sequence_parallel=False),
        train=TrainConfig(sequence_length=LENGTH, tokens_per_step=LENGTH * NUM_SEQUENCES),
    )


def _overlap(
    plain: _Times, ladder: _Times, latency_s: float, num_layers: int, *, has_backward: bool
) -> Overlap:
    num_overlapped = (2 * num_layers - 1) * (2 if has_backward else 1)

    def hidden(times: _Times, shown_s: list[float]) -> Ratio:
        whole_s = latency_s * times.num_sums
        shares = [(whole_s - one_s) / (latency_s * num_overlapped) for one_s in shown_s]
        return Ratio(statistics.median(shares), min(shares), max(shares), len(shares))

    longer_s = [slow - fast for fast, slow in zip(ladder.plain, ladder.slow, strict=True)]
    return Overlap(
        plain_s=statistics.median(plain.plain),
        plain_slow_s=statistics.median(plain.slow),
        ladder_s=statistics.median(ladder.plain),
        ladder_slow_s=statistics.median(ladder.slow),
        hidden=hidden(ladder, longer_s),
        hidden_waits=hidden(ladder, ladder.waited),
        plain_hidden_waits=hidden(plain, plain.waited),
        faster=ratio([1 / s for s in ladder.slow], [1 / s for s in plain.slow]),
        num_sums=ladder.num_sums,
        num_overlapped=num_overlapped,
    )


def _work(
    spec: ModelSpec, plan: Plan, rounds: int, latency_s: float, rank: int
) -> dict[str, tuple[_Times, _Times]]:
    """One rank's part: times of the plain model and of the ladder, by kind of pass."""
    keep_freed_memory()
    sides = [_Side(one, plan, rank) for one in (spec, replace(spec, ladder_from=0))]
    found: dict[str, tuple[_Times, _Times]] = {}
    for kind in PASSES:
        times = [_Times([], [], [], side.count_sums(kind)) for side in sides]
        for round_number in range(rounds + 1):
            for side, of_side in zip(sides, times, strict=True):
                (fast_s, _), (slow_s, waited_s) = (side.seconds(kind, s) for s in (0.0, latency_s))
                if round_number:
                    of_side.plain.append(fast_s)
                    of_side.slow.append(slow_s)
                    of_side.waited.append(waited_s)
        found[kind] = (times[0], times[1])
    return found


class _Side:
    """One of the two models on this rank.

    Args:
        spec: its sizes.
        plan: how it is laid out.
        rank: this process's.
    """

    def __init__(self, spec: ModelSpec, plan: Plan, rank: int) -> None:
        self._world = SlowWorld(plan.mesh, rank, torch.device("cpu"))
        self._model: ParallelModel = apply(spec, RandomWeights(spec), plan, self._world)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(spec.vocab_size, (NUM_SEQUENCES, LENGTH + 1), generator=generator)
        documents_BT = torch.zeros(NUM_SEQUENCES, LENGTH, dtype=torch.long)
        self._batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), documents_BT)

    def count_sums(self, kind: str) -> int:
        """Sums over ranks of one pass."""
        before = self._world.num_sums
        self._passes()[kind]()
        return self._world.num_sums - before

    def seconds(self, kind: str, latency_s: float) -> tuple[float, float]:
        """Of one pass that ranks begin together, until the last has done it; and held up here."""
        run_pass = self._passes()[kind]
        self._world.latency_s, self._world.waited_s = latency_s, 0.0
        torch.distributed.barrier()
        start_s = time.perf_counter()
        run_pass()
        torch.distributed.barrier()
        return time.perf_counter() - start_s, self._world.waited_s

    def _passes(self) -> dict[str, Callable[[], None]]:
        return dict(zip(PASSES, (self._forward, self._forward_and_backward), strict=True))

    @torch.no_grad()
    def _forward(self) -> None:
        self._model.passes.evaluate([self._batch], next_token)

    def _forward_and_backward(self) -> None:
        self._model.passes.train([self._batch], next_token, lambda loss: loss)
        for parameter in self._model.parameters():
            parameter.grad = None
