"""Bottleneck adapters: a small hidden layer after attention and after the feed-forward.

Source: Houlsby et al., Parameter-Efficient Transfer Learning for NLP, arXiv:1902.00751, Sec. 2.1;
    ``peft.targets = ["blocks.*.ffn.down"]`` is the placement of Pfeiffer et al., arXiv:2005.00247.
Replaces: none.  Needs: nothing.  Forbids: train.freeze; merging.
Cost: 2 x width x d_model + width + d_model parameters for each adapter, and 2 x that many FLOPs a
    token.
Differs: norms are not trained; weights begin normal with standard deviation 0.01, not truncated;
    experts have no adapter after them. Its files are this project's own, in the form of `peft`'s.
"""

# ruff: noqa: ARG002 (arguments are the contract's)
from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from paceline.core import rng
from paceline.models.linear import Linear
from paceline.models.peft.base import Origin
from paceline.models.peft.linear import AdaptedLinear, LinearMethod
from paceline.models.peft.names import FileNames
from paceline.models.peft.options import FileOptions
from paceline.plan.plan import PeftConfig

_START_STD = 1e-2  # Sec. 3.1: near enough to the identity


class BottleneckLinear(AdaptedLinear):
    """``z = x W^T + b; y = z + gelu(z D^T + d) U^T + u``; D is (width, outputs)."""

    def __init__(self, base: Linear, width: int) -> None:
        super().__init__(base)
        self.inner_weight = self.new_parameter(width, self.out_features)
        self.inner_bias = self.new_parameter(width)
        self.outer_weight = self.new_parameter(self.out_features, width)
        self.outer_bias = self.new_parameter(self.out_features)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
        z, dtype = super().forward(input), input.dtype
        inner = functional.linear(z, self.inner_weight.to(dtype), self.inner_bias.to(dtype))
        hidden = functional.gelu(inner, approximate="tanh")
        return z + functional.linear(hidden, self.outer_weight.to(dtype), self.outer_bias.to(dtype))


class Bottleneck(LinearMethod):
    """Adapters in series."""

    file_type = "BOTTLENECK"
    file_names = {  # noqa: RUF012
        "inner_weight": "bottleneck_inner.weight",
        "inner_bias": "bottleneck_inner.bias",
        "outer_weight": "bottleneck_outer.weight",
        "outer_bias": "bottleneck_outer.bias",
    }
    usual_targets = ("blocks.*.attention.output", "blocks.*.ffn.down")
    why_unmerged = "its hidden layer is not linear, and no matrix computes it"
    why_alone = "its hidden layer is not computed for single rows of a pass"

    def adapt(self, name: str, base: Linear) -> BottleneckLinear:
        return BottleneckLinear(base, self.config.width)

    def start(self, name: str, shape: tuple[int, ...], origin: Origin) -> Tensor:
        if name.endswith("_bias"):
            return torch.zeros(shape)
        draws = rng.normal(shape[0] * shape[1], seed=origin.seed, purpose="adapter", stream=name)
        return torch.from_numpy((draws * _START_STD).astype(np.float32)).view(shape)

    def file_config(self, names: FileNames, targets: list[str]) -> dict[str, Any]:
        return {"target_modules": names.listed(targets), "width": self.config.width}

    @classmethod
    def from_file(cls, options: FileOptions, names: FileNames) -> Self:
        targets, width = names.targets(options), options.take_int("width")
        return cls(PeftConfig(method="bottleneck", targets=targets, width=width))
