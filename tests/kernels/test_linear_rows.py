"""Products of few rows and many: near the definition, and each row the same in any company."""

from __future__ import annotations

import pytest
import torch

from paceline.kernels import native
from paceline.kernels.linear import invariant_linear, linear, most_rows
from paceline.kernels.linear_int8 import Int8Weight, linear_int8, to_int8

pytestmark = pytest.mark.cpu

BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-7}  # of the largest; bfloat16 rounds to 2**-9


@pytest.fixture(params=BOUNDS, ids=str)
def dtype(request):
    return request.param


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 16])
@pytest.mark.parametrize(("outputs", "width"), [(1, 1), (49, 33), (24, 64), (131, 96)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_near_the_definition(dtype, rows, outputs, width, with_bias):
    x, weight = draw(rows, width, dtype=dtype), draw(outputs, width, dtype=dtype)
    bias = draw(outputs, dtype=dtype) if with_bias else None
    expected = x.double() @ weight.double().t()
    expected = expected if bias is None else expected + bias.double()
    assert rows <= most_rows(dtype)
    error = (linear(x, weight, bias).double() - expected).abs().max() / expected.abs().max()
    assert float(error) <= BOUNDS[dtype]


@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_in_any_company(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x, weight, bias = draw(70, 90, dtype=dtype), draw(131, 90, dtype=dtype), draw(131, dtype=dtype)
    whole = invariant_linear(x, weight, bias)
    whole_int8 = linear_int8(x, to_int8(weight), bias)
    for count in (1, 2, 3, 4, 5, 6, 9, 32):
        for start in (0, 1, 30, 70 - count):
            rows = slice(start, start + count)
            assert torch.equal(invariant_linear(x[rows], weight, bias), whole[rows])
            assert torch.equal(linear_int8(x[rows], to_int8(weight), bias), whole_int8[rows])
    torch.set_num_threads(before)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(("outputs", "width"), [(49, 33), (24, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_int8_is_near_its_reference(monkeypatch, dtype, rows, outputs, width, with_bias):
    x, weight = draw(rows, width, dtype=dtype), to_int8(draw(outputs, width))
    bias = draw(outputs, dtype=dtype) if with_bias else None
    found = linear_int8(x, weight, bias).double()
    with monkeypatch.context() as patch:
        patch.setattr(native, "takes", lambda *_: False)
        expected = linear_int8(x, weight, bias).double()
    assert float((found - expected).abs().max() / expected.abs().max()) <= BOUNDS[dtype]


def test_int8_is_the_nearest():
    weight = draw(20, 64)
    weight[3] = 0
    found = to_int8(weight)
    assert isinstance(found, Int8Weight)
    different = (found.values.float() * found.scales[:, None] - weight).abs()
    assert bool((different <= found.scales[:, None] / 2 + 1e-7).all())
    assert int(found.values.abs().amax()) == 127
    assert float(different[3].max()) == 0
