"""Ranks as processes of their own: a plan starts them, and none outlives its controller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engines import ask

from paceline.core.errors import ConfigError
from paceline.decode.paged import PagedPass, PagedStore, logits_of, pack
from paceline.decode.sampler import SamplingParams
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.hub import fetch, resolve
from paceline.parallel.inference import load_part
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import Plan
from paceline.serve.executor.base import Work
from paceline.serve.executor.tables import Tables
from paceline.serve.load import load_engine
from paceline.serve.request import Request

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

MODEL = "random:llama:tiny"
CONTROLLER = """
import sys, time
from paceline.plan.plan import Plan
from paceline.serve.load import load_engine

engine = load_engine("random:llama:tiny", Plan().with_overrides(["serve.mesh.pp=2"]), device="cpu")
print(*(process.pid for process in engine._executor.workers.processes), flush=True)
time.sleep(600)
"""


def plan_of(*settings: str) -> Plan:
    return Plan().with_overrides(['serve.dtype="float32"', *settings])


def test_a_plan_starts_ranks_that_answer_as_one_process():
    requests = [ask(max_tokens=9), ask("hello", seed=3)]
    expected = load_engine(MODEL, plan_of(), device="cpu").generate(requests)
    engine = load_engine(MODEL, plan_of("serve.mesh.tp=2"), device="cpu")
    pids = [process.pid for process in engine._executor.workers.processes]
    try:
        assert engine.generate(requests) == expected
        os.kill(pids[1], signal.SIGKILL)
        (lost,) = engine.generate(requests[:1])
        assert lost.finish_reason == "error"
        assert engine.generate(requests) == expected
    finally:
        engine.close()
    assert not any(is_there(pid) for pid in pids)


def test_no_rank_outlives_a_controller_that_is_killed():
    controller = subprocess.Popen(
        [sys.executable, "-c", CONTROLLER], stdout=subprocess.PIPE, text=True
    )
    assert controller.stdout is not None
    with controller.stdout as output:
        pids = [int(pid) for pid in output.readline().split()]
        assert len(pids) == 2
        assert all(is_there(pid) for pid in pids)
        controller.kill()
        controller.wait()
        assert gone_within(10.0, pids)


def gone_within(timeout_s: float, pids: list[int]) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while any(is_there(pid) for pid in pids):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


def is_there(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_a_layout_that_does_not_fit_starts_nothing():
    with pytest.raises(ConfigError, match=r"serve\.mesh\.pp = 4"):
        load_engine(MODEL, plan_of("serve.mesh.pp=4"))


# A real model.

TEXTS = ["Once upon a time, in a village by the sea,", "def fibonacci(n):\n    ", "1 2 3 4 5 6 7"]
BOUND = 1e-4
"""Of a difference between logits, whose size is about 20: sums over ranks are in another order."""


@pytest.fixture(scope="module")
def folder():
    return str(fetch("smollm2-135m"))


@pytest.fixture(scope="module")
def real_requests(folder):
    tokenizer = resolve(folder).tokenizer
    greedy, seeded = SamplingParams(temperature=0), SamplingParams(temperature=0.8, seed=3)
    return [
        Request(prompt_ids=tuple(tokenizer.encode(text)), sampling=sampling, max_tokens=32)
        for text in TEXTS
        for sampling in (greedy, seeded)
    ]


@pytest.fixture(scope="module")
def real_answers(folder, real_requests):
    return load_engine(folder, plan_of(), device="cpu").generate(real_requests)


@pytest.mark.parametrize("layout", ["tp=2", "pp=2"])
def test_smollm2_over_ranks_equals_one_process(folder, real_requests, real_answers, layout):
    engine = load_engine(folder, plan_of(f"serve.mesh.{layout}"), device="cpu")
    try:
        assert engine.generate(real_requests) == real_answers
    finally:
        engine.close()


def logits_over(folder: str, num_ranks: int):
    """Logits of a prompt, of the first rank."""
    source = resolve(folder)
    ids = tuple(source.tokenizer.encode(TEXTS[0]))

    def on_rank(rank: int):
        world = World(MeshConfig(tp=num_ranks), rank, torch.device("cpu"))
        part = load_part(source.spec, source.weights, world, torch.float32)
        store = PagedStore(part.store_spec, 4, 16, torch.float32, world.device)
        packed = pack([Tables(16).extend(Work(0, ids, 0, (2, 0), None))], world.device)
        part.decoder.attend = PagedPass(store, packed.rows).attend
        with torch.inference_mode():
            head = logits_of(range(len(ids)))
            logits_1TV = part.stage(packed.tokens_1T, packed.layout, head=head)
        # 9 query heads over 2 ranks read 2 of the 3 key heads on each, and no more are kept.
        num_layers, _, _, num_key_heads, _, _ = store.blocks_L2MKSH.shape
        assert num_layers * num_key_heads == 30 * {1: 3, 2: 2}[num_ranks]
        return logits_1TV[0].numpy()

    return on_rank(0) if num_ranks == 1 else run_ranks(on_rank, num_ranks)[0]


def test_logits_of_smollm2_over_ranks_are_near_those_of_one_process(folder):
    one, two = logits_over(folder, 1), logits_over(folder, 2)
    assert abs(one).max() > 10
    assert abs(one - two).max() < BOUND
