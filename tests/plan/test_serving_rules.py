"""What an engine over ranks may be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.models.families.llama import PRESETS
from paceline.plan.check import check
from paceline.plan.plan import Plan
from paceline.plan.rules.basic import NOT_BUILT

SPEC = PRESETS["tiny"]  # 3 layers, 6 query heads


def problems(*settings, spec=SPEC):
    plan = Plan().with_overrides([f"serve.{setting}" for setting in settings])
    return {problem.path: problem for problem in check(plan, spec)}


@pytest.mark.parametrize(
    "settings", [["mesh.tp=6"], ["mesh.pp=3"], ["mesh.tp=2", "mesh.pp=2"], ["mesh.tp=4"]]
)
def test_layouts_that_fit(settings):
    assert problems(*settings) == {}


@pytest.mark.parametrize(
    ("setting", "path", "rule", "hint"),
    [
        ("mesh.tp=7", "serve.mesh.tp", "exceeds the model's 6 query heads", "use at most 6"),
        ("mesh.pp=4", "serve.mesh.pp", "makes 4 stages, but the model has 3", "use at most 3"),
        ("mesh.tp=0", "serve.mesh.tp", "must be positive", "use 1 or more"),
        ("mesh.pp=-1", "serve.mesh.pp", "must be positive", "use 1 or more"),
        ("mesh.ep=2", "serve.mesh.ep", "is not built", "use 1"),
        ("mesh.replicas=2", "serve.mesh.replicas", "is not built", "use 1"),
    ],
)
def test_layouts_that_do_not_fit(setting, path, rule, hint):
    found = problems(setting)
    assert found.keys() == {path}
    assert rule in found[path].rule
    assert found[path].hint == hint


def test_a_ladder_is_not_cut_into_stages():
    ladder = replace(SPEC, ladder_from=1)
    assert problems("mesh.tp=2", spec=ladder) == {}
    found = problems("mesh.pp=2", spec=ladder)["serve.mesh.pp"]
    assert "ladder residual" in found.rule
    assert "serve.mesh.tp" in found.hint


def test_what_has_not_been_proved_over_ranks(monkeypatch):
    """Each is refused with the ranks, and not without, once it is built at all."""
    monkeypatch.setitem(NOT_BUILT, "serve.draft", ("none", "ngram"))
    for setting in ("batch_invariant=true", 'weights="int8"', 'draft="ngram"'):
        assert problems(setting) == {}
        found = problems(setting, "mesh.pp=2")
        path = f"serve.{setting.partition('=')[0]}"
        assert found.keys() == {path}
        assert "set serve.mesh.tp = 1 and serve.mesh.pp = 1" in found[path].hint
