"""From a MODEL and a plan to an engine."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from paceline.core.errors import ConfigError, Problem, UsageError
from paceline.decode.grammar import Grammars
from paceline.decode.grammar_check import GrammarCheck
from paceline.kernels.device import choose_device, choose_dtype
from paceline.models.adapters import adapt, open_beside, put_all_beside, resolve_adapted
from paceline.models.decoder import Decoder
from paceline.models.fuse import fuse
from paceline.models.hub import ModelSource
from paceline.models.int8 import use_int8
from paceline.models.invariant import make_invariant
from paceline.models.peft.attach import method_of
from paceline.models.peft.files import is_adapter
from paceline.models.weights import build, fill
from paceline.plan import check
from paceline.plan.model_spec import DTYPE_BYTES, ModelSpec
from paceline.plan.plan import Plan, ServeConfig
from paceline.serve.engine import Engine
from paceline.serve.executor.local import LocalExecutor
from paceline.serve.executor.messages import Job
from paceline.serve.executor.ranks import RanksExecutor
from paceline.serve.schedule import POLICIES
from paceline.serve.schedule.base import Budget

BLOCK_SIZE = 16
"""Tokens to a block."""
DEFAULT_KV_BYTES = 1 << 30
"""Of keys and values where the plan names no number, unless one context needs more."""


def load_engine(
    model: str | ModelSource,
    plan: Plan | None = None,
    *,
    device: str = "auto",
    depth: int | None = None,
) -> Engine:
    """An engine for a MODEL, as a plan's ``[serve]`` says.

    Args:
        model: a MODEL, or what has been found of one.
        plan: absent: the defaults.
        device: ``auto``, ``cpu`` or ``cuda``.
        depth: steps that stages have under way together; absent: one a stage. Less lets stages wait
            for each other.

    Raises:
        ConfigError: the plan cannot be served.
        UsageError: no such model or adapter, one that cannot be served over ranks, or an adapter
            that cannot be served beside others.
        ExecutorLostError: a rank cannot begin.
    """
    plan = plan or Plan()
    source = resolve_adapted(model) if isinstance(model, str) else model
    check.require(plan, source.spec)
    adapters = open_beside(source, plan.serve.adapters)
    where = choose_device(device)
    dtype = choose_dtype(plan.serve.dtype, where)
    num_blocks = _num_blocks(source.spec, plan.serve, DTYPE_BYTES[str(dtype).split(".")[1]])
    grammars = Grammars(source.tokenizer, source.spec.vocab_size)
    num_virtual = 0
    if plan.serve.mesh.num_ranks > 1:
        executor = RanksExecutor(_job(source, plan, device, dtype, num_blocks), depth=depth)
    else:
        assert depth in (None, 1), "one process computes a step as it takes it"
        decoder = _loaded(source, plan.serve, dtype, where)
        beside = put_all_beside(decoder, source, adapters)
        num_virtual, segments = decoder.num_virtual_tokens, beside and beside.segments
        executor = LocalExecutor(decoder, num_blocks, BLOCK_SIZE, grammars, segments)
    return Engine(
        executor,
        POLICIES.load(plan.serve.policy),
        Budget(plan.serve.max_batch_tokens, plan.serve.max_sequences),
        replace(source.spec, max_positions=source.spec.max_positions - num_virtual),
        source.tokenizer,
        num_virtual=num_virtual,
        grammars=GrammarCheck(grammars),
        dtype=str(dtype).split(".")[1],
        adapters=tuple(adapters),
    )


def _loaded(
    source: ModelSource, serve: ServeConfig, dtype: torch.dtype, device: torch.device
) -> Decoder:
    """A whole model, ready to answer as the plan says."""
    decoder = build(source.spec, dtype)
    fill(decoder, adapt(decoder, source), device)
    fuse(decoder)
    if serve.weights == "int8":
        use_int8(decoder)
    if serve.batch_invariant:
        make_invariant(decoder)
    return decoder


def _job(source: ModelSource, plan: Plan, device: str, dtype: torch.dtype, num_blocks: int) -> Job:
    """What ranks compute for a plan.

    Raises:
        UsageError: too few devices, or an adapter that cannot become part of the model.
    """
    mesh, adapter, kind = plan.serve.mesh, source.adapter, choose_device(device).type
    if kind == "cuda" and torch.cuda.device_count() < mesh.num_ranks:
        found = torch.cuda.device_count()
        rule = f"serve.mesh has {mesh.num_ranks} ranks, and there are {found} CUDA devices"
        raise UsageError(rule, hint=f"serve.mesh.tp and serve.mesh.pp of at most {found} together")
    if adapter is not None and (why := method_of(adapter.config).why_unmerged):
        raise UsageError(
            f"the adapter {adapter.path} cannot be served over ranks: {why}",
            hint="set serve.mesh.tp = 1 and serve.mesh.pp = 1",
        )
    return Job(
        model=source.name,  # which may name the adapter, and that its base
        adapter="" if adapter is None or is_adapter(Path(source.name)) else str(adapter.path),
        identity=source.identity,
        dtype=str(dtype).removeprefix("torch."),
        device=kind,
        pp=mesh.pp,
        tp=mesh.tp,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        num_threads=max(1, (os.cpu_count() or 1) // mesh.num_ranks),
    )


def _num_blocks(spec: ModelSpec, serve: ServeConfig, value_bytes: int) -> int:
    """How many blocks the memory for keys and values holds.

    Raises:
        ConfigError: not one.
    """
    width = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    block_bytes = width * value_bytes * BLOCK_SIZE
    of_contexts = -(-spec.max_positions // BLOCK_SIZE) * serve.max_sequences
    if serve.kv_memory_bytes is None:
        one = -(-spec.max_positions // BLOCK_SIZE)
        return min(of_contexts, max(one, DEFAULT_KV_BYTES // block_bytes))
    if serve.kv_memory_bytes < block_bytes:
        problem = Problem(
            path="serve.kv_memory_bytes",
            value=str(serve.kv_memory_bytes),
            rule=f"a block of {BLOCK_SIZE} tokens needs {block_bytes} bytes",
            hint=f"{block_bytes} or more",
        )
        raise ConfigError([problem])
    return min(of_contexts, serve.kv_memory_bytes // block_bytes)
