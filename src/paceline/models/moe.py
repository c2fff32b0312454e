"""A mixture of experts: each token goes to the few experts that its router scores highest.

Source: Shazeer et al., arXiv:1701.06538; Jiang et al., Mixtral, arXiv:2401.04088, Sec. 2.1.
Cost: the chosen experts' products; no token is dropped, none is padded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from paceline.kernels.gate import ACTIVATIONS
from paceline.models.linear import Linear
from paceline.plan.model_spec import ModelSpec


class Experts(nn.Module):
    """All experts of a layer, their weights stacked: gate and up (E, F, D), down (E, D, F)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.moe is not None
        shape = (spec.moe.num_experts, spec.moe.d_expert, spec.d_model)
        self.activation = ACTIVATIONS[spec.activation]
        self.gate = nn.Parameter(torch.empty(shape))
        self.up = nn.Parameter(torch.empty(shape))
        self.down = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))

    def forward(self, x_RD: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by expert, `counts` of them for each; an expert without rows does nothing."""
        outputs: list[Tensor] = []
        for expert, rows_RD in enumerate(x_RD.split(counts)):
            gate_RF = functional.linear(rows_RD, self.gate[expert].to(x_RD.dtype))
            up_RF = functional.linear(rows_RD, self.up[expert].to(x_RD.dtype))
            hidden_RF = self.activation(gate_RF) * up_RF
            outputs.append(functional.linear(hidden_RF, self.down[expert].to(x_RD.dtype)))
        return torch.cat(outputs)


class MixtureOfExperts(nn.Module):
    """The router, and its experts."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.moe is not None
        self.moe = spec.moe
        self.router = Linear(spec.d_model, spec.moe.num_experts, bias=False)
        self.experts = Experts(spec)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_RD = x_BTD.flatten(0, 1)
        weights_RC, experts_RC = self.route(x_RD)
        num_choices = experts_RC.shape[1]
        order = experts_RC.flatten().argsort(stable=True)
        counts = experts_RC.flatten().bincount(minlength=self.moe.num_experts)
        tokens = order // num_choices
        outputs = self.experts(x_RD[tokens], counts.tolist())
        weighted = outputs * weights_RC.flatten()[order, None]
        return torch.zeros_like(x_RD).index_add(0, tokens, weighted).view_as(x_BTD)

    def route(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices of the experts that each token goes to, both (R, choices)."""
        scores_RE = self.router(x_RD)
        probs_RE = scores_RE.to(torch.promote_types(x_RD.dtype, torch.float32)).softmax(dim=-1)
        weights_RC, experts_RC = probs_RE.topk(self.moe.experts_per_token, dim=-1)
        if self.moe.normalize_weights:
            weights_RC = weights_RC / weights_RC.sum(dim=-1, keepdim=True)
        return weights_RC.to(x_RD.dtype), experts_RC
