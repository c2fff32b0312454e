"""The gradient of a matrix used twice is autograd's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from paceline.models.hub import resolve
from paceline.models.tied import TiedEmbedding
from paceline.models.weights import build, fill

pytestmark = pytest.mark.cpu

BOUND = 1e-14
WORDS, WIDTH = 13, 5
TOKENS_BT = torch.tensor([[1, 7, 7, 0], [12, 1, 3, 3]])


def matrix() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(WORDS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()


def loss(embed: Callable[[], Tensor], head: Callable[[], Tensor]) -> Tensor:
    x_BTD = embed().tanh()
    return (functional.linear(x_BTD, head()) ** 3).sum()


def plain(weight: Tensor) -> Tensor:
    return loss(lambda: functional.embedding(TOKENS_BT, weight), lambda: weight)


def tied(weight: Tensor) -> Tensor:
    both = TiedEmbedding(weight)
    return loss(lambda: both.embed(TOKENS_BT), both.head)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max() / expected.abs().max()) <= BOUND


def test_both_gradients_are_added():
    weight = matrix()
    (expected,) = torch.autograd.grad(plain(weight), weight)
    (found,) = torch.autograd.grad(tied(weight), weight)
    assert_equal(found, expected)


def test_gradients_accumulate_over_passes():
    weight, other = matrix(), matrix()
    for scale in (1.0, 0.25):
        (scale * tied(weight)).backward()
        (scale * plain(other)).backward()
    assert_equal(weight.grad, other.grad)


def test_two_passes_before_their_backward_do_not_mix():
    weight, other = matrix(), matrix()
    (tied(weight) + 2 * tied(weight)).backward()
    (3 * plain(other)).backward()
    assert_equal(weight.grad, other.grad)


def test_a_pass_may_run_backward_twice():
    weight, other = matrix(), matrix()
    value = tied(weight)
    value.backward(retain_graph=True)
    value.backward()
    (2 * plain(other)).backward()
    assert_equal(weight.grad, other.grad)


def test_the_embedding_alone():
    weight, other = matrix(), matrix()
    TiedEmbedding(weight).embed(TOKENS_BT).square().sum().backward()
    functional.embedding(TOKENS_BT, other).square().sum().backward()
    assert_equal(weight.grad, other.grad)


def test_a_frozen_matrix_has_no_gradient_and_the_rest_has():
    source = resolve("random:llama:tiny")
    model = build(source.spec, torch.float64)
    fill(model, source.weights, torch.device("cpu"))
    model.embedding.weight.requires_grad_(False)
    model(TOKENS_BT).square().sum().backward()
    assert model.embedding.weight.grad is None
    assert model.blocks[0].attention.query.weight.grad is not None
