"""Pangu Pro MoE (Tang et al., arXiv:2505.21411): experts in groups, and one that all tokens share.

Of each group a token chooses one, so that ranks which hold as many groups have the same load,
whatever the tokens. Weights are those of the softmax over all experts, times a learned scale of
each expert, which the published weights have and the paper does not name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from paceline.models.families import llama
from paceline.models.families.base import (
    ATTENTION,
    EXPERTS,
    GATED_FFN,
    PRE_NORMS,
    SHARED_FFN,
    Stored,
    read_common,
    write_common,
)
from paceline.models.families.base import weight_map as common_map
from paceline.plan.model_spec import ModelSpec, MoeSpec

_THETA = 1e6
_CHANGES: dict[str, Any] = {
    "family": "pangu-moe",
    "tied_embeddings": False,
    "rope_theta": _THETA,
    "qkv_bias": True,
    "output_bias": True,
}


def _experts(
    num_experts: int,
    experts_per_token: int,
    d_expert: int,
    d_shared: int,
    dense_layers: tuple[int, ...] = (),
) -> MoeSpec:
    """A group for each choice, as the published model has them."""
    return MoeSpec(
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        d_expert=d_expert,
        normalize_weights=False,
        dense_layers=dense_layers,
        num_groups=experts_per_token,
        expert_scales=True,
        d_shared=d_shared,
    )


PRESETS = {
    "tiny": replace(llama.PRESETS["tiny"], moe=_experts(8, 4, 40, 56, (0,)), **_CHANGES),
    "small": replace(llama.PRESETS["small"], moe=_experts(16, 4, 88, 352), **_CHANGES),
    "72b-a16b": ModelSpec(
        family="pangu-moe",
        vocab_size=153376,
        d_model=5120,
        num_layers=48,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        d_ffn=5376,
        max_positions=131072,
        rope_theta=_THETA,
        qkv_bias=True,
        output_bias=True,
        moe=_experts(64, 8, 1344, 5376),
    ),
}


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    d_shared = config["shared_expert_intermediate_size"]
    moe = _experts(
        config["num_experts"],
        config["num_experts_per_tok"],
        config["moe_intermediate_size"],
        d_shared,
        tuple(config.get("mlp_only_layers") or ()),
    )
    # A model without dense layers states no width of them.
    known = {"rms_norm_eps": 1e-5, "intermediate_size": d_shared, **config}
    fields = read_common(known, theta=_THETA)
    return ModelSpec(family="pangu-moe", moe=moe, qkv_bias=True, output_bias=True, **fields)


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    assert spec.moe is not None
    return write_common(spec, "PanguProMoE", "PanguProMoEForCausalLM") | {
        "num_experts": spec.moe.num_experts,
        "num_experts_per_tok": spec.moe.experts_per_token,
        "moe_intermediate_size": spec.moe.d_expert,
        "shared_expert_intermediate_size": spec.moe.d_shared,
        "mlp_only_layers": list(spec.moe.dense_layers),
    }


def weight_map(spec: ModelSpec) -> dict[str, Stored]:
    block = PRE_NORMS | ATTENTION | GATED_FFN
    stored = common_map(spec, block, experts=EXPERTS, router="mlp.gate", beside=SHARED_FFN)
    for layer in (n for n in range(spec.num_layers) if spec.has_experts(n)):
        name = f"model.layers.{layer}.mlp.router_scale"
        stored[f"blocks.{layer}.ffn.expert_scales"] = Stored((name,), is_row=True)
    return stored
