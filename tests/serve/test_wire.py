"""What goes between processes comes back equal, and nothing else comes back."""

from __future__ import annotations

import json
import math
import socket
import threading

import pytest

from paceline.core.errors import DataError
from paceline.decode.grammar import Grammar
from paceline.decode.sampler import Draw, Sampled, SamplingParams
from paceline.serve.executor.base import StepResult, Work
from paceline.serve.executor.messages import FROM_RANKS, TO_RANKS, Done, Ready, Step
from paceline.serve.executor.wire import Line, from_plain, packed, to_plain

pytestmark = pytest.mark.cpu

PARAMS = SamplingParams(temperature=0.1 + 0.2, top_k=7, top_p=1 / 3, seed=2**63 + 1, stream=3)
PENALISED = SamplingParams(presence_penalty=0.5, logit_bias=((3, -1.5), (4, math.inf)))
STEP = Step(
    number=5,
    released=(1, 2),
    works=(
        Work(0, (1, 2, 3), 0, (7, 9), Draw(PARAMS, 3)),
        Work(4, (5,), 17, (), None, adapter="é", scored=(6,), num_top=2),
        Work(
            6, (7,), 3, (), Draw(PENALISED, 4, (1, 2, 3, 7), 3, 5, 2, (0, 1), Grammar("regex", "a"))
        ),
    ),
)
RESULT = StepResult(
    {0: Sampled(3), 9: Sampled(4, -math.inf, ((4, -0.1), (1, math.nextafter(-2.0, 0))))},
    failed={4: "why not"},
    prompt_logprobs={9: (Sampled(1, -0.5), Sampled(2, -1e-300))},
)
DONE = Done(number=5, num_rows=4, begin_s=1.5, end_s=2.5, result=RESULT)


@pytest.mark.parametrize(
    "value", [STEP, DONE, Ready(), Done(number=1, num_rows=0, begin_s=0, end_s=1)]
)
def test_messages_come_back_equal(value):
    plain = json.loads(json.dumps(to_plain(value)))
    assert from_plain(type(value), plain) == value


def test_a_field_that_has_its_default_is_not_sent():
    assert to_plain(Draw(SamplingParams(), 3)) == {"params": {}, "position": 3}


@pytest.mark.parametrize(
    ("kind", "plain", "message"),
    [
        (Step, {"number": 1, "released": [], "works": [], "more": 1}, "no Step"),
        (Step, {"number": 1, "released": []}, "works"),
        (Step, [1, [], []], "no Step"),
        (Step, {"number": "1", "released": [], "works": []}, "number: str"),
        (Step, {"number": True, "released": [], "works": []}, "number: bool"),
        (Step, {"number": 1, "released": [1.0], "works": []}, r"released\[0\]: float"),
        (Draw, {"params": {"temperature": "hot"}, "position": 1}, "params.temperature: str"),
        (Sampled, {"token": 1, "top": [[1]]}, r"top\[0\]: has 1 parts, not 2"),
        (StepResult, {"sampled": {"0": {"token": 1}}}, "sampled: dict"),
    ],
)
def test_what_is_none_of_its_type_is_an_error(kind, plain, message):
    with pytest.raises(DataError, match=message):
        from_plain(kind, plain)


@pytest.mark.parametrize("value", [object(), {1: b"bytes"}, Draw(object(), 1)])  # type: ignore[arg-type]
def test_what_is_no_plain_data_is_not_sent(value):
    with pytest.raises(TypeError, match="is no plain data"):
        to_plain(value)


@pytest.fixture
def ends():
    mine, its = socket.socketpair()
    controller = Line(mine, heard=FROM_RANKS, told=TO_RANKS)
    rank = Line(its, heard=TO_RANKS, told=FROM_RANKS)
    yield controller, rank
    controller.close()
    rank.close()


def test_a_line_carries_messages_both_ways(ends):
    controller, rank = ends
    long = Step(number=2, released=(), works=(Work(0, tuple(range(300_000)), 0, (), None),))
    sender = threading.Thread(target=lambda: [controller.send(STEP), controller.send(long)])
    sender.start()
    assert rank.receive() == STEP
    assert rank.receive() == long
    sender.join()
    rank.send(DONE)
    assert controller.receive() == DONE


def test_an_end_that_is_closed(ends):
    controller, rank = ends
    controller.connection.sendall(packed(["step", to_plain(STEP)])[:20])
    controller.close()
    with pytest.raises(EOFError):
        rank.receive()


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (packed(["done", to_plain(DONE)]), "no message is called 'done'"),  # not to ranks
        ((1 << 40).to_bytes(8, "big"), "is the most"),
    ],
)
def test_messages_that_may_not_come(ends, sent, message):
    controller, rank = ends
    controller.connection.sendall(sent)
    with pytest.raises(DataError, match=message):
        rank.receive()
