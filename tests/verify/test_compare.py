from __future__ import annotations

import math

import pytest
import torch

from paceline.plan.layout import Box
from paceline.verify.compare import (
    gradient_errors,
    relative_error,
    uncovered,
    weight_errors,
    whole_pieces,
)

pytestmark = pytest.mark.cpu


def tensors(**values: list[float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def test_a_gradient_s_error_is_its_largest_difference_over_its_largest_value():
    expected = tensors(a=[1.0, -4.0, 2.0], b=[0.5, 0.25])
    found = tensors(a=[1.0, -3.0, 2.5], b=[0.5, 0.25])
    assert gradient_errors(whole_pieces(found), expected) == {"a": 0.25, "b": 0.0}


def test_gradients_near_zero_are_measured_against_the_largest_of_the_model():
    expected = tensors(large=[8.0], small=[0.0], between=[1e-5])
    found = tensors(large=[8.0], small=[1e-9], between=[1.1e-5])
    errors = gradient_errors(whole_pieces(found), expected)
    assert errors["small"] == pytest.approx(1e-9 / (1e-6 * 8.0))
    assert errors["between"] == pytest.approx(0.1)


def test_the_expected_side_is_the_measure():
    assert gradient_errors(whole_pieces(tensors(a=[3.0])), tensors(a=[1.0])) == {"a": 2.0}
    assert gradient_errors(whole_pieces(tensors(a=[1.0])), tensors(a=[4.0])) == {"a": 0.75}


def test_gradients_that_are_all_zero_are_equal_to_zero_alone():
    zero = tensors(a=[0.0, 0.0])
    assert gradient_errors(whole_pieces(zero), zero) == {"a": 0.0}
    assert gradient_errors(whole_pieces(tensors(a=[0.0, 1e-300])), zero)["a"] > 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_close(bad):
    good = tensors(a=[1.0, 2.0], b=[3.0, 4.0])
    for found, expected in (
        (tensors(a=[1.0, bad], b=[3.0, 4.0]), good),
        (good, tensors(a=[1.0, bad], b=[3.0, 4.0])),
        (tensors(a=[1.0, bad], b=[3.0, 4.0]), tensors(a=[1.0, bad], b=[3.0, 4.0])),
    ):
        assert not gradient_errors(whole_pieces(found), expected)["a"] <= 1.0
        assert not weight_errors(whole_pieces(found), expected)["a"] <= 1.0
    assert not relative_error(bad, 1.0) <= 1.0


def test_a_gradient_that_should_not_be_there_is_infinitely_wrong():
    errors = gradient_errors(whole_pieces(tensors(a=[1.0], b=[0.0])), tensors(a=[1.0]))
    assert errors == {"a": 0.0, "b": math.inf}


def test_a_piece_is_compared_with_its_part_of_the_whole():
    expected = tensors(a=[1.0, -4.0, 2.0])
    piece, box = torch.tensor([-4.0, 3.0], dtype=torch.float64), Box((1,), (2,))
    assert gradient_errors({"a": (piece, box)}, expected) == {"a": 0.25}
    assert weight_errors({"a": (piece, box)}, expected) == {"a": pytest.approx(1 / 21**0.5)}


def test_what_no_rank_has_is_found():
    expected = tensors(a=[1.0, 2.0, 3.0], b=[1.0])
    boxes = {"a": [Box((0,), (1,)), Box((1,), (2,))], "b": [Box((0,), (1,))]}
    assert uncovered(boxes, expected) == []
    assert uncovered({"a": [Box((0,), (1,)), Box((2,), (1,))]}, expected) == ["a", "b"]


def test_a_weight_s_error_is_a_ratio_of_norms():
    expected, found = tensors(a=[3.0, 4.0], b=[2.0]), tensors(a=[3.0, 4.5], b=[2.0])
    assert weight_errors(whole_pieces(found), expected) == {"a": pytest.approx(0.1), "b": 0.0}
    assert weight_errors(whole_pieces(tensors(a=[3.0, 4.0])), expected) == {"a": 0.0}


def test_the_error_of_one_number():
    assert relative_error(1.5, 2.0) == 0.25
    assert relative_error(-2.0, 2.0) == 2.0
    assert relative_error(0.0, 0.0) == 0.0
    assert relative_error(1e-300, 0.0) > 1.0
