"""Qwen 1.5 and 2 with experts (Yang et al., arXiv:2407.10671, Sec. 2.2.2): Qwen 2, and beside the
experts one that every token meets, behind a gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from paceline.core.errors import UsageError
from paceline.models.families import qwen2
from paceline.models.families.base import (
    ATTENTION,
    EXPERTS,
    GATED_FFN,
    PRE_NORMS,
    SHARED_FFN,
    Stored,
    write_common,
    write_windows,
)
from paceline.models.families.base import weight_map as common_map
from paceline.models.families.qwen3_moe import read_experts, write_experts
from paceline.plan.model_spec import ModelSpec, MoeSpec

_CHANGES: dict[str, Any] = {"family": "qwen2-moe", "tied_embeddings": False}
_SHARED = SHARED_FFN | {"ffn.shared_gate": "mlp.shared_expert_gate"}

PRESETS = {
    "tiny": replace(
        qwen2.PRESETS["tiny"],
        moe=MoeSpec(
            num_experts=6,
            experts_per_token=2,
            d_expert=40,
            normalize_weights=False,
            dense_layers=(0,),
            d_shared=56,
            shared_gate=True,
        ),
        **_CHANGES,
    ),
    "small": replace(
        qwen2.PRESETS["small"],
        moe=MoeSpec(
            num_experts=8,
            experts_per_token=2,
            d_expert=176,
            normalize_weights=False,
            d_shared=352,
            shared_gate=True,
        ),
        **_CHANGES,
    ),
    "14b-a2.7b": ModelSpec(  # Qwen 1.5
        family="qwen2-moe",
        vocab_size=151936,
        d_model=2048,
        num_layers=24,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        d_ffn=5632,
        max_positions=8192,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
        moe=MoeSpec(
            num_experts=60,
            experts_per_token=4,
            d_expert=1408,
            normalize_weights=False,
            d_shared=5632,
            shared_gate=True,
        ),
    ),
}


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    if not config.get("qkv_bias", True):
        raise UsageError("qkv_bias = false is not built in this version")
    moe = replace(
        read_experts(config),
        d_shared=config["shared_expert_intermediate_size"],
        shared_gate=True,
    )
    return replace(qwen2.spec_from_config(config), family="qwen2-moe", moe=moe)


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    assert spec.moe is not None
    common = write_common(spec, "qwen2_moe", "Qwen2MoeForCausalLM") | write_windows(spec)
    shared = {"shared_expert_intermediate_size": spec.moe.d_shared}
    return common | {"qkv_bias": True} | write_experts(spec.moe) | shared


def weight_map(spec: ModelSpec) -> dict[str, Stored]:
    block = PRE_NORMS | ATTENTION | GATED_FFN
    return common_map(spec, block, experts=EXPERTS, router="mlp.gate", beside=_SHARED)
