"""A model whose logits are the same bit by bit, whatever else is computed in a pass.

Kernels for large batches choose how to sum by how many rows there are, so a row's last bits depend
on the rows beside it. Here every product is by a kernel that sums each row in one order (norms,
gates, rotations and attention over blocks have no other); it costs speed where there are many rows.

Source: He, Defeating Nondeterminism in LLM Inference, Thinking Machines Lab, 2025.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paceline.core.errors import ConfigError, Problem
from paceline.kernels import native
from paceline.kernels.linear import invariant_linear
from paceline.models.decoder import Decoder
from paceline.models.ffn import FeedForward
from paceline.models.linear import Linear
from paceline.models.vocabulary import WholeVocabulary

_DTYPES = (torch.float32, torch.bfloat16)


class InvariantVocabulary(WholeVocabulary):
    """Every word is here, and is predicted in one order of sums."""

    def logits(self, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        return invariant_linear(x_BTD.contiguous(), weight_VD)


def make_invariant(model: Decoder) -> None:
    """Has every product of a model summed in one order, in place.

    Raises:
        ConfigError: a part of the model, or the machine, has no such kernel.
    """
    obstacle = _obstacle(model)
    if obstacle is not None:
        raise ConfigError(
            [
                Problem(
                    path="serve.batch_invariant",
                    value="true",
                    rule=f"no kernel with one order of sums for {obstacle}",
                    hint="false, or a dense gated model on a CPU with a C compiler",
                )
            ]
        )
    for module in model.modules():
        if type(module) is Linear and module.product is Linear.product:
            module.product = _product
    if type(model.vocabulary) is WholeVocabulary:
        model.vocabulary = InvariantVocabulary()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return invariant_linear(x.contiguous(), weight, bias)


def _obstacle(model: Decoder) -> str | None:
    """What keeps a model from being invariant, in words."""
    weight = model.embedding.weight
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES:
        return f"{weight.dtype} on {weight.device.type}"
    if native.kernels() is None:
        return "a machine without a C compiler"
    if model.prelude is not None or model.spec.norm != "rms":
        return "virtual tokens" if model.prelude is not None else f"a {model.spec.norm} norm"
    if any(model.spec.has_experts(layer) for layer in range(model.spec.num_layers)):
        return "experts"
    # int8 weights, which have products of their own, are summed in one order already.
    for module in model.modules():
        if isinstance(module, FeedForward) and module.gate_up is None:
            return "a feed-forward that is not one gated product"
        if isinstance(module, nn.Linear) and type(module) is not Linear:
            return f"an adapter's {type(module).__name__}"
    return None
