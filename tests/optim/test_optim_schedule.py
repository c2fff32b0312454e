from __future__ import annotations

import math

import pytest

from paceline.optim.schedule import learning_rate
from paceline.plan.plan import OptimizerConfig, ScheduleConfig


def rates(num_steps: int, *, lr: float = 0.4, **schedule) -> list[float]:
    config = OptimizerConfig(lr=lr, schedule=ScheduleConfig(**schedule))
    return [learning_rate(config, step, num_steps) for step in range(1, num_steps + 1)]


def test_the_warm_up_rises_linearly_to_lr_at_its_last_step():
    found = rates(8, kind="constant", warmup_steps=4)
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4])


def test_linear_decay_ends_at_the_final_fraction():
    found = rates(6, kind="linear", warmup_steps=2, final_fraction=0.5)
    assert found == pytest.approx([0.2, 0.4, 0.35, 0.3, 0.25, 0.2])


def test_cosine_decay_ends_at_the_final_fraction():
    found = rates(6, kind="cosine", warmup_steps=2, final_fraction=0.5)
    quarter = 0.2 + 0.2 * (1 + math.sqrt(0.5)) / 2
    three_quarters = 0.2 + 0.2 * (1 - math.sqrt(0.5)) / 2
    assert found == pytest.approx([0.2, 0.4, quarter, 0.3, three_quarters, 0.2])


def test_a_decay_without_warm_up_begins_at_its_first_step():
    assert rates(4, kind="linear", final_fraction=0.0) == pytest.approx([0.3, 0.2, 0.1, 0.0])
    assert rates(4, kind="constant") == [0.4] * 4


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_run_no_longer_than_its_warm_up_never_decays(kind):
    assert rates(2, kind=kind, warmup_steps=4) == pytest.approx([0.1, 0.2])
    assert rates(4, kind=kind, warmup_steps=4) == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_steps_past_the_end_stay_at_the_final_fraction(kind):
    config = OptimizerConfig(lr=1.0, schedule=ScheduleConfig(kind=kind, final_fraction=0.25))
    assert learning_rate(config, 20, 10) == pytest.approx(0.25)


def test_the_default_is_cosine_to_a_tenth():
    config = OptimizerConfig()
    assert learning_rate(config, 100, 100) == pytest.approx(3e-5)
    assert learning_rate(config, 50, 100) == pytest.approx(3e-4 * 0.55)
