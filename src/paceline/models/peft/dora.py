"""DoRA: each row of a weight matrix as a length, which is trained, and a direction under LoRA.

Source: Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353, Eq. 5 and
    Sec. 4.3.
Replaces: lora.  Needs: nothing.  Forbids: train.freeze.
Cost: LoRA's, and a length for each output; the product of the factors and the lengths of all rows
    once a pass, 2 x rank x inputs x outputs FLOPs; nothing once it is merged.
Differs: the paper's columns are rows here, as torch stores weights with outputs first. Lengths of
    the updated rows count as constants in the backward pass, as in Sec. 4.3.
"""

# ruff: noqa: ARG002 (arguments are the contract's)
from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from paceline.models.linear import Linear
from paceline.models.peft.base import Origin
from paceline.models.peft.linear import AdaptedLinear, LinearMethod
from paceline.models.peft.lora import (
    LINEAR_LAYERS,
    factors,
    lora_fields,
    low_rank,
    read_lora_fields,
    start_factor,
    through,
)
from paceline.models.peft.names import FileNames
from paceline.models.peft.options import FileOptions
from paceline.models.peft.update import LowRank, Update
from paceline.models.weights import Weights
from paceline.plan.plan import PeftConfig


class DoraLinear(AdaptedLinear):
    """``y = magnitude / |W + scale B A| * (x W^T + scale (x A^T) B^T) + b``, lengths by row."""

    def __init__(self, base: Linear, config: PeftConfig) -> None:
        super().__init__(base)
        self.scale = config.alpha / config.rank
        self.lora_a = self.new_parameter(config.rank, self.in_features)
        self.lora_b = self.new_parameter(self.out_features, config.rank)
        self.magnitude = self.new_parameter(self.out_features)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
        plain = functional.linear(input, self.weight.to(input.dtype))
        updated = plain + self.scale * through(input, self.lora_a, self.lora_b)
        y = updated * (self.magnitude / self._lengths()).to(input.dtype)
        return y if self.bias is None else y + self.bias.to(input.dtype)

    @torch.no_grad()
    def _lengths(self) -> Tensor:
        """Lengths of the updated rows, at least in float32."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        update = self.scale * (self.lora_b.to(wide) @ self.lora_a.to(wide))
        return torch.linalg.vector_norm(self.weight.to(wide) + update, dim=1)


class Dora(LinearMethod):
    """Weight-decomposed low-rank adaptation."""

    file_type = "LORA"
    file_names = {  # noqa: RUF012
        "lora_a": "lora_A.weight",
        "lora_b": "lora_B.weight",
        "magnitude": "lora_magnitude_vector",
    }
    usual_targets = LINEAR_LAYERS

    def adapt(self, name: str, base: Linear) -> DoraLinear:
        return DoraLinear(base, self.config)

    def start(self, name: str, shape: tuple[int, ...], origin: Origin) -> Tensor:
        module, _, part = name.rpartition(".")
        if part != "magnitude":
            return start_factor(name, shape, origin.seed)
        weight = origin.weights.read(f"{module}.weight")
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return torch.linalg.vector_norm(wide, dim=1)

    def merge(self, kind: str, value: Tensor, module: str, added: Weights) -> Tensor:
        if kind == "bias":
            return value
        updated = value + low_rank(self.config, module, added, value)
        lengths = torch.linalg.vector_norm(updated, dim=1)
        magnitude = added.read(f"{module}.magnitude").to(value.dtype)
        return (magnitude / lengths)[:, None] * updated

    def update(self, module: str, own: Weights, has_bias: bool, added: Weights) -> Update:
        """``y = ratio (x W^T + scale (x A^T) B^T) + b``, from ``x W^T + b``."""
        down, up = factors(self.config, module, added)
        lengths = torch.linalg.vector_norm(own.read(f"{module}.weight").to(up) + up @ down, dim=1)
        ratio = added.read(f"{module}.magnitude").to(up) / lengths
        shift = (1 - ratio) * own.read(f"{module}.bias").to(up) if has_bias else None
        low_rank = LowRank(down, ratio[:, None] * up)
        return Update(scale=ratio, shift=shift, low_rank=low_rank)

    def file_config(self, names: FileNames, targets: list[str]) -> dict[str, Any]:
        return lora_fields(self.config, names, targets) | {"use_dora": True}

    @classmethod
    def from_file(cls, options: FileOptions, names: FileNames) -> Self:
        options.ignore("use_dora")  # it is why this method was chosen
        return cls(read_lora_fields("dora", options, names))
