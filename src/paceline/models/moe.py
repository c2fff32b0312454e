"""A mixture of experts: each token goes to the few experts that its router scores highest.

Source: Shazeer et al., arXiv:1701.06538; Jiang et al., Mixtral, arXiv:2401.04088, Sec. 2.1; Dai et
    al., DeepSeekMoE, arXiv:2401.06066, Sec. 3.2 (what all tokens share beside their experts); Tang
    et al., Pangu Pro MoE, arXiv:2505.21411, Sec. 2 (equally many choices in each group of experts).
Cost: the chosen experts' products, and the shared ones; no token is dropped, none is padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from paceline.kernels.gate import ACTIVATIONS
from paceline.models.balance import Balance
from paceline.models.dispatch import Dispatch, dispatch_here
from paceline.models.ffn import FeedForward
from paceline.models.layout import Layout
from paceline.models.linear import Linear
from paceline.plan.model_spec import ModelSpec


class Experts(nn.Module):
    """Experts of a layer, their weights stacked: gate and up (E, F, D), down (E, D, F)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.moe is not None
        shape = (spec.moe.num_experts, spec.moe.d_expert, spec.d_model)
        self.activation = ACTIVATIONS[spec.activation]
        self.gate = nn.Parameter(torch.empty(shape))
        self.up = nn.Parameter(torch.empty(shape))
        self.down = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))

    def forward(self, x_RD: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows sorted by expert, `counts` of them for each; an expert without rows does nothing."""
        outputs: list[Tensor] = []
        for expert, rows_RD in enumerate(x_RD.split(list(counts))):
            gate_RF = functional.linear(rows_RD, self.gate[expert].to(x_RD.dtype))
            up_RF = functional.linear(rows_RD, self.up[expert].to(x_RD.dtype))
            hidden_RF = self.activation(gate_RF) * up_RF
            outputs.append(functional.linear(hidden_RF, self.down[expert].to(x_RD.dtype)))
        return torch.cat(outputs)


class MixtureOfExperts(nn.Module):
    """The router, its experts, and what all tokens share.

    Attributes:
        dispatch: brings rows to the experts; another may cross ranks.
        balance: watches the experts' load; None outside of training.
        expert_scales: what the weight of each expert is multiplied by, (E,), where that is learned.
        shared: what every token meets beside its experts, or None.
        shared_gate: the score of a token for that, where there is one.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.moe is not None
        self.moe = spec.moe
        self.dispatch: Dispatch = dispatch_here
        self.balance: Balance | None = None
        self.router = Linear(spec.d_model, spec.moe.num_experts, bias=False)
        if spec.moe.expert_scales:
            self.expert_scales = nn.Parameter(torch.empty(spec.moe.num_experts))
        self.experts = Experts(spec)
        self.shared = FeedForward(spec, spec.moe.d_shared) if spec.moe.d_shared else None
        if spec.moe.shared_gate:
            self.shared_gate = Linear(spec.d_model, 1, bias=False)

    def forward(self, x_BTD: Tensor, layout: Layout) -> Tensor:
        x_RD = x_BTD.flatten(0, 1)
        probs_RE = self.probabilities(x_RD)
        weights_RC, experts_RC = self.choose(probs_RE)
        output_RD = self._through(x_RD, weights_RC.to(x_RD.dtype), experts_RC)
        if self.balance is not None and self.training:
            output_RD = self.balance(output_RD, probs_RE, experts_RC, layout)
        output_BTD = output_RD.view_as(x_BTD)
        return output_BTD if self.shared is None else output_BTD + self._shared(x_BTD, self.shared)

    def probabilities(self, x_RD: Tensor) -> Tensor:
        """Of all experts for each token, (R, E), at least in float32."""
        scores_RE = self.router(x_RD)
        return scores_RE.to(torch.promote_types(x_RD.dtype, torch.float32)).softmax(dim=-1)

    def choose(self, probs_RE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices of the experts that each token goes to, both (R, choices).

        In each group of neighbouring experts a token chooses equally many.
        """
        num_groups = self.moe.num_groups
        probs_RGE = probs_RE.unflatten(-1, (num_groups, -1))
        weights_RGC, places_RGC = probs_RGE.topk(self.moe.experts_per_token // num_groups, dim=-1)
        starts_G1 = torch.arange(num_groups, device=probs_RE.device)[:, None] * probs_RGE.shape[-1]
        weights_RC, experts_RC = weights_RGC.flatten(1), (places_RGC + starts_G1).flatten(1)
        if self.moe.normalize_weights:
            weights_RC = weights_RC / weights_RC.sum(dim=-1, keepdim=True)
        if self.moe.expert_scales:
            weights_RC = weights_RC * self.expert_scales[experts_RC].to(weights_RC.dtype)
        return weights_RC, experts_RC

    def _through(self, x_RD: Tensor, weights_RC: Tensor, experts_RC: Tensor) -> Tensor:
        """The weighted sum of what each token's experts make of it."""
        order = experts_RC.flatten().argsort(stable=True)
        counts_E = experts_RC.flatten().bincount(minlength=self.moe.num_experts)
        tokens = order // experts_RC.shape[1]
        arrived = self.dispatch(x_RD[tokens], counts_E)
        outputs = arrived.combine(self.experts(arrived.rows_RD, arrived.counts))
        weighted = outputs * weights_RC.flatten()[order, None]
        return torch.zeros_like(x_RD).index_add(0, tokens, weighted)

    def _shared(self, x_BTD: Tensor, shared: FeedForward) -> Tensor:
        if not self.moe.shared_gate:
            return shared(x_BTD)
        return self.shared_gate(x_BTD).sigmoid() * shared(x_BTD)


def feed(ffn: nn.Module, x_BTD: Tensor, layout: Layout) -> Tensor:
    """What a block's feed-forward makes of its input, whichever it is.

    A mixture of experts has to see the layout: it counts tokens, and padding is none.
    """
    return ffn(x_BTD, layout) if isinstance(ffn, MixtureOfExperts) else ffn(x_BTD)
