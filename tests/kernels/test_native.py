"""The C kernels against torch's, in both dtypes, at sizes that fill no vector."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch.nn import functional

from paceline.kernels import native
from paceline.kernels.attend import scaled_dot_product
from paceline.kernels.gate import ACTIVATIONS, gated
from paceline.kernels.linear import linear
from paceline.kernels.norm import rms_norm
from paceline.kernels.rotate import rotate

pytestmark = pytest.mark.cpu

BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-7}  # relative; bfloat16 rounds to 2**-9
WIDTHS = (1, 15, 16, 63, 64, 65, 130, 576)


@pytest.fixture(params=BOUNDS, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=[1, 2], ids="{} threads".format, autouse=True)
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Expected comes from float64."""
    assert found.shape == expected.shape
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert float(error) <= BOUNDS[found.dtype]


def used(monkeypatch) -> list[str]:
    """The kernels that are run from now on."""
    names: list[str] = []
    original = native.call

    def call(name, *arguments):
        names.append(name)
        original(name, *arguments)

    monkeypatch.setattr(native, "call", call)
    return names


@torch.inference_mode()
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(monkeypatch, dtype, width, with_bias):
    names = used(monkeypatch)
    x, weight = draw(1, 1, width, dtype=dtype), draw(37, width, dtype=dtype)
    bias = draw(37, dtype=dtype) if with_bias else None
    expected = functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    assert_near(linear(x, weight, bias), expected)
    assert names == ["product"]


@torch.inference_mode()
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(monkeypatch, dtype, width, offset):
    names = used(monkeypatch)
    x, weight = draw(1, 1, 3, width, dtype=dtype), draw(width, dtype=dtype)
    wide = x.double()
    scale = (wide.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    assert_near(rms_norm(x, weight, 1e-3, offset), wide * scale * (weight.double() + offset))
    assert names == ["rms_norm"]


@torch.inference_mode()
def test_rms_norm_rounds_as_torchs(dtype):
    x, weight = draw(1, 7, 130, dtype=dtype), draw(130, dtype=dtype)
    with torch.enable_grad():
        expected = rms_norm(x, weight, 1e-5)
    different = (rms_norm(x, weight, 1e-5) - expected).abs().double()
    assert float((different / expected.abs().double().clamp(min=1e-6)).max()) <= BOUNDS[dtype]


@torch.inference_mode()
@pytest.mark.parametrize("width", [2, 16, 34, 64])
def test_rotate(monkeypatch, dtype, width):
    names = used(monkeypatch)
    x = draw(1, 1, 5, width, dtype=dtype)
    angles = draw(1, 1, 1, width // 2).double()
    cosine, sine = (torch.cat([f(angles)] * 2, -1).to(dtype) for f in (torch.cos, torch.sin))
    first, second = x.double().chunk(2, dim=-1)
    expected = x.double() * cosine.double() + torch.cat([-second, first], -1) * sine.double()
    assert_near(rotate(x, cosine, sine), expected)
    assert names == ["rotate"]


@torch.inference_mode()
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (5, 1)])
@pytest.mark.parametrize("keys", [1, 17, 300])
def test_attend(monkeypatch, dtype, heads, kv_heads, keys):
    names = used(monkeypatch)
    q = draw(1, 1, heads, 34, dtype=dtype)
    k, v = draw(1, keys, kv_heads, 34, dtype=dtype), draw(1, keys, kv_heads, 34, dtype=dtype)
    found = scaled_dot_product(q, k, v, None, is_causal=False, scale=0.3)
    repeated = (t.double().repeat_interleave(heads // kv_heads, dim=2)[0] for t in (k, v))
    keys_SNH, values_SNH = repeated
    scores_NS = torch.einsum("nh,snh->ns", q[0, 0].double(), keys_SNH) * 0.3
    expected_NH = torch.einsum("ns,snh->nh", scores_NS.softmax(-1), values_SNH)
    assert_near(found[0, 0], expected_NH)
    assert names == ["attend"]


@torch.inference_mode()
def test_attend_bears_large_scores():
    q, k = torch.full((1, 1, 1, 2), 1e4), draw(1, 9, 1, 2)
    v = draw(1, 9, 1, 2)
    found = scaled_dot_product(q, k, v, None, is_causal=False, scale=1.0)
    assert torch.equal(found[0, 0, 0], v[0, int(k.sum(-1).argmax()), 0])


@torch.inference_mode()
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", WIDTHS)
def test_gated(monkeypatch, dtype, activation, width):
    names = used(monkeypatch)
    x = 3 * draw(1, 1, 2 * width, dtype=dtype)
    gate, up = x.double().chunk(2, dim=-1)
    assert_near(gated(x, activation), ACTIVATIONS[activation](gate) * up)
    assert len(names) == 1


def test_what_needs_gradients_is_torchs(monkeypatch):
    names = used(monkeypatch)
    x, weight = draw(1, 8), draw(3, 8).requires_grad_()
    linear(x, weight).sum().backward()
    assert torch.equal(weight.grad, x.expand(3, 8))
    assert names == []


@torch.inference_mode()
@pytest.mark.parametrize(
    "tensors",
    [
        (draw(1, 8).double(), draw(3, 8).double()),
        (draw(200, 8), draw(3, 8)),
        (draw(1, 8), draw(8, 3).t()),
        (draw(1, 8, dtype=torch.float16), draw(3, 8, dtype=torch.float16)),
    ],
    ids=["float64", "many rows", "transposed", "float16"],
)
def test_what_the_kernels_do_not_take_is_torchs(monkeypatch, tensors):
    names = used(monkeypatch)
    assert torch.equal(linear(*tensors), functional.linear(*tensors))
    assert names == []


@pytest.fixture
def _no_library():
    native.kernels.cache_clear()
    yield
    native.kernels.cache_clear()


@pytest.mark.usefixtures("_no_library")
@torch.inference_mode()
def test_without_a_compiler_torch_computes_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(native, "_COMPILERS", ("no-such-compiler",))
    x, weight = draw(1, 8), draw(3, 8)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(linear(x, weight), functional.linear(x, weight))
        linear(x, weight)
    assert [r.message for r in caplog.records] == [
        "decoding with torch's kernels, slower: no C compiler (no-such-compiler) is installed"
    ]


@pytest.mark.usefixtures("_no_library")
def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch, tmp_path, caplog):
    broken = tmp_path / "broken.c"
    broken.write_text("not C")
    monkeypatch.setattr(native, "_SOURCES", (broken,))
    assert native.kernels() is None
    assert "returned non-zero exit status" in caplog.text
    assert list((tmp_path / "cache").rglob("*.so")) == []


def test_denormal_numbers_stay():
    assert native.kernels() is not None
    assert float(torch.tensor(1e-40) * 1.0) > 0
