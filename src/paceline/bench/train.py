"""A training step, beside `transformers` on the same weights, batch, dtype and threads.

Both sides do what a user of each would run: forward, backward, clipping and AdamW (fused), on
master weights in float32; in bfloat16 the peer computes under autocast. Each side has a process
of its own, so that neither changes the other's allocator, and they take turns.
The limit is the measured rate of square matrix products over the model's FLOPs of a token.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext

import torch

from paceline.bench.outcome import Outcome, interleave, outcome
from paceline.bench.peer import load_peer, require_peer
from paceline.core.errors import PacelineError
from paceline.data.batch import Batch
from paceline.dist.world import World
from paceline.kernels.device import (
    choose_device,
    choose_dtype,
    keep_freed_memory,
    measure_peak_flops,
)
from paceline.models import hub
from paceline.optim import OPTIMIZERS
from paceline.parallel.apply import apply
from paceline.plan.plan import Plan
from paceline.train.objective.next_token import next_token
from paceline.train.state import State
from paceline.train.step import train_step

NUM_SEQUENCES, LENGTH = 2, 256
TEXT = "A paceline is a line of riders who take turns at the front. "
_LR, _CLIP_NORM = 1e-5, 1.0

Side = Callable[[], float]
"""Takes one step and returns its seconds."""


def run(
    *, against: str = "transformers", model: str = "smollm2-135m", dtype: str = "auto"
) -> Outcome:
    """Tokens per second of both sides."""
    peer = require_peer(against, model)  # here, and not in a process
    device = choose_device("cpu")
    compute = choose_dtype(dtype, device)
    name = str(compute).removeprefix("torch.")
    context = multiprocessing.get_context("spawn")
    ours, theirs = (
        _Worker(context, _our_step, model, name),
        _Worker(context, _peers_step, model, name),
    )
    try:
        rates = interleave(ours.tokens_per_s, theirs.tokens_per_s)
    finally:
        ours.close()
        theirs.close()
    peak = measure_peak_flops(device, compute)
    return outcome(
        f"train, {NUM_SEQUENCES} x {LENGTH} tokens a step, {name}",
        *rates,
        against=peer,
        limit=peak / hub.read_model_spec(model).model_flops_per_token(LENGTH),
        limited_by=f"{peak / 1e9:.0f} GFLOP/s of matrix products over the FLOPs of a token",
    )


class _Worker:
    """One side, in a process of its own that steps when it is told to."""

    def __init__(
        self,
        context: SpawnContext,
        side: Callable[[str, str], Side],
        model: str,
        dtype: str,
    ) -> None:
        self._pipe, theirs = context.Pipe()
        arguments = (side, model, dtype, torch.get_num_threads(), theirs)
        self._process = context.Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def tokens_per_s(self) -> float:
        """The rate of one step.

        Raises:
            PacelineError: the process has died.
        """
        try:
            self._pipe.send("step")
            return NUM_SEQUENCES * LENGTH / self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            code = self._process.exitcode
            raise PacelineError(f"a side of the benchmark died with exit code {code}") from error

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def _work(
    side: Callable[[str, str], Side], model: str, dtype: str, threads: int, pipe: Connection
) -> None:
    torch.set_num_threads(threads)
    step = side(model, dtype)
    try:
        while pipe.recv() == "step":
            pipe.send(step())
    except EOFError:
        return


def _our_step(model: str, dtype: str) -> Side:
    keep_freed_memory()
    source = hub.resolve(model)
    plan = Plan().with_overrides([f'precision.compute="{dtype}"'])
    world = World(plan.mesh, 0, torch.device("cpu"))
    laid_out = apply(source.spec, source.weights, plan, world)
    optimizer = OPTIMIZERS.load(plan.optimizer.name)(laid_out.parameters(), plan.optimizer)
    state = State(laid_out, optimizer)
    inputs_BT, labels_BT = _tokens(model)
    documents_BT = torch.zeros(NUM_SEQUENCES, LENGTH, dtype=torch.long)
    batch = Batch(inputs_BT, labels_BT, documents_BT)

    def step() -> float:
        start_s = time.perf_counter()
        train_step(state, [batch], next_token, world, learning_rate=_LR, max_norm=_CLIP_NORM)
        return time.perf_counter() - start_s

    return step


def _peers_step(model: str, dtype: str) -> Side:
    peer = load_peer(model, torch.float32).train()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=_LR, fused=True)
    inputs_BT, labels_BT = _tokens(model)
    is_narrow = dtype == "bfloat16"

    def step() -> float:
        start_s = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_narrow):
            loss = peer(input_ids=inputs_BT, labels=inputs_BT, shift_labels=labels_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), _CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start_s

    return step


def _tokens(model: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same text for both sides: inputs and the tokens that follow, both (B, T)."""
    ids = hub.resolve(model).tokenizer.encode(TEXT * LENGTH)
    tokens_BT = torch.tensor(ids[: NUM_SEQUENCES * (LENGTH + 1)]).view(NUM_SEQUENCES, LENGTH + 1)
    return tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()
