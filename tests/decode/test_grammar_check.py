"""Grammars on trial: what is hostile ends its own process, and harms nobody else."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from paceline.core.errors import RequestError
from paceline.decode.grammar import Grammar, Grammars
from paceline.decode.grammar_check import GrammarBounds, GrammarCheck
from paceline.models.tokenizer import byte_tokenizer

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

GOOD = Grammar("regex", "[ab]{3}")


def grammars():
    return Grammars(byte_tokenizer(), 259)


@pytest.fixture(scope="module")
def check():
    check = GrammarCheck(grammars())
    check.require(GOOD)
    return check


def worker_pid(check):
    return check._worker._process.pid  # the process that a stranger's grammar meets


def children():
    """Pids of this process's children that have not been waited for."""
    task = Path(f"/proc/self/task/{os.getpid()}/children")
    return {int(pid) for pid in task.read_text().split()}


def test_one_process_tries_many(check):
    pid = worker_pid(check)
    for number in range(5):
        check.require(Grammar("regex", f"a{{{number + 1}}}"))
    check.require(Grammar("json", '{"type": "object", "properties": {"a": {"type": "null"}}}'))
    check.require(Grammar("json-object"))
    assert worker_pid(check) == pid


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "[a-"),
        Grammar("json", '{"type": "strng"}'),
        Grammar("json", "[" * 60_000),
        Grammar("json", '{"not": ' * 5000 + "{}" + "}" * 5000),
        Grammar("regex", "(" * 20_000 + ")" * 20_000),
        Grammar("regex", "\ud800"),
    ],
    ids=lambda grammar: grammar.text[:12].encode("ascii", "replace").decode(),
)
def test_what_is_no_grammar_is_refused_and_the_next_is_not(check, grammar):
    with pytest.raises(RequestError) as caught:
        check.require(grammar)
    assert caught.value.param == "grammar"
    assert caught.value.status == 400
    check.require(Grammar("regex", f"c{{{len(grammar.text) % 97 + 1}}}"))


HOSTILE = [
    Grammar("regex", "(a{1,1000}){1,1000}"),
    Grammar("regex", "(.{1,300}){1,300}x"),
    Grammar("regex", "a|(b{0,20000}c){0,20000}"),
    Grammar("regex", "(?:[ab]*a[ab]{900}|[bc]*b[abc]{900})*"),
    Grammar("json", '{"type": "string", "pattern": "^(a{1,999}){1,999}$", "maxLength": 99999}'),
    Grammar("json", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}'),
    Grammar("json", '{"anyOf": [' + ",".join(['{"type": "object"}'] * 3000) + "]}"),
]


@pytest.mark.parametrize("grammar", HOSTILE, ids=lambda grammar: grammar.text[:24])
def test_hostile_grammars_are_bounded_in_time_and_memory(grammar):
    """Refused or not, within the bounds; and then the next one is served."""
    bounds = GrammarBounds(compile_s=4.0, memory_bytes=256 << 20)
    check = GrammarCheck(grammars(), bounds)
    check.require(GOOD)
    start_s = time.monotonic()
    with contextlib.suppress(RequestError):
        check.require(grammar)
    assert time.monotonic() - start_s < 3 * bounds.compile_s
    check.require(Grammar("regex", "next"))


def test_what_takes_too_long_is_killed_and_remembered():
    check = GrammarCheck(grammars())
    check.require(GOOD)
    pid = worker_pid(check)
    os.kill(pid, signal.SIGSTOP)  # as slow as can be
    check._bounds = GrammarBounds(compile_s=0.2)
    slow = Grammar("regex", "slow")
    with pytest.raises(RequestError, match=r"takes more than 0\.2 s"):
        check.require(slow)
    assert pid not in children()
    check._bounds = GrammarBounds()
    with pytest.raises(RequestError, match=r"takes more than 0\.2 s"):
        check.require(slow)
    check.require(Grammar("regex", "other"))
    assert worker_pid(check) != pid


def test_a_killed_process_costs_no_request():
    check = GrammarCheck(grammars())
    check.require(GOOD)
    os.kill(worker_pid(check), signal.SIGSTOP)
    caught = []

    def ask():
        try:
            check.require(Grammar("regex", "in flight"))
        except RequestError as error:
            caught.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    os.kill(worker_pid(check), signal.SIGKILL)
    asking.join(timeout=30)
    assert not asking.is_alive()
    assert caught == []  # it was tried again
    check.require(Grammar("regex", "the next"))
    os.kill(worker_pid(check), signal.SIGKILL)
    check.require(Grammar("regex", "the one after"))


def test_memory_is_bounded():
    """The process ends, and the request is refused; with enough it is not."""
    large = Grammar("regex", "x" * 60_000)
    check = GrammarCheck(grammars(), GrammarBounds(memory_bytes=4 << 20))
    with pytest.raises(RequestError, match="memory"):
        check.require(large)
    check.require(GOOD)
    GrammarCheck(grammars()).require(large)


def test_a_long_text_is_refused_before_anything_else():
    check = GrammarCheck(grammars())
    with pytest.raises(RequestError, match="65537 characters exceeds 65536"):
        check.require(Grammar("regex", "a" * 65_537))
    assert check._worker is None


def test_a_model_without_an_end_has_no_grammars():
    tokenizer = byte_tokenizer()
    tokenizer.eos_ids = ()
    with pytest.raises(RequestError, match="no token that ends"):
        GrammarCheck(Grammars(tokenizer, 259)).require(GOOD)


def test_its_process_ends_with_it():
    check = GrammarCheck(grammars())
    check.require(GOOD)
    pid = worker_pid(check)
    assert pid in children()
    del check
    assert pid not in children()
