"""Proof: of faults over four ranks the verdict names the culprit; clean windows raise no alarm.

Crashes and stops take a start of four ranks each, and are judged by a `Watcher` as in a run. Many
sleeps, slow links and clean windows come to a start: each is a few steps, whose calls are judged.
Every trial leaves a record; started again, the proof goes on where it was.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed

from paceline.bench.ranks import SharedWeights, our_step, random_batches
from paceline.core import rng
from paceline.core.errors import RankError
from paceline.core.record import Record, RecordWriter, read_records
from paceline.dist.calls import RankTrace
from paceline.dist.failure import is_peer_gone
from paceline.dist.ring import Ring, ring_path
from paceline.dist.testing import run_ranks
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import ContextConfig, Plan, ZeroConfig
from paceline.resilience.delays import delays
from paceline.resilience.inject import Fault, FaultyWorld
from paceline.resilience.verdict import Verdict, judge, timeouts_of
from paceline.resilience.watch import Rings, Watcher, pids
from paceline.verify.tiny import tiny_spec

Kind = Literal["crash", "stop", "sleep", "slow", "clean"]

NUM_RANKS = 4
NUM_TRIALS: dict[Kind, int] = {"crash": 50, "stop": 50, "sleep": 50, "slow": 50, "clean": 500}
NUM_STEPS = 8
"""Of a window."""
PER_START: dict[Kind, int] = {"crash": 1, "stop": 1, "sleep": 10, "slow": 10, "clean": 25}
PATIENCE = 20.0
LEAST_DELAY_S = 2e-3
"""What a transfer is taken to need at least, before it is slowed tenfold. Where four ranks share
two cores it often takes a slice of the scheduler; a delay within that is no fault to be found."""
PLANS = {
    "dp 4": Plan(mesh=MeshConfig(dp_replicate=4)),
    "pp 4": Plan(mesh=MeshConfig(pp=4), zero=ZeroConfig(stage=0)),
    "pp 2 dp 2": Plan(mesh=MeshConfig(pp=2, dp_shard=2), zero=ZeroConfig(stage=1)),
    "zero 1": Plan(mesh=MeshConfig(dp_shard=4), zero=ZeroConfig(stage=1)),
    "cp 4": Plan(mesh=MeshConfig(cp=4), context=ContextConfig(method="ring")),
    "ep 2": Plan(mesh=MeshConfig(dp_shard=4, ep=2), zero=ZeroConfig(stage=1)),
    "tp 2 dp 2": Plan(mesh=MeshConfig(tp=2, dp_shard=2), zero=ZeroConfig(stage=1)),
    "ulysses 4": Plan(mesh=MeshConfig(cp=4), context=ContextConfig(method="ulysses")),
    "zero 3": Plan(mesh=MeshConfig(dp_shard=4)),
}
WITH_WAYS = ("pp 4", "pp 2 dp 2", "cp 4", "pp 4", "ulysses 4")
"""Layouts in which ranks send each other something; one for each start with slow links."""
_OFTEN = ("dp 4", "pp 4", "pp 2 dp 2", "zero 1")
CLEAN = (*PLANS, *_OFTEN, *_OFTEN, "ep 2", "dp 4", "pp 4")
"""Layouts of starts with clean windows; those whose steps are short come more often."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultRecord(Record):
    """One trial.

    Attributes:
        fault: its kind.
        number: from 1, of its kind.
        layout: of the ranks.
        what: was done, in words.
        culprit: the rank, or of a link both; none of a clean window.
        named: in the verdict.
        verdict: its kind; empty where there is none.
        evidence: that it gives.
        is_right: whether those are named that were at fault.
        after_s: from the fault to the verdict, where a watcher has found it.
        step_s: median step, of the window or before the fault.
    """

    kind: ClassVar[str] = "fault"
    fault: Kind
    number: int
    layout: str
    what: str
    culprit: tuple[int, ...]
    named: tuple[int, ...]
    verdict: str
    evidence: str
    is_right: bool
    after_s: float = 0.0
    step_s: float = 0.0


def prove(path: Path, trials: dict[Kind, int] | None = None) -> list[dict[str, Any]]:
    """Runs the trials that have no record yet, and returns all records.

    Args:
        path: of the records.
        trials: how many of each kind; by default `NUM_TRIALS`.
    """
    trials = trials or NUM_TRIALS
    writer = RecordWriter(path)
    for kind, wanted in trials.items():
        done = sum(record["fault"] == kind for record in read_records(path))
        while done < wanted:
            count = min(PER_START[kind], wanted - done)
            run = _ended_by_fault if kind in ("crash", "stop") else _windows
            for record in run(kind, done + 1, count):
                writer.write(record)
                print(_line(record), file=sys.stderr, flush=True)
            done += count
    writer.close()
    return list(read_records(path))


def summary(records: list[dict[str, Any]]) -> str:
    """How many of each kind were right, in words."""
    kinds = [kind for kind in NUM_TRIALS if any(r["fault"] == kind for r in records)]
    told = {kind: [r["is_right"] for r in records if r["fault"] == kind] for kind in kinds}
    named = [f"{kind} {sum(of)} of {len(of)}" for kind, of in told.items() if kind != "clean"]
    clean = told.get("clean", [])
    alarms = f"{len(clean) - sum(clean)} alarms in {len(clean)} clean windows"
    return f"culprits named: {', '.join(named)}; {alarms}"


def _line(record: FaultRecord) -> str:
    word = "right" if record.is_right else "WRONG"
    found = f"{record.verdict} {record.named}" if record.verdict else "nothing"
    return f"{record.fault} {record.number} ({record.layout}): {record.what}: {found}: {word}"


def _draw(kind: Kind, number: int, count: int) -> list[float]:
    """The chances of a trial: the same whenever it is run, and on every rank."""
    return rng.uniform(count, seed=0, purpose=f"fault {kind}", position=number).tolist()


# Ranks that end or stop: a start each, and a watcher.

_FAST = ("dp 4", "pp 4", "pp 2 dp 2", "zero 1", "ep 2")
_BEFORE_STEPS = 5
_LIMIT_S = 60.0


def _ended_by_fault(kind: Kind, number: int, _count: int) -> Iterator[FaultRecord]:
    layout = _FAST[number % len(_FAST)]
    plan = PLANS[layout]
    rank, step, place, inside = _draw(kind, number, 4)
    fault = Fault(
        kind="crash" if kind == "crash" else "stop",
        rank=int(rank * NUM_RANKS),
        step=_BEFORE_STEPS + int(3 * step),
        place=place,
        is_inside=inside < 0.5,
    )
    with tempfile.TemporaryDirectory(prefix="paceline-faults-") as folder:
        verdict, after_s = _watched(Path(folder), plan, fault)
    where = "inside" if fault.is_inside else "before"
    yield FaultRecord(
        fault=kind,
        number=number,
        layout=layout,
        what=f"rank {fault.rank}, {where} a call at {place:.0%} of step {fault.step + 1}",
        **_outcome((fault.rank,), verdict),
        after_s=after_s,
    )


def _watched(run: Path, plan: Plan, fault: Fault) -> tuple[Verdict | None, float]:
    """The first verdict of a watcher, and how long after the fault it came."""
    found: list[tuple[Verdict, float]] = []
    told = threading.Event()

    def tell(verdict: Verdict) -> None:
        found.append((verdict, time.time()))
        for pid in pids(run).values():  # who is stopped is not ended by an exception of its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        told.set()

    spec = tiny_spec(plan)
    weights = SharedWeights(spec)

    def work(rank: int) -> None:
        ring = Ring(ring_path(run, rank), plan.mesh, rank)
        try:
            world, step = _faulty_step(plan, spec, weights, rank, ring)
            world.faults = (fault,)
            for number in range(1, 1000):
                step()
                world.finish_step(number)
        except Exception as error:
            ring.close("lost" if is_peer_gone(error) else "failed")
            raise

    watcher = Watcher(run, plan.mesh, PATIENCE, tell)
    watcher.start()
    with contextlib.suppress(RankError):  # which says what a fault always does: a rank has died
        run_ranks(work, NUM_RANKS, mesh=plan.mesh, timeout_s=_LIMIT_S, grace_s=2.0)
    told.wait(2.0)
    watcher.stop()
    if not found:
        return None, 0.0
    traces = Rings(run).read(range(NUM_RANKS), is_whole=True)
    culprit = next(trace for trace in traces if trace.rank == fault.rank)
    return found[0][0], found[0][1] - culprit.heartbeat_s


def _faulty_step(
    plan: Plan, spec: Any, weights: SharedWeights, rank: int, ring: Ring
) -> tuple[FaultyWorld, Callable[[], float]]:
    """A step of training in a world that may be made faulty, after some that warm it up."""
    world = FaultyWorld(plan.mesh, rank, torch.device("cpu"), ring)
    batches = random_batches(spec, (4, 1, 32), seed=plan.mesh.data_index(rank))
    step = our_step(spec, weights, plan, world, batches)
    for _ in range(2):
        step()
    world.begin_training()
    return world, step


# Ranks and links that are slow, and clean windows: many to a start.


def _windows(kind: Kind, number: int, count: int) -> Iterator[FaultRecord]:
    start = (number - 1) // PER_START[kind]
    names = {"slow": WITH_WAYS, "clean": CLEAN}.get(kind, tuple(PLANS))
    layout = names[start % len(names)]
    plan = PLANS[layout]
    spec = tiny_spec(plan)
    weights = SharedWeights(spec)

    def work(rank: int) -> list[FaultRecord]:
        ring = Ring(ring_path(run, rank), plan.mesh, rank)
        world, step = _faulty_step(plan, spec, weights, rank, ring)
        windows = _Windows(run, world, step, layout)
        windows.measure()
        found = [windows.trial(kind, each) for each in range(number, number + count)]
        ring.close("done")
        return found

    with tempfile.TemporaryDirectory(prefix="paceline-faults-") as folder:
        run = Path(folder)
        yield from run_ranks(work, NUM_RANKS, mesh=plan.mesh, timeout_s=600)[0]


class _Windows:
    """Windows of steps, of which the first rank judges what all have left.

    Args:
        run: the run's folder.
        world: in which faults are put.
        step: of training.
        layout: its name.
    """

    def __init__(
        self, run: Path, world: FaultyWorld, step: Callable[[], float], layout: str
    ) -> None:
        self._rings, self._world, self._step, self._layout = Rings(run), world, step, layout
        self._step_s = 0.0
        self._usual_s: dict[tuple[int, int], float] = {}

    def measure(self) -> None:
        """Takes a clean window, to know how long a step and a transfer take."""
        traces = self._window((), lambda: None)
        step_s = timeouts_of(traces, PATIENCE).step_s or 0.0
        cells = {pair: c for cells in delays(traces).values() for pair, c in cells.items()}
        usual_s = statistics.mean(c.mean_s for c in cells.values()) if cells else 0.0
        usual_s = max(LEAST_DELAY_S, usual_s)
        found = self._world.collect((step_s, dict.fromkeys(sorted(cells), usual_s)))[0]
        self._step_s, self._usual_s = found

    def trial(self, kind: Kind, number: int) -> FaultRecord:
        """A window with a fault, or without; what the first rank returns of it counts."""
        draws = _draw(kind, number, 3)
        if kind == "clean":
            return self._clean(number, draws[0])
        if kind == "slow":
            self.measure()
        fault, what = self._sleep(draws) if kind == "sleep" else self._slow(draws[0])
        verdict = self._judged(self._window((fault,), lambda: None))
        culprit = (fault.rank,) if kind == "sleep" else (fault.rank, fault.destination)
        return self._record(kind, number, what, culprit, verdict)

    def _clean(self, number: int, draw: float) -> FaultRecord:
        """Every third window has a save, which the first rank is long about, or an evaluation."""
        phases = ("saving", "evaluating", None)
        phase = phases[number % 3]

        def pause() -> None:
            if phase is None:
                return
            with self._world.phase(phase):
                if self._world.is_first:
                    time.sleep(12 * draw * self._step_s)
                self._world.barrier()

        verdict = self._judged(self._window((), pause))
        return self._record("clean", number, phase or "nothing", (), verdict)

    def _sleep(self, draws: list[float]) -> tuple[Fault, str]:
        rank, step, place = draws
        time_s = 10 * self._step_s
        fault = Fault(
            kind="sleep",
            rank=int(rank * NUM_RANKS),
            step=self._world.step + 2 + int(step * 4),
            place=place,
            time_s=time_s,
        )
        return fault, f"rank {fault.rank} sleeps {time_s:.2f} s, ten median steps"

    def _slow(self, draw: float) -> tuple[Fault, str]:
        pairs = sorted(self._usual_s)
        source, destination = pairs[int(draw * len(pairs))]
        usual_s = self._usual_s[source, destination]
        fault = Fault(
            kind="slow",
            rank=source,
            destination=destination,
            step=self._world.step,
            num_steps=NUM_STEPS,
            time_s=9 * usual_s,
        )
        text = f"{source} to {destination} slowed tenfold, by {9 * usual_s * 1e3:.1f} ms"
        return fault, text

    def _window(self, faults: tuple[Fault, ...], pause: Callable[[], None]) -> list[RankTrace]:
        """Some steps, with a pause in the middle; what the ranks have left of them."""
        torch.distributed.barrier()
        begin_s = time.time()
        self._world.faults = faults
        for index in range(NUM_STEPS):
            self._step()
            if index == NUM_STEPS // 2:
                pause()
            self._world.finish_step(self._world.step + 1)
        self._world.faults = ()
        torch.distributed.barrier()
        traces = self._rings.read(range(NUM_RANKS), is_whole=True)
        return [replace(t, calls=tuple(c for c in t.calls if c.enter_s >= begin_s)) for t in traces]

    def _judged(self, traces: list[RankTrace]) -> Verdict | None:
        return judge(traces, time.time(), patience=PATIENCE)

    def _record(
        self,
        kind: Kind,
        number: int,
        what: str,
        culprit: tuple[int, ...],
        verdict: Verdict | None,
    ) -> FaultRecord:
        outcome = _outcome(culprit, verdict)
        return FaultRecord(
            fault=kind,
            number=number,
            layout=self._layout,
            what=what,
            **outcome,
            step_s=self._step_s,
        )


def _outcome(culprit: tuple[int, ...], verdict: Verdict | None) -> dict[str, Any]:
    """What a verdict comes to beside the truth."""
    found = asdict(verdict) if verdict else {"kind": "", "ranks": (), "evidence": ""}
    return {
        "culprit": culprit,
        "named": found["ranks"],
        "verdict": found["kind"],
        "evidence": found["evidence"],
        "is_right": found["ranks"] == culprit,
    }


def main() -> None:
    records = prove(Path(__file__).parent / "records" / "faults.jsonl")
    print(summary(records), file=sys.stderr)


if __name__ == "__main__":
    main()
