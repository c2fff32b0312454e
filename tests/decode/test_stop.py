"""Stop strings: what is shown does not depend on the pieces that text comes in."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.decode.stop import StopScanner

STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)
PIECES = st.lists(st.text("abc", max_size=5), max_size=8)


def scan(pieces, stops):
    """All text that is shown, and whether it was stopped."""
    scanner = StopScanner(stops)
    shown = ""
    for piece in pieces:
        text, is_stopped = scanner.push(piece)
        shown += text
        if is_stopped:
            return shown, True
    return shown + scanner.finish(), False


def reference(text, stops):
    """Reads one character at a time: the first stop string that is complete ends the text."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(PIECES, STOPS)
def test_pieces_do_not_matter(pieces, stops):
    text = "".join(pieces)
    assert scan(pieces, stops) == scan([text], stops) == scan(text, stops) == reference(text, stops)


@settings(max_examples=500, deadline=None)
@given(PIECES, STOPS)
def test_no_more_is_held_back_than_might_be_a_stop(pieces, stops):
    scanner = StopScanner(stops)
    text = shown = ""
    for piece in pieces:
        part, is_stopped = scanner.push(piece)
        text, shown = text + piece, shown + part
        if is_stopped:
            return
        beginnings = {stop[:n] for stop in stops for n in range(len(stop))}
        held = max((len(b) for b in beginnings if text.endswith(b)), default=0)
        assert shown == text[: len(text) - held]


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["hello STOP more"], ["STOP"], ("hello ", True)),
        (["hello S", "TO", "P more"], ["STOP"], ("hello ", True)),
        (["hello S", "TO", "NE"], ["STOP"], ("hello STONE", False)),
        (["hello ST"], ["STOP"], ("hello ST", False)),
        (["aab"], ["ab"], ("a", True)),
        (["a", "a", "b"], ["aab", "ab"], ("", True)),  # two at once: the longer one
        (["xab"], ["b", "abc"], ("xa", True)),  # the one that is complete first
        (["xabc"], ["b", "abc"], ("xa", True)),
        (["a\n\nb"], ["\n"], ("a", True)),
        (["🦙", "é"], ["é"], ("🦙", True)),
        (["anything"], [], ("anything", False)),
    ],
)
def test_by_hand(pieces, stops, expected):
    assert scan(pieces, stops) == expected


def test_what_is_held_back_is_shown_once():
    scanner = StopScanner(["STOP"])
    assert scanner.push("a S") == ("a ", False)
    assert scanner.finish() == "S"
    assert scanner.finish() == ""
