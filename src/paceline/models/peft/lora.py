"""LoRA: an update of low rank beside each weight matrix.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685, Eq. 3.
Replaces: none.  Needs: nothing.  Forbids: train.freeze.
Cost: rank x (inputs + outputs) parameters and 2 x that many FLOPs a token for each matrix; nothing
    once it is merged.
Differs: all linear layers of blocks by default (the paper: queries and values); the first factor
    begins uniform in +-1 / sqrt(inputs), as in the authors' code, not normal; no dropout.
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
from paceline.models.peft.update import LowRank, Update
from paceline.models.weights import Weights
from paceline.plan.plan import PeftConfig

LINEAR_LAYERS = (
    *(f"blocks.*.attention.{part}" for part in ("query", "key", "value", "output")),
    *(f"blocks.*.ffn.{part}" for part in ("gate", "up", "down")),
)


class LoraLinear(AdaptedLinear):
    """``y = x W^T + b + scale (x A^T) B^T``; A is (rank, inputs), B is (outputs, rank)."""

    def __init__(self, base: Linear, config: PeftConfig) -> None:
        super().__init__(base)
        self.scale = config.alpha / config.rank
        self.lora_a = self.new_parameter(config.rank, self.in_features)
        self.lora_b = self.new_parameter(self.out_features, config.rank)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
        update = through(input, self.lora_a, self.lora_b)
        return super().forward(input) + self.scale * update


class Lora(LinearMethod):
    """Low-rank adaptation."""

    file_type = "LORA"
    file_names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}  # noqa: RUF012
    usual_targets = LINEAR_LAYERS

    def adapt(self, name: str, base: Linear) -> LoraLinear:
        return LoraLinear(base, self.config)

    def start(self, name: str, shape: tuple[int, ...], origin: Origin) -> Tensor:
        return start_factor(name, shape, origin.seed)

    def merge(self, kind: str, value: Tensor, module: str, added: Weights) -> Tensor:
        return value if kind == "bias" else value + low_rank(self.config, module, added, value)

    def update(self, module: str, own: Weights, has_bias: bool, added: Weights) -> Update:
        down, up = factors(self.config, module, added)
        return Update(low_rank=LowRank(down, up))

    def file_config(self, names: FileNames, targets: list[str]) -> dict[str, Any]:
        return lora_fields(self.config, names, targets)

    @classmethod
    def from_file(cls, options: FileOptions, names: FileNames) -> Self:
        return cls(read_lora_fields("lora", options, names))


def through(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``(x A^T) B^T`` in the dtype of x."""
    return functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype))


def start_factor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A begins random, B at zero, so that the update begins at zero."""
    if name.endswith(".lora_b"):
        return torch.zeros(shape)
    draws = rng.uniform(shape[0] * shape[1], seed=seed, purpose="adapter", stream=name)
    values = ((2 * draws - 1) / np.sqrt(shape[1])).astype(np.float32)
    return torch.from_numpy(values).view(shape)


def low_rank(config: PeftConfig, module: str, added: Weights, like: Tensor) -> Tensor:
    """``scale B A`` in the dtype of `like`."""
    a, b = (added.read(f"{module}.{part}").to(like.dtype) for part in ("lora_a", "lora_b"))
    return (config.alpha / config.rank) * (b @ a)


def factors(config: PeftConfig, module: str, added: Weights) -> tuple[Tensor, Tensor]:
    """``A`` and ``scale B``, at least in float32."""
    a, b = (added.read(f"{module}.{part}") for part in ("lora_a", "lora_b"))
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide), (config.alpha / config.rank) * b.to(wide)


def lora_fields(config: PeftConfig, names: FileNames, targets: list[str]) -> dict[str, Any]:
    """The options of LoRA's files, which DoRA shares."""
    return {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": names.listed(targets),
        "fan_in_fan_out": names.has_inputs_first,
        "bias": "none",
    }


def read_lora_fields(method: str, options: FileOptions, names: FileNames) -> PeftConfig:
    """What `lora_fields` writes, and what else leaves the same computation.

    ``use_rslora`` scales by alpha / sqrt(rank) (Kalajdzievski, arXiv:2312.03732): another alpha.
    """
    targets = names.targets(options)
    rank = options.take_int("r")
    alpha = options.take_float("lora_alpha")
    if options.take_switch("use_rslora"):
        alpha *= rank**0.5
    options.require("bias", "none")
    # Other ways to begin change the base model's weights, which the file does not hold.
    options.require("init_lora_weights", True, False, None, "gaussian", "orthogonal")
    options.ignore("lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size")
    return PeftConfig(method=method, targets=targets, rank=rank, alpha=alpha)
