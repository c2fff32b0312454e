"""The loss and its gradients against torch's, computed from whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from paceline.kernels import cross_entropy
from paceline.kernels.cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.cpu

ROWS, WIDTH, WORDS, IGNORED = 23, 12, 31, -100


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(WORDS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, WORDS, (ROWS,), generator=generator)
    labels[[0, 7, 8, ROWS - 1]] = IGNORED
    return x, weight, labels


def expected(x, weight, labels):
    logits = functional.linear(x.double(), weight)
    loss = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return loss, torch.autograd.grad(0.3 * loss, (x, weight))


@pytest.mark.parametrize("chunk", [1, 5, 19, 1024])
def test_exact_in_float64(monkeypatch, chunk):
    monkeypatch.setattr(cross_entropy, "_CHUNK_ROWS", chunk)
    x, weight, labels = inputs(torch.float64)
    loss, gradients = expected(x, weight, labels)
    found = linear_cross_entropy(x, weight, labels, ignored=IGNORED)
    (0.3 * found).backward()
    assert abs(float((found - loss).detach())) <= 1e-12 * float(loss.detach())
    for tensor, gradient in zip((x, weight), gradients, strict=True):
        assert float((tensor.grad - gradient).abs().max() / gradient.abs().max()) <= 1e-12
    assert torch.equal(x.grad[7], torch.zeros(WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("chunk", [5, 1024])
def test_bfloat16_sums_gradients_in_float32(monkeypatch, chunk):
    monkeypatch.setattr(cross_entropy, "_CHUNK_ROWS", chunk)
    x, weight, labels = inputs(torch.bfloat16)
    loss, (grad_x, grad_weight) = expected(x, weight, labels)
    master = weight.detach().float().requires_grad_()
    found = linear_cross_entropy(x, master, labels, ignored=IGNORED)
    (0.3 * found).backward()
    assert found.dtype == torch.float32
    assert master.grad.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16
    assert abs(float((found - loss).detach())) <= 1e-2 * float(loss.detach())
    for found_grad, gradient in ((x.grad, grad_x), (master.grad, grad_weight)):
        assert float((found_grad - gradient).abs().max() / gradient.abs().max()) <= 3e-2


def test_only_what_is_trained_has_a_gradient():
    x, weight, labels = inputs(torch.float64)
    linear_cross_entropy(x.detach(), weight, labels, ignored=IGNORED).backward()
    assert x.grad is None
    assert weight.grad is not None
    x, weight, labels = inputs(torch.float64)
    linear_cross_entropy(x, weight.detach(), labels, ignored=IGNORED).backward()
    assert x.grad is not None
    assert weight.grad is None


def test_without_a_label_there_is_no_loss_and_no_gradient():
    x, weight, labels = inputs(torch.float64)
    loss = linear_cross_entropy(x, weight, torch.full_like(labels, IGNORED), ignored=IGNORED)
    loss.backward()
    assert loss.item() == 0
    assert float(weight.grad.abs().max()) == float(x.grad.abs().max()) == 0


def test_a_second_backward_pass_is_refused():
    x, weight, labels = inputs(torch.float64)
    loss = linear_cross_entropy(x, weight, labels, ignored=IGNORED)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="a second backward pass"):
        loss.backward()


def test_no_gradient_is_made_where_none_is_wanted():
    x, weight, labels = inputs(torch.float64)
    loss, _ = expected(x, weight, labels)
    with torch.no_grad():
        found = linear_cross_entropy(x, weight, labels, ignored=IGNORED)
    assert abs(float((found - loss).detach())) <= 1e-12 * float(loss.detach())
    assert not found.requires_grad
