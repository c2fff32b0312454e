"""Compiled blocks compute what plain ones do, and are compiled where the plan says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paceline.parallel.apply import is_compiled
from paceline.plan.plan import Plan
from paceline.verify.certify import certify
from paceline.verify.tiny import tiny_spec

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def plan_with(*settings: str) -> Plan:
    return Plan().with_overrides(list(settings))


@pytest.mark.cpu
def test_where_blocks_are_compiled():
    assert is_compiled(Plan(), CUDA)
    assert not is_compiled(Plan(), CPU)
    assert is_compiled(plan_with("train.compile=on"), CPU)
    assert not is_compiled(plan_with("train.compile=off"), CUDA)
    doubles = [f"precision.{key}=float64" for key in ("params", "compute", "reduce")]
    assert not is_compiled(plan_with(*doubles), CUDA)


@pytest.mark.cpu
@pytest.mark.slow  # compiling takes a minute
@pytest.mark.filterwarnings("ignore")  # the compiler has many of its own
@pytest.mark.parametrize("ladder_from", [None, 1], ids=["plain", "ladder"])
def test_compiled_blocks_are_certified(ladder_from):
    plan = plan_with("train.compile=on")
    certificate = certify(plan, replace(tiny_spec(plan), ladder_from=ladder_from))
    assert certificate.certified, certificate.worst
