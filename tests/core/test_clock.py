from __future__ import annotations

import pytest

from paceline.core.clock import VirtualClock, WallClock


def test_virtual_clock_moves_only_when_told():
    clock = VirtualClock(start_s=5.0)
    assert [clock.now_s(), clock.now_s()] == [5.0, 5.0]
    clock.sleep(2.5)
    clock.sleep(0.0)
    assert clock.now_s() == 7.5


def test_virtual_clock_cannot_go_back():
    clock = VirtualClock()
    with pytest.raises(ValueError, match="-1"):
        clock.sleep(-1.0)
    assert clock.now_s() == 0.0


def test_wall_clock_sleeps_at_least_as_long_as_asked():
    clock = WallClock()
    start_s = clock.now_s()
    clock.sleep(0.02)
    assert 0.02 <= clock.now_s() - start_s < 10.0
