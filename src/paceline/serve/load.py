"""From a MODEL and a plan to an engine."""

from __future__ import annotations

from dataclasses import replace

from paceline.core.errors import ConfigError, Problem
from paceline.decode.grammar import Grammars
from paceline.decode.grammar_check import GrammarCheck
from paceline.kernels.device import choose_device, choose_dtype
from paceline.models.adapters import adapt, open_beside, put_all_beside, resolve_adapted
from paceline.models.fuse import fuse
from paceline.models.hub import ModelSource
from paceline.models.int8 import use_int8
from paceline.models.invariant import make_invariant
from paceline.models.weights import build, fill
from paceline.plan import check
from paceline.plan.model_spec import DTYPE_BYTES, ModelSpec
from paceline.plan.plan import Plan, ServeConfig
from paceline.serve.engine import Engine
from paceline.serve.executor.local import LocalExecutor
from paceline.serve.schedule import POLICIES
from paceline.serve.schedule.base import Budget

BLOCK_SIZE = 16
"""Tokens to a block."""
DEFAULT_KV_BYTES = 1 << 30
"""Of keys and values where the plan names no number, unless one context needs more."""


def load_engine(
    model: str | ModelSource, plan: Plan | None = None, *, device: str = "auto"
) -> Engine:
    """An engine for a MODEL, as a plan's ``[serve]`` says.

    Raises:
        ConfigError: the plan cannot be served.
        UsageError: no such model or adapter, or an adapter that cannot be served beside others.
    """
    plan = plan or Plan()
    source = resolve_adapted(model) if isinstance(model, str) else model
    check.require(plan, source.spec)
    adapters = open_beside(source, plan.serve.adapters)
    where = choose_device(device)
    dtype = choose_dtype(plan.serve.dtype, where)
    decoder = build(source.spec, dtype)
    fill(decoder, adapt(decoder, source), where)
    fuse(decoder)
    if plan.serve.weights == "int8":
        use_int8(decoder)
    if plan.serve.batch_invariant:
        make_invariant(decoder)
    beside = put_all_beside(decoder, source, adapters)
    num_virtual = decoder.num_virtual_tokens
    num_blocks = _num_blocks(source.spec, plan.serve, DTYPE_BYTES[str(dtype).split(".")[1]])
    grammars = Grammars(source.tokenizer, source.spec.vocab_size)
    return Engine(
        LocalExecutor(decoder, num_blocks, BLOCK_SIZE, grammars, beside and beside.segments),
        POLICIES.load(plan.serve.policy),
        Budget(plan.serve.max_batch_tokens, plan.serve.max_sequences),
        replace(source.spec, max_positions=source.spec.max_positions - num_virtual),
        source.tokenizer,
        num_virtual=num_virtual,
        grammars=GrammarCheck(grammars),
        dtype=str(dtype).split(".")[1],
        adapters=tuple(adapters),
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
