"""Qwen 3 with experts (Yang et al., arXiv:2505.09388), in all layers or in some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from paceline.models.families import qwen3
from paceline.models.families.base import (
    ATTENTION,
    EXPERTS,
    GATED_FFN,
    PRE_NORMS,
    QUERY_KEY_NORMS,
    Stored,
    write_common,
    write_windows,
)
from paceline.models.families.base import weight_map as common_map
from paceline.plan.model_spec import ModelSpec, MoeSpec

PRESETS = {
    "tiny": replace(
        qwen3.PRESETS["tiny"],
        family="qwen3-moe",
        tied_embeddings=False,
        moe=MoeSpec(num_experts=6, experts_per_token=2, d_expert=40, dense_layers=(0,)),
    ),
    "small": replace(
        qwen3.PRESETS["small"],
        family="qwen3-moe",
        tied_embeddings=False,
        moe=MoeSpec(num_experts=8, experts_per_token=2, d_expert=176),
    ),
    "30b-a3b": ModelSpec(
        family="qwen3-moe",
        vocab_size=151936,
        d_model=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        d_ffn=6144,
        max_positions=40960,
        rope_theta=1e6,
        norm_eps=1e-6,
        qk_norm="head",
        moe=MoeSpec(num_experts=128, experts_per_token=8, d_expert=768),
    ),
}


def read_experts(config: Mapping[str, Any]) -> MoeSpec:
    """The experts that Qwen's keys state."""
    step = config.get("decoder_sparse_step", 1)
    listed = config.get("mlp_only_layers") or []
    layers = range(config["num_hidden_layers"])
    return MoeSpec(
        num_experts=config.get("num_experts") or config["num_local_experts"],
        experts_per_token=config["num_experts_per_tok"],
        d_expert=config["moe_intermediate_size"],
        normalize_weights=config.get("norm_topk_prob", False),
        dense_layers=tuple(n for n in layers if n in listed or (n + 1) % step),
    )


def write_experts(moe: MoeSpec) -> dict[str, Any]:
    """What `read_experts` reads."""
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.d_expert,
        "norm_topk_prob": moe.normalize_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(moe.dense_layers),
    }


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    dense = qwen3.spec_from_config(config)
    return replace(dense, family="qwen3-moe", moe=read_experts(config))


def config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    assert spec.moe is not None
    common = write_common(spec, "qwen3_moe", "Qwen3MoeForCausalLM") | write_windows(spec)
    return common | {"attention_bias": spec.qkv_bias} | write_experts(spec.moe)


def weight_map(spec: ModelSpec) -> dict[str, Stored]:
    block = PRE_NORMS | ATTENTION | QUERY_KEY_NORMS | GATED_FFN
    return common_map(spec, block, experts=EXPERTS, router="mlp.gate")
