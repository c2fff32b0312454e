"""Requests: which are refused, and with what words."""

from __future__ import annotations

import pytest
from engines import GREEDY, ask

from paceline.core.errors import RequestError
from paceline.models.families.llama import PRESETS
from paceline.serve.request import Request
from paceline.serve.servable import require_servable

pytestmark = pytest.mark.cpu

SPEC = PRESETS["tiny"]  # 512 positions, 259 tokens


def with_ids(*ids, max_tokens=1):
    return Request(prompt_ids=ids, sampling=GREEDY, max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("request_", "param", "message", "hint"),
    [
        (with_ids(), "prompt", "the prompt is empty", ""),
        (ask("x" * 512), "prompt", "the prompt has 512 tokens, the context 512", "at most 511"),
        (ask("x" * 600), "prompt", "the prompt has 600 tokens, the context 512", "at most 511"),
        (ask("hi", max_tokens=0), "max_tokens", "max_tokens = 0 must be positive", ""),
        (ask("hi", max_tokens=-3), "max_tokens", "max_tokens = -3 must be positive", ""),
        (
            ask("x" * 500, max_tokens=13),
            "max_tokens",
            "500 tokens of prompt and 13 of answer exceed the context of 512",
            "max_tokens of at most 12",
        ),
        (with_ids(0, 259), "prompt", "token ids must be from 0 to 258", ""),
        (with_ids(-1, 5), "prompt", "token ids must be from 0 to 258", ""),
        (ask(stop=("ok", "")), "stop", "a stop string is empty", ""),
    ],
    ids=str,
)
def test_what_is_refused(request_, param, message, hint):
    with pytest.raises(RequestError) as caught:
        require_servable(request_, SPEC, 10_000)
    assert caught.value.message == message
    assert caught.value.param == param
    assert hint in caught.value.hint
    assert bool(caught.value.hint) == bool(hint)
    assert caught.value.status == 400


def test_what_just_fits():
    require_servable(ask("x" * 511, max_tokens=1), SPEC, 10_000)
    require_servable(ask("x", max_tokens=511), SPEC, 10_000)
    require_servable(with_ids(0, 258), SPEC, 10_000)


def test_what_all_blocks_cannot_hold_is_refused():
    require_servable(ask("x" * 90, max_tokens=10), SPEC, 100)
    with pytest.raises(RequestError, match="exceed the 100 that this server has memory for") as e:
        require_servable(ask("x" * 90, max_tokens=11), SPEC, 100)
    assert e.value.hint == "max_tokens of at most 10"
    with pytest.raises(RequestError) as e:
        require_servable(ask("x" * 100, max_tokens=1), SPEC, 100)
    assert "serve.kv_memory_bytes" in e.value.hint
