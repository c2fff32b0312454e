"""Which requests can be answered: the checks that keep one from harming others."""

from __future__ import annotations

import math
from collections.abc import Sequence

from paceline.core.errors import RequestError
from paceline.decode.sampler import SamplingParams
from paceline.plan.model_spec import ModelSpec
from paceline.serve.request import Request

MAX_LOGPROBS = 100
"""Likeliest tokens that are told of with each token, at most."""


def require_servable(request: Request, spec: ModelSpec, room_tokens: int) -> None:
    """Raises RequestError for what cannot be answered: sizes, token ids and numbers.

    Args:
        request: that is asked.
        spec: of the model.
        room_tokens: that all blocks of keys and values hold together.
    """
    length = len(request.prompt_ids)
    if length == 0:
        raise RequestError("the prompt is empty", param="prompt")
    if length >= spec.max_positions:
        raise RequestError(
            f"the prompt has {length} tokens, the context {spec.max_positions}",
            param="prompt",
            hint=f"at most {spec.max_positions - 1} tokens of prompt leave room for an answer",
        )
    if request.max_tokens < 1:
        raise RequestError(
            f"max_tokens = {request.max_tokens} must be positive", param="max_tokens"
        )
    if length + request.max_tokens > spec.max_positions:
        raise RequestError(
            f"{length} tokens of prompt and {request.max_tokens} of answer exceed the context "
            f"of {spec.max_positions}",
            param="max_tokens",
            hint=f"max_tokens of at most {spec.max_positions - length}",
        )
    if length + request.max_tokens > room_tokens:
        raise RequestError(
            f"{length} tokens of prompt and {request.max_tokens} of answer exceed the "
            f"{room_tokens} that this server has memory for",
            param="max_tokens",
            hint=f"max_tokens of at most {room_tokens - length}"
            if room_tokens > length
            else "a shorter prompt, or a server with more serve.kv_memory_bytes",
        )
    _require_tokens(request.prompt_ids, spec)
    if any(not stop for stop in request.stop):
        raise RequestError("a stop string is empty", param="stop")
    _require_options(request, spec)
    _require_sampling(request.sampling, spec)


def _require_tokens(ids: Sequence[int], spec: ModelSpec) -> None:
    if min(ids) < 0 or max(ids) >= spec.vocab_size:
        raise RequestError(f"token ids must be from 0 to {spec.vocab_size - 1}", param="prompt")


def _require_options(request: Request, spec: ModelSpec) -> None:
    """What goes with what."""
    if not 0 <= request.min_tokens <= request.max_tokens:
        raise RequestError(
            f"min_tokens = {request.min_tokens} must be from 0 to max_tokens = "
            f"{request.max_tokens}",
            param="min_tokens",
        )
    for param in ("num_logprobs", "num_prompt_logprobs"):
        value = getattr(request, param)
        if value is not None and not 0 <= value <= min(MAX_LOGPROBS, spec.vocab_size):
            most = min(MAX_LOGPROBS, spec.vocab_size)
            raise RequestError(f"{param} = {value} must be from 0 to {most}", param=param)
    if request.grammar is not None and request.ignore_eos:
        raise RequestError(
            "a grammar's answer ends where the grammar does; ignore_eos would have it go on",
            param="ignore_eos",
            hint="leave out ignore_eos",
        )


def _require_sampling(sampling: SamplingParams, spec: ModelSpec) -> None:
    """Numbers that are none, or out of range, which would come out as arbitrary tokens."""
    for param, fault in sampling_faults(sampling):
        raise RequestError(f"{param} = {fault}", param=param)
    for token, bias in sampling.logit_bias:
        if not 0 <= token < spec.vocab_size or not math.isfinite(bias):
            raise RequestError(
                f"logit_bias = {bias} of token {token}: tokens are from 0 to "
                f"{spec.vocab_size - 1}, and biases finite",
                param="logit_bias",
            )


def sampling_faults(sampling: SamplingParams) -> list[tuple[str, str]]:
    """Names of the numbers that are out of range, each with its value and the rule."""
    rules = (
        ("temperature", 0 <= sampling.temperature < math.inf, "not negative, and finite"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("top_k", sampling.top_k >= 0, "not negative"),
        ("min_p", 0 <= sampling.min_p <= 1, "from 0 to 1"),
        ("presence_penalty", math.isfinite(sampling.presence_penalty), "finite"),
        ("frequency_penalty", math.isfinite(sampling.frequency_penalty), "finite"),
        ("repetition_penalty", 0 < sampling.repetition_penalty < math.inf, "above 0, and finite"),
    )
    return [
        (param, f"{getattr(sampling, param)}: must be {rule}")
        for param, holds, rule in rules
        if not holds
    ]
