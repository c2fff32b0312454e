"""A model whose block projections and head are multiplied from int8 weights, for inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paceline.core.errors import ConfigError, Problem
from paceline.kernels.linear_int8 import Int8Weight, linear_int8, to_int8
from paceline.models.decoder import Decoder
from paceline.models.linear import Linear
from paceline.models.vocabulary import WholeVocabulary


class Int8Vocabulary(WholeVocabulary):
    """Every word is here, and is predicted from int8; embeddings are looked up as they were.

    Args:
        weight_VD: of the head.
    """

    def __init__(self, weight_VD: Tensor) -> None:
        self._weight = to_int8(weight_VD)

    def logits(self, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        del weight_VD
        return linear_int8(x_BTD.contiguous(), self._weight)


@torch.no_grad()
def use_int8(model: Decoder) -> None:
    """Rounds the weights of all projections of the blocks, and the head's, in place.

    Raises:
        ConfigError: a part of the model has weights that only it multiplies.
    """
    obstacle = _obstacle(model)
    if obstacle is not None:
        raise ConfigError(
            [
                Problem(
                    path="serve.weights",
                    value='"int8"',
                    rule=f"{obstacle} cannot be multiplied from int8",
                    hint='"auto", or a dense model without adapters',
                )
            ]
        )
    model.vocabulary = Int8Vocabulary(model.head_weight)
    for module in model.blocks.modules():
        if isinstance(module, Linear):
            _round(module)


def _round(module: Linear) -> None:
    """The float weight is given up for the int8 one."""
    weight = to_int8(module.weight)
    module.weight = nn.Parameter(weight.values, requires_grad=False)
    scales = weight.scales

    def product(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return linear_int8(x.contiguous(), Int8Weight(values, scales), bias)

    module.product = product


def _obstacle(model: Decoder) -> str | None:
    """What keeps a model from it, in words."""
    if any(model.spec.has_experts(layer) for layer in range(model.spec.num_layers)):
        return "experts"
    if type(model.vocabulary) is not WholeVocabulary:
        return "a vocabulary of parts"
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module) is not Linear:
            return f"an adapter's {type(module).__name__}"
    return None
