"""How long a step may take follows from the steps before."""

from __future__ import annotations

import pytest

from paceline.serve.executor.deadline import Deadline

pytestmark = pytest.mark.cpu  # the package that it is in imports torch


def test_the_first_step_has_its_own_time_and_counts_for_nothing():
    deadline = Deadline(least_s=2.0, first_s=60.0, factor=10.0)
    assert deadline.allowed_s(1) == 60.0
    deadline.took(1, 30.0)
    assert deadline.allowed_s(1) == 60.0
    deadline.took(4, 0.1)
    assert deadline.allowed_s(4) == 2.0


def test_it_is_many_times_the_longest_and_grows_with_the_tokens():
    deadline = Deadline(least_s=2.0, first_s=60.0, factor=10.0)
    for num_tokens, time_s in [(1, 9.0), (4, 0.5), (512, 3.0), (4, 0.5)]:
        deadline.took(num_tokens, time_s)
    assert deadline.allowed_s(1) == 30.0
    assert deadline.allowed_s(512) == 30.0
    assert deadline.allowed_s(1024) == 60.0
