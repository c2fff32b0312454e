"""Saves of a model in training, beside `torch.distributed.checkpoint.async_save` of the same state.

One loop trains SmolLM2-135M in float32 with AdamW, on a short sequence, in windows of a few steps
that take turns: without saves, with lazy saves, and with torch's, once with what it does by itself
and once with memory that it keeps between saves. A window begins with a save, so that there is one
as often as the disk takes them: nobody saves that often, and it is the worst case. What is still
being written at the end of a window is waited for outside of it.
"""

from __future__ import annotations

import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from paceline.bench.outcome import MIN_PAIRS, Outcome, ratio
from paceline.bench.train import TEXT
from paceline.checkpoint import SAVERS
from paceline.checkpoint.base import SavedRun, Saver
from paceline.checkpoint.quiet import quiet
from paceline.core.errors import UnknownNameError
from paceline.data.batch import Batch
from paceline.dist.world import World
from paceline.kernels.device import choose_device, describe, keep_freed_memory
from paceline.models import hub
from paceline.optim import OPTIMIZERS
from paceline.parallel.apply import apply
from paceline.plan.plan import CheckpointConfig, Plan
from paceline.train.objective.next_token import next_token
from paceline.train.state import State
from paceline.train.step import train_step

LENGTH, NUM_STEPS = 256, 5
_PEER = "async_save"
_LR, _CLIP_NORM = 1e-5, 1.0


class Window(NamedTuple):
    """A few steps.

    Attributes:
        steps_s: of all of them.
        stood_s: of these, that training stood still for the save.
    """

    steps_s: float
    stood_s: float


def run(*, against: str = _PEER, model: str = "smollm2-135m") -> dict[str, Outcome]:
    """Seconds that a save holds training up, and the rate of the loop beside saves.

    Raises:
        UnknownNameError: another peer.
    """
    if against != _PEER:
        raise UnknownNameError("peer", against, [_PEER])
    keep_freed_memory()
    folder = Path(tempfile.mkdtemp(prefix="paceline-bench-checkpoint-"))
    try:
        with quiet():
            return _outcomes(model, _measure(_Loop(model), folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Side:
    """One way to save.

    Attributes:
        begin: a save; returns the seconds that it has held training up.
        fence: called before the state moves; likewise.
        wait: until all is on disk.
    """

    begin: Callable[[], float]
    fence: Callable[[], float]
    wait: Callable[[], None]


class _Loop:
    """A model in training.

    Args:
        model: a MODEL.
    """

    def __init__(self, model: str) -> None:
        source = hub.resolve(model)
        self.plan = Plan(checkpoint=CheckpointConfig(keep=1))
        self.spec = source.spec
        self.world = World(self.plan.mesh, 0, torch.device("cpu"))
        laid_out = apply(source.spec, source.weights, self.plan, self.world)
        build = OPTIMIZERS.load(self.plan.optimizer.name)
        self.state = State(laid_out, build(laid_out.parameters(), self.plan.optimizer))
        ids = source.tokenizer.encode(TEXT * LENGTH)[: LENGTH + 1]
        tokens_BT = torch.tensor([ids])
        inputs_BT, labels_BT = tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()
        self._batch = Batch(inputs_BT, labels_BT, torch.zeros_like(inputs_BT))

    def window(self, side: _Side) -> Window:
        """Some steps, the first of them beside a save that has just begun."""
        start_s = time.perf_counter()
        stood_s = side.begin()

        def fence() -> None:
            nonlocal stood_s
            stood_s += side.fence()

        for _ in range(NUM_STEPS):
            train_step(
                self.state,
                [self._batch],
                next_token,
                self.world,
                learning_rate=_LR,
                max_norm=_CLIP_NORM,
                before_update=fence,
            )
        steps_s = time.perf_counter() - start_s
        side.wait()
        return Window(steps_s, stood_s)


def _measure(loop: _Loop, folder: Path) -> dict[str, list[Window]]:
    """Windows of all sides, taken in turns; one round before is thrown away."""
    run = SavedRun(folder, loop.plan, loop.spec, loop.world)
    saver: Saver = SAVERS.load("lazy")(run, loop.state.parts())
    sides = {
        "none": _Side(lambda: 0.0, lambda: 0.0, lambda: None),
        "ours": _ours(loop, saver),
        "default": _theirs(loop, folder / "default", None),
        "kept": _theirs(loop, folder / "kept", _kept_memory()),
    }
    found: dict[str, list[Window]] = {name: [] for name in sides}
    for _ in range(1 + MIN_PAIRS):
        for name, side in sides.items():
            found[name].append(loop.window(side))
    saver.close()
    return {name: windows[1:] for name, windows in found.items()}


def _ours(loop: _Loop, saver: Saver) -> _Side:
    def wait() -> None:
        while not saver.poll():
            time.sleep(0.01)

    return _Side(
        begin=lambda: _seconds(lambda: saver.begin(loop.state.step, loop.state.parts())),
        fence=lambda: _seconds(saver.fence),
        wait=wait,
    )


def _kept_memory() -> DefaultStager:
    """Torch's copies in memory that is used again; what else it offers needs CUDA."""
    options = StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=False,
    )
    return DefaultStager(options)


def _theirs(loop: _Loop, folder: Path, stager: DefaultStager | None) -> _Side:
    """Torch's: it copies while the caller waits, and writes in a thread.

    Each save has a folder of its own, as ours has, and the one before goes once it is written: to
    write over the same files is faster, and a kill leaves no checkpoint at all.
    """
    pending: list[Any] = []
    number = 0

    def begin() -> None:
        nonlocal number
        number += 1
        writer = FileSystemWriter(folder / str(number))
        state = {name: part.local for name, part in loop.state.parts().items()}
        logging.disable(logging.WARNING)
        pending.append(
            dcp.async_save(state, storage_writer=writer, async_stager=stager, no_dist=True)
        )

    def wait() -> None:
        pending.pop().result()
        shutil.rmtree(folder / str(number - 1), ignore_errors=True)
        logging.disable(logging.NOTSET)

    return _Side(begin=lambda: _seconds(begin), fence=lambda: 0.0, wait=wait)


def _seconds(work: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def _outcomes(model: str, windows: dict[str, list[Window]]) -> dict[str, Outcome]:
    """What the windows come to, against the faster of torch's two ways."""
    best = min(("default", "kept"), key=lambda name: _median_stood_s(windows[name]))
    peer = f"torch {torch.__version__} async_save, its staging memory {best}"
    step_s = statistics.median(w.steps_s for w in windows["none"]) / NUM_STEPS
    name = f"{model} in float32 with AdamW, 1 x {LENGTH} tokens a step"
    device = describe(choose_device("cpu"))
    stood = [[w.stood_s for w in windows[side]] for side in ("ours", best)]
    tokens = LENGTH * NUM_STEPS
    rates = {side: [tokens / w.steps_s for w in found] for side, found in windows.items()}
    free = statistics.median(rates["none"])
    loop = statistics.median(rates["ours"])
    return {
        "stall": Outcome(
            name=f"a save's stall, {name}",
            unit="s",
            ours=statistics.median(stood[0]),
            peer=statistics.median(stood[1]),
            against=peer,
            limit=step_s,
            limited_by="a step without saves; less is better, of the ratio too",
            fraction=statistics.median(stood[0]) / step_s,
            ratios=ratio(stood[0], stood[1]),
            device=device,
        ),
        "loop": Outcome(
            name=f"{NUM_STEPS} steps and a save, {name}",
            unit="tokens/s",
            ours=loop,
            peer=statistics.median(rates[best]),
            against=peer,
            limit=free,
            limited_by="the same steps without a save",
            fraction=loop / free,
            ratios=ratio(rates["ours"], rates[best]),
            device=device,
        ),
    }


def _median_stood_s(windows: list[Window]) -> float:
    return statistics.median(window.stood_s for window in windows)
