"""What a ladder hides of a slow link is measured as its formula says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from paceline.bench import ladder
from paceline.bench.ladder import _overlap, _plan, _Times, measure
from paceline.cli.main import main
from paceline.models.hub import read_model_spec
from paceline.plan.check import check

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

TINY = read_model_spec("random:llama:tiny")


def test_hidden_is_what_neither_the_clock_nor_the_waits_show():
    """10 sums of 10 ms, of which 2 x 3 - 1 = 5 can overlap: 50 ms show where all of these hide."""
    plain = _Times([1.0] * 3, [1.1] * 3, [0.1] * 3, 10)
    slow = _Times([1.0] * 3, [1.05, 1.06, 1.1], [0.05, 0.05, 0.075], 10)
    found = _overlap(plain, slow, 0.01, 3, has_backward=False)
    assert found.num_overlapped == 5
    shares = (found.hidden.highest, found.hidden.median, found.hidden.lowest)
    assert shares == pytest.approx((1.0, 0.8, 0.0))
    waits = found.hidden_waits
    assert (waits.median, waits.lowest) == pytest.approx((1.0, 0.5))
    assert found.plain_hidden_waits.median == pytest.approx(0.0)
    assert found.faster.median == pytest.approx(1.1 / 1.06)
    assert _overlap(plain, slow, 0.01, 3, has_backward=True).num_overlapped == 10


def test_sums_are_counted_and_a_plain_model_hides_none():
    """Three layers: of 2 x 3 outputs or gradients all but one can overlap, a pass."""
    found = measure(TINY, rounds=2, latency_s=2e-3)
    forward, both = found.values()
    assert (forward.num_overlapped, both.num_overlapped) == (5, 10)
    # The embedding's and, in the forward pass, two of the loss; backward, the head's.
    assert (forward.num_sums, both.num_sums) == (9, 16)
    for overlap in found.values():
        assert overlap.plain_hidden_waits.highest <= 0.02
        assert overlap.hidden_waits.lowest > 0


@pytest.mark.slow
def test_a_ladder_of_smollm2_s_widths_hides_most_of_five_milliseconds():
    """At least 80 % of the latency that it can overlap is waited for by no one."""
    spec = read_model_spec("random:llama:135m")
    for overlap in measure(replace(spec, num_layers=4)).values():
        assert overlap.hidden_waits.median >= 0.8


def test_the_plan_is_sound_at_the_size_of_smollm2():
    spec = read_model_spec("random:llama:135m")
    assert check(_plan(), replace(spec, ladder_from=0), num_ranks=2) == []


def test_the_command_prints_both_kinds_of_pass(monkeypatch, capsys):
    arguments = ("bench", "ladder", "--model", "random:llama:tiny", "--layers", "1", "--json")
    monkeypatch.setattr(sys, "argv", ["paceline", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == list(ladder.PASSES)
    for outcome in found.values():
        assert outcome["ratios"]["pairs"] == 7
        assert outcome["fraction"] == pytest.approx(outcome["ours"] / outcome["limit"])
