from __future__ import annotations

import math

import pytest
import torch

from paceline.verify.compare import gradient_errors, relative_error, weight_errors

pytestmark = pytest.mark.cpu


def tensors(**values: list[float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def test_a_gradient_s_error_is_its_largest_difference_over_its_largest_value():
    expected = tensors(a=[1.0, -4.0, 2.0], b=[0.5, 0.25])
    found = tensors(a=[1.0, -3.0, 2.5], b=[0.5, 0.25])
    assert gradient_errors(found, expected) == {"a": 0.25, "b": 0.0}


def test_gradients_near_zero_are_measured_against_the_largest_of_the_model():
    expected = tensors(large=[8.0], small=[0.0], between=[1e-5])
    found = tensors(large=[8.0], small=[1e-9], between=[1.1e-5])
    errors = gradient_errors(found, expected)
    assert errors["small"] == pytest.approx(1e-9 / (1e-6 * 8.0))
    assert errors["between"] == pytest.approx(0.1)


def test_the_expected_side_is_the_measure():
    assert gradient_errors(tensors(a=[3.0]), tensors(a=[1.0])) == {"a": 2.0}
    assert gradient_errors(tensors(a=[1.0]), tensors(a=[4.0])) == {"a": 0.75}


def test_gradients_that_are_all_zero_are_equal_to_zero_alone():
    zero = tensors(a=[0.0, 0.0])
    assert gradient_errors(zero, zero) == {"a": 0.0}
    assert gradient_errors(tensors(a=[0.0, 1e-300]), zero)["a"] > 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_close(bad):
    good = tensors(a=[1.0, 2.0], b=[3.0, 4.0])
    for found, expected in (
        (tensors(a=[1.0, bad], b=[3.0, 4.0]), good),
        (good, tensors(a=[1.0, bad], b=[3.0, 4.0])),
        (tensors(a=[1.0, bad], b=[3.0, 4.0]), tensors(a=[1.0, bad], b=[3.0, 4.0])),
    ):
        assert not gradient_errors(found, expected)["a"] <= 1.0
        assert not weight_errors(found, expected)["a"] <= 1.0
    assert not relative_error(bad, 1.0) <= 1.0


@pytest.mark.parametrize(("found", "expected"), [("ab", "a"), ("a", "ab"), ("", "a"), ("b", "a")])
def test_a_gradient_on_one_side_only_is_an_error(found, expected):
    sides = [tensors(**{name: [1.0] for name in names}) for names in (found, expected)]
    with pytest.raises(ValueError, match=r"gradients on one side only: \['[ab]'"):
        gradient_errors(*sides)


def test_a_weight_s_error_is_a_ratio_of_norms():
    expected, found = tensors(a=[3.0, 4.0], b=[2.0]), tensors(a=[3.0, 4.5], b=[2.0])
    assert weight_errors(found, expected) == {"a": pytest.approx(0.1), "b": 0.0}
    with pytest.raises(KeyError, match="b"):
        weight_errors(tensors(a=[3.0, 4.0]), expected)


def test_the_error_of_one_number():
    assert relative_error(1.5, 2.0) == 0.25
    assert relative_error(-2.0, 2.0) == 2.0
    assert relative_error(0.0, 0.0) == 0.0
    assert relative_error(1e-300, 0.0) > 1.0
