"""Weight gradients that are computed later are those of plain autograd, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from paceline.kernels.deferred import DeferredGradients
from paceline.models.families.llama import PRESETS
from paceline.models.linear import Linear
from paceline.models.weights import RandomWeights, build, fill

pytestmark = pytest.mark.cpu

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
DTYPES = [(F64, F64), (F32, F32), (BF16, BF16), (F32, BF16)]


def leaf(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype).requires_grad_()


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def two_layers(product: Any, x: Tensor, parameters: list[Tensor], num_uses: int) -> Tensor:
    """A loss through two layers, the first used several times."""
    weight, bias, last = parameters
    for _ in range(num_uses):
        x = functional.silu(product(x, weight, bias)) + x
    return product(x, last, None).square().sum()


def gradients(way: str, dtypes: Any, shape: tuple[int, ...], num_uses: int) -> list[Tensor]:
    """Of three micro-batches, computed in one of several ways."""
    weight_dtype, dtype = dtypes
    sizes = [(33, 33), (33,), (5, 33)]
    parameters = [leaf(*size, dtype=weight_dtype, seed=n) for n, size in enumerate(sizes)]
    deferred, inputs = DeferredGradients(), []
    for index in range(3):
        inputs.append(leaf(*shape, 33, dtype=dtype, seed=10 + index))
        product = plain if way == "plain" else deferred.linear
        loss = two_layers(product, inputs[-1], parameters, num_uses)
        if way in ("plain", "at once"):
            loss.backward()
            continue
        with deferred.under(index):
            loss.backward()
        if way == "each":
            deferred.compute(index)
    for index in range(3):
        deferred.compute(index)
    return [tensor.grad for tensor in (*parameters, *inputs)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (1,), (3, 5), (1, 1), (2, 0)], ids=str)
@pytest.mark.parametrize("num_uses", [1, 2, 3])
def test_gradients_are_those_of_autograd(dtypes, shape, num_uses):
    expected = gradients("plain", dtypes, shape, num_uses)
    for way in ("at once", "each", "all at the end"):
        for found, wanted in zip(gradients(way, dtypes, shape, num_uses), expected, strict=True):
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted), way


def one_layer() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(leaf(*s, dtype=F32, seed=n) for n, s in enumerate([(4, 6), (5, 6), (5,)]))


def test_a_backward_pass_owes_weights_and_gives_inputs():
    x, weight, bias = one_layer()
    deferred, ready = DeferredGradients(), []
    with deferred.under("a"):
        deferred.linear(x, weight, bias).sum().backward()
    assert x.grad is not None
    assert weight.grad is bias.grad is None
    deferred.compute("another")
    assert weight.grad is None
    deferred.compute("a", ready.append)
    assert [parameter is wanted for parameter, wanted in zip(ready, (weight, bias), strict=True)]
    assert torch.equal(bias.grad, torch.full((5,), 4.0))
    deferred.compute("a")  # nothing is owed any more
    assert torch.equal(bias.grad, torch.full((5,), 4.0))


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_parameters_are_owed_nothing(frozen):
    x, weight, bias = one_layer()
    weight.requires_grad_(frozen == "bias")
    bias.requires_grad_(frozen == "weight")
    deferred, ready = DeferredGradients(), []
    with deferred.under(0):
        deferred.linear(x, weight, bias).sum().backward()
    deferred.compute(0, ready.append)
    expected = {"weight": [bias], "bias": [weight], "both": []}[frozen]
    assert [id(parameter) for parameter in ready] == [id(parameter) for parameter in expected]
    assert (weight.grad is None, bias.grad is None) == (frozen != "bias", frozen != "weight")
    assert torch.equal(x.grad, weight.detach().sum(0).expand(4, 6))


def test_an_input_without_gradient_still_owes_the_weight():
    x, weight, bias = one_layer()
    deferred = DeferredGradients()
    with deferred.under(0):
        deferred.linear(x.detach(), weight, bias).sum().backward()
    deferred.compute(0)
    assert torch.equal(weight.grad, x.detach().sum(0).expand(5, 6))


def test_a_weight_that_is_computed_gets_its_gradient_at_once():
    x, weight, bias = one_layer()
    deferred = DeferredGradients()
    with deferred.under(0):
        deferred.linear(x, weight * 2, bias).sum().backward()
    assert torch.equal(weight.grad, 2 * x.detach().sum(0).expand(5, 6))
    deferred.compute(0)
    assert torch.equal(bias.grad, torch.full((5,), 4.0))


def test_gradients_set_to_none_between_are_made_anew():
    x, weight, bias = one_layer()
    deferred = DeferredGradients()
    for _ in range(2):
        with deferred.under(0):
            deferred.linear(x, weight, bias).sum().backward()
        weight.grad = None
        deferred.compute(0)
        assert torch.equal(weight.grad, x.detach().sum(0).expand(5, 6))


def test_recomputed_activations_owe_the_same():
    x, weight, bias = one_layer()
    expected = one_layer()
    plain(functional.silu(expected[0]), *expected[1:]).square().sum().backward()
    deferred = DeferredGradients()

    def layer(x: Tensor) -> Tensor:
        return deferred.linear(functional.silu(x), weight, bias)

    y = checkpoint(layer, x, use_reentrant=False)
    with deferred.under(0):
        y.square().sum().backward()
    assert weight.grad is None
    deferred.compute(0)
    for found, wanted in zip((x, weight, bias), expected, strict=True):
        assert torch.equal(found.grad, wanted.grad)


def test_two_keys_at_a_time_are_an_error():
    deferred = DeferredGradients()
    with (
        deferred.under(1),
        pytest.raises(AssertionError, match="1 is being gathered"),
        deferred.under(2),
    ):
        pass
    with deferred.under(3):  # the error has left nothing behind
        pass


def test_a_weight_that_changes_before_its_backward_pass_is_an_error():
    x, weight, bias = one_layer()
    y = DeferredGradients().linear(x, weight, bias)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("compute_dtype", [F32, BF16], ids=str)
def test_a_models_layers_defer_when_told(compute_dtype):
    spec = PRESETS["tiny"]
    tokens_BT = torch.arange(10).view(2, 5)

    def model_with(product: Any) -> Any:
        model = build(spec, F32)
        model.compute_dtype = compute_dtype
        fill(model, RandomWeights(spec, seed=1), torch.device("cpu"))
        for module in model.modules():
            if isinstance(module, Linear) and product is not None:
                module.product = product
        return model

    plain_model, deferred = model_with(None), DeferredGradients()
    plain_model(tokens_BT).square().mean().backward()
    model = model_with(deferred.linear)
    with deferred.under(0):
        model(tokens_BT).square().mean().backward()
    layers = {f"{n}.weight" for n, module in model.named_modules() if isinstance(module, Linear)}
    owed = {name for name, p in model.named_parameters() if p.grad is None}
    assert owed == layers - {"head.weight"}  # the head's logits are a product of the decoder
    assert len(owed) == 7 * spec.num_layers
    deferred.compute(0)
    for (name, found), wanted in zip(
        model.named_parameters(), plain_model.parameters(), strict=True
    ):
        assert torch.equal(found.grad, wanted.grad), name
