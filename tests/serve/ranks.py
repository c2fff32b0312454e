"""Executors over ranks for tests: ranks that are forked, and models that are worth their while."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from engines import TOKENIZER

from paceline.kernels.device import choose_device
from paceline.models.adapters import adapt
from paceline.models.families import family
from paceline.models.fuse import fuse
from paceline.models.hf import write_weights
from paceline.models.hub import ModelSource, resolve
from paceline.models.tokenizer import tokenizer_files
from paceline.models.weights import RandomWeights, build, fill
from paceline.plan.model_spec import ModelSpec
from paceline.serve.engine import Engine
from paceline.serve.executor import worker
from paceline.serve.executor.base import Executor
from paceline.serve.executor.deadline import Deadline
from paceline.serve.executor.local import LocalExecutor
from paceline.serve.executor.messages import Job
from paceline.serve.executor.ranks import RanksExecutor
from paceline.serve.load import BLOCK_SIZE
from paceline.serve.schedule.base import Budget, Policy
from paceline.serve.schedule.stall_free import stall_free


class Forked:
    """A rank in a forked process: torch is there already, so that it starts in no time.

    Args:
        connection: its end.
        log: gets what it prints.
    """

    def __init__(self, connection: socket.socket, log: Path, _job: Job) -> None:
        context = multiprocessing.get_context("fork")
        self._process = context.Process(
            target=_run, args=(connection, log, os.getpid()), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def _run(connection: socket.socket, log: Path, controller: int) -> None:
    torch.set_num_threads(1)  # first of all: a forked child hangs in its parent's OpenMP pool
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    worker.main(connection.detach(), controller)
    os._exit(0)  # no handlers of the parent's


@functools.cache
def folder_of(name: str, size: str = "tiny") -> str:
    """A random model of a family whose logits are of size 1, as a folder."""
    spec: ModelSpec = replace(family(name).PRESETS[size], initializer_std=0.15)
    folder = Path(tempfile.mkdtemp(prefix="paceline-test-model-"))
    weights = RandomWeights(spec)
    named = ((key, weights.read(key)) for key, _ in build(spec).named_parameters())
    write_weights(folder / "model.safetensors", spec, named, torch.float32)
    config = family(name).config_from_spec(spec) | {"dtype": "float32"}
    for file, text in {"config.json": json.dumps(config), **tokenizer_files(TOKENIZER)}.items():
        (folder / file).write_text(text, encoding="utf-8")
    return str(folder)


def job_of(source: ModelSource, pp: int, tp: int, num_blocks: int = 128) -> Job:
    return Job(
        model=source.name,
        adapter="",
        identity=source.identity,
        dtype="float32",
        device="cpu",
        pp=pp,
        tp=tp,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        num_threads=1,
    )


def engine_around(
    executor: Executor,
    source: ModelSource,
    *,
    policy: Policy = stall_free,
    max_batch_tokens: int = 512,
    max_sequences: int = 8,
) -> Engine:
    budget = Budget(max_batch_tokens, max_sequences)
    return Engine(executor, policy, budget, source.spec, source.tokenizer)


def local_engine(model: str, *, num_blocks: int = 128, **options) -> Engine:
    """One process, in float32."""
    source = resolve(model)
    decoder = build(source.spec)
    fill(decoder, adapt(decoder, source), choose_device("cpu"))
    fuse(decoder)
    return engine_around(LocalExecutor(decoder, num_blocks, BLOCK_SIZE), source, **options)


@contextmanager
def over_ranks(
    model: str,
    pp: int,
    tp: int,
    *,
    num_blocks: int = 128,
    depth: int | None = None,
    deadline: Deadline | None = None,
    **options,
) -> Generator[tuple[Engine, RanksExecutor]]:
    """An engine over forked ranks, in float32."""
    source = resolve(model)
    job = job_of(source, pp, tp, num_blocks)
    executor = RanksExecutor(job, depth=depth, start=Forked, deadline=deadline)
    try:
        yield engine_around(executor, source, **options), executor
    finally:
        executor.close()
