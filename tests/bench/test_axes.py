"""Both sides of every axis do the same work, and the command prints what came of it."""

from __future__ import annotations

import json
import math
import sys

import pytest

from paceline.bench import axes, context, ladder, vocabulary
from paceline.bench.axes import AXES, Axis, _Measured, _plan, _require_same, run
from paceline.bench.plain import require_plain
from paceline.cli.main import main
from paceline.core.errors import PacelineError, UnknownNameError, UsageError
from paceline.models.hub import read_model_spec
from paceline.plan.check import check

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]


def inside(monkeypatch, capsys, *arguments: str) -> tuple[object, str, str]:
    monkeypatch.setattr(sys, "argv", ["paceline", "bench", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, *capsys.readouterr()


@pytest.mark.slow
def test_every_axis_is_measured_and_both_sides_agree(monkeypatch, capsys):
    """The first two losses of each axis are those of the peer, or it is an error."""
    for module in (axes, context, ladder, vocabulary):
        monkeypatch.setattr(module, "LENGTH", 16)
    monkeypatch.setattr(ladder, "LATENCY_S", 1e-3)
    model = ("--model", "random:llama:tiny", "--layers", "2")
    code, out, _ = inside(monkeypatch, capsys, "axes", *model, "--json")
    assert code == 0
    found = json.loads(out)
    own = ["cp", "vocabulary, speed", "vocabulary, memory"]
    ladders = [f"ladder, {kind}" for kind in ladder.PASSES]
    assert list(found) == [*AXES, *own, *ladders]
    for name, outcome in ((name, found[name]) for name in AXES):
        assert outcome["name"].startswith(f"{name} 2, random:llama:tiny of 2 layers, ")
        assert outcome["against"].startswith("torch ")
        assert outcome["ratios"]["pairs"] == 7
        assert min(outcome["ours"], outcome["peer"], outcome["ratios"]["lowest"]) > 0
        assert outcome["fraction"] == pytest.approx(outcome["ours"] / outcome["limit"])
        assert "2 gloo ranks" in outcome["device"]


@pytest.mark.parametrize("name", AXES)
def test_plans_are_sound_at_the_size_of_smollm2(name):
    spec = read_model_spec("random:llama:135m")
    require_plain(spec)
    assert check(_plan(name), spec, num_ranks=2) == []


def test_a_side_that_does_other_work_is_an_error():
    def measured(*losses: tuple[float, float]) -> _Measured:
        return _Measured([1.0], [1.0], list(losses), 1.0)

    _require_same("pp", [measured((3.0, math.nan)), measured((3.0, 3.0001))])
    _require_same("dp", [measured((3.0, 2.0)), measured((3.0, 4.0))])  # each knows its own
    with pytest.raises(PacelineError, match=r"tp: the loss of step 2 is 2\.0, the peer's 2\.5"):
        _require_same("tp", [measured((3.0, 3.0), (2.0, 2.5))] * 2)
    with pytest.raises(PacelineError, match="not the same work"):
        _require_same("tp", [measured((math.inf, math.inf))])


@pytest.mark.slow
def test_a_peer_with_another_step_is_caught(monkeypatch):
    """Of one micro-batch alone: the first loss is the same, the second is not."""
    for module in (axes, context, ladder, vocabulary):
        monkeypatch.setattr(module, "LENGTH", 16)
    monkeypatch.setattr(axes, "AXES", {"dp_replicate": Axis("DDP", num_microbatches=2)})
    whole = axes._peer

    def half(name, plan, spec):
        make = whole(name, plan, spec)
        return lambda spec, weights, batches, *rest: make(spec, weights, batches[1:], *rest)

    run(model="random:llama:tiny", layers=2, pairs=1)
    monkeypatch.setattr(axes, "_peer", half)
    with pytest.raises(PacelineError, match="dp_replicate: the loss of step "):
        run(model="random:llama:tiny", layers=2, pairs=1)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("axes", "--against", "jax"), "unknown peer 'jax'", "one of torch"),
        (("axes", "--dtype", "float32"), "bench axes does not read --dtype", "one of --against"),
        (("train", "--layers", "2"), "bench train does not read --layers", "one of --against"),
        (("axes", "--model", "random:qwen2:tiny"), "the plain baseline has qkv_bias = False", ""),
        (("axles",), "unknown benchmark 'axles'", "did you mean axes?"),
    ],
)
def test_what_is_not_measured_is_refused(monkeypatch, capsys, arguments, message, hint):
    code, out, err = inside(monkeypatch, capsys, *arguments, "--json")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert f"hint: {hint}" in err


def test_the_plain_baseline_is_of_llamas_alone():
    with pytest.raises(UsageError, match="has tied_embeddings = True"):
        require_plain(read_model_spec("random:mixtral:tiny"))
    with pytest.raises(UnknownNameError):
        run(against="jax")
