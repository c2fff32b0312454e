"""``y = x W^T + b`` whose gradient for W and b is computed later, or never waited for.

Source: Qi et al., Zero Bubble Pipeline Parallelism, arXiv:2401.10241, Sec. 1: a backward pass is
    two products, of which only that for inputs is waited for.
Cost: the same products as in one pass; between the two x and the gradient of y are held.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class _Product(NamedTuple):
    """What the gradients of one use of a weight are made of."""

    weight: Tensor | None
    bias: Tensor | None
    x: Tensor
    grad_y: Tensor


class DeferredGradients:
    """Linear layers, and the weight gradients that they owe.

    A backward pass inside `under` gives gradients for inputs and owes those for weights, until
    `compute`; one outside gives both at once, as plain autograd does. Either way they are the
    same, bit by bit. A weight that is no leaf gets its gradient at once, since its own backward
    pass goes on from there; so does one of another thread's pass.
    """

    def __init__(self) -> None:
        self._owed: dict[Hashable, list[_Product]] = {}
        # No thread-local: CUDA's backward passes run on a thread of autograd's own.
        self._key: Hashable | None = None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product in the dtype of x; weight and bias are cast as they are used.

        Args:
            x: (..., in).
            weight: (out, in).
            bias: (out).

        Returns:
            (..., out).
        """
        return _DeferredLinear.apply(x, weight, bias, self)

    @contextmanager
    def under(self, key: Hashable) -> Generator[None]:
        """Gathers what backward passes owe under a key, which no other may use meanwhile."""
        assert self._key is None, f"{self._key} is being gathered already"
        self._key = key
        try:
            yield
        finally:
            self._key = None

    def owe(self, product: _Product) -> bool:
        """Puts a product off if that can be; whether it was."""
        parameters = [p for p in (product.weight, product.bias) if p is not None]
        if self._key is None or not all(parameter.is_leaf for parameter in parameters):
            return False
        if parameters:
            self._owed.setdefault(self._key, []).append(product)
        return True

    @torch.no_grad()
    def compute(self, key: Hashable, on_ready: Callable[[Tensor], None] | None = None) -> None:
        """Adds the gradients owed under a key to those of weights and biases, and forgets them.

        Args:
            key: of an `under`; without anything owed nothing happens.
            on_ready: is called with each parameter whose gradient has grown.
        """
        gradients: dict[Tensor, Tensor] = {}
        for product in self._owed.pop(key, []):
            for parameter, gradient in zip(product[:2], _weight_gradients(product), strict=True):
                if parameter is not None and gradient is not None:
                    # Uses of one parameter in one pass are summed first, as autograd does.
                    held = gradients.get(parameter)
                    gradients[parameter] = gradient if held is None else held + gradient
        for parameter, gradient in gradients.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            if on_ready is not None:
                on_ready(parameter)


def _weight_gradients(product: _Product) -> tuple[Tensor | None, Tensor | None]:
    """Gradients for weight and bias, in the shapes of products that autograd computes them in."""
    weight, bias, x, grad_y = product
    grad_RO = grad_y.reshape(-1, grad_y.shape[-1])
    grad_weight = grad_bias = None
    if weight is not None:
        grad_weight = (grad_RO.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
    if bias is not None:
        grad_bias = grad_RO.sum(0).to(bias.dtype)
    return grad_weight, grad_bias


class _DeferredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, deferred: DeferredGradients
    ) -> Tensor:
        # The parameters themselves, which are there anyway: a cast copy would live from here to
        # the backward pass.
        ctx.save_for_backward(x, weight)
        ctx.parameters, ctx.deferred = (weight, bias), deferred
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (grad_y,) = grad_outputs
        x, weight = ctx.saved_tensors
        needs_x, *needs_gradient, _ = ctx.needs_input_grad
        grad_x = grad_y @ weight.to(grad_y.dtype) if needs_x else None
        wanted = [
            parameter if needed else None
            for parameter, needed in zip(ctx.parameters, needs_gradient, strict=True)
        ]
        product = _Product(wanted[0], wanted[1], x, grad_y)
        if ctx.deferred.owe(product):
            return grad_x, None, None, None
        return grad_x, *_weight_gradients(product), None
