"""IA3: keys, values and the hidden layer of the feed-forward, each scaled by a trained vector.

Source: Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
    Learning, arXiv:2205.05638, Sec. 3.3.
Replaces: none.  Needs: nothing.  Forbids: train.freeze.
Cost: 2 x d_kv + d_ffn parameters a layer, one product for each; nothing once it is merged.
Differs: keys are scaled before they are rotated. Experts' hidden layers are not scaled.
"""

# ruff: noqa: ARG002 (arguments are the contract's)
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor

from paceline.core.errors import UsageError
from paceline.models.linear import Linear
from paceline.models.peft.base import Origin
from paceline.models.peft.linear import AdaptedLinear, LinearMethod
from paceline.models.peft.names import FileNames
from paceline.models.peft.options import FileOptions
from paceline.models.peft.update import Update
from paceline.models.weights import Weights
from paceline.plan.plan import PeftConfig

_SCALED_BEFORE = ".ffn.down"  # its inputs are the hidden layer


class Ia3Linear(AdaptedLinear):
    """``y = scale * (x W^T + b)``, or ``y = (scale * x) W^T + b`` where inputs are scaled."""

    def __init__(self, base: Linear, *, scales_inputs: bool) -> None:
        super().__init__(base)
        self.scales_inputs = scales_inputs
        self.ia3 = self.new_parameter(self.in_features if scales_inputs else self.out_features)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name for it)
        scale = self.ia3.to(input.dtype)
        if self.scales_inputs:
            return super().forward(scale * input)
        return scale * super().forward(input)


class Ia3(LinearMethod):
    """Scaled inner activations."""

    file_type = "IA3"
    file_names = {"ia3": "ia3_l"}  # noqa: RUF012
    usual_targets = ("blocks.*.attention.key", "blocks.*.attention.value", "blocks.*.ffn.down")

    def adapt(self, name: str, base: Linear) -> Ia3Linear:
        return Ia3Linear(base, scales_inputs=name.endswith(_SCALED_BEFORE))

    def start(self, name: str, shape: tuple[int, ...], origin: Origin) -> Tensor:
        return torch.ones(shape)

    def merge(self, kind: str, value: Tensor, module: str, added: Weights) -> Tensor:
        scale = added.read(f"{module}.ia3").to(value.dtype)
        if module.endswith(_SCALED_BEFORE):
            return value if kind == "bias" else value * scale
        return value * (scale if kind == "bias" else scale[:, None])

    def update(self, module: str, own: Weights, has_bias: bool, added: Weights) -> Update:
        value = added.read(f"{module}.ia3")
        scale = value.to(torch.promote_types(value.dtype, torch.float32))
        is_before = module.endswith(_SCALED_BEFORE)
        return Update(input_scale=scale) if is_before else Update(scale=scale)

    def file_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        module = name.rpartition(".")[0]
        return (1, *shape) if module.endswith(_SCALED_BEFORE) else (*shape, 1)

    def file_config(self, names: FileNames, targets: list[str]) -> dict[str, Any]:
        return {
            "target_modules": names.listed(targets),
            "feedforward_modules": names.listed(_scaled_before(targets)),
            "fan_in_fan_out": names.has_inputs_first,
        }

    @classmethod
    def from_file(cls, options: FileOptions, names: FileNames) -> Self:
        options.ignore("fan_in_fan_out", "init_ia3_weights")
        targets = names.targets(options)
        scaled = options.take_names("feedforward_modules")
        if set(names.matching(scaled)) & set(targets) != set(_scaled_before(targets)):
            raise UsageError(
                f"{options.path}: feedforward_modules = {scaled!r} is not built in this version",
                hint="inputs are scaled of the feed-forward's last layer, and of no other",
            )
        return cls(PeftConfig(method="ia3", targets=targets))


def _scaled_before(targets: Iterable[str]) -> list[str]:
    """The modules whose inputs are scaled."""
    return [name for name in targets if name.endswith(_SCALED_BEFORE)]
